"""What a trained student is judged by while it trains: both heads and their mixture on the validation images.

Letters: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from projects.dho.mixing import Mixture, mix, search
from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result, require_protocol
from vlmkd.evaluation.classify import Classification
from vlmkd.evaluation.images import ImageOutputs
from vlmkd.image_spec import ImageSpec
from vlmkd.models.heads import DualLogits
from vlmkd.predictors import ImageClassifier
from vlmkd.results import share

NAME = "heads"


@runtime_checkable
class HeadPredictor(Protocol):
    """A classifier whose two heads can be asked apart."""

    name: str
    image_spec: ImageSpec
    class_names: list[str]

    def heads(self, images: Tensor) -> DualLogits:
        """[B,3,H,W] in the statistics of `image_spec` -> logits [B,C] of both heads, float32."""
        ...


class HeadSearch:
    """Accuracy of each head on `items`, and of the mixture: a fixed one, or the best of the grid.

    Metrics: `top1` (mixed), `ce_top1`, `kd_top1`; chosen: `alpha`, `beta`. A student with one head has `top1` alone.
    """

    name = NAME
    meanings: ClassVar = {
        "top1": share("top-1", main=True),
        "ce_top1": share("CE head, top-1"),
        "kd_top1": share("KD head, top-1"),
    }

    def __init__(
        self, dataset: str, items: Sequence[Item], *, two_heads: bool, fixed: Mixture | None = None
    ) -> None:
        self.dataset, self.items, self.two_heads, self.fixed = dataset, list(items), two_heads, fixed

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """Evaluate on all ranks together."""
        require_protocol(self.name, predictor, HeadPredictor)
        logits, labels, unreadable = head_logits(predictor, self.items, self.dataset, context)
        chosen: dict[str, float] = {}
        if not self.two_heads:
            metrics = {"top1": _accuracy(logits.ce, labels)}
        else:
            mixture = self.fixed or search(*logits, labels)
            mixed = mix(*logits, mixture.alpha, mixture.beta)
            metrics = {
                "top1": _accuracy(mixed, labels),
                "ce_top1": _accuracy(logits.ce, labels),
                "kd_top1": _accuracy(logits.kd, labels),
            }
            chosen = {"alpha": mixture.alpha, "beta": mixture.beta}
        details = {"unreadable": unreadable} if unreadable else {}
        return [Result(self.name, self.dataset, metrics, len(labels), details, chosen, self.meanings)]


def head_logits(
    predictor: HeadPredictor, items: Sequence[Item], title: str, context: Context
) -> tuple[DualLogits, Tensor, list[str]]:
    """Logits [N,C] of both heads, labels [N] of the readable items, and the unreadable ones; the same on every rank."""

    def side_by_side(images: Tensor) -> Tensor:
        return torch.cat(predictor.heads(images), dim=1)

    stream = ImageOutputs(side_by_side, predictor.image_spec, [item.image for item in items], title, context)
    ids, rows, unreadable = stream.gathered()
    ce, kd = rows.chunk(2, dim=1)
    return DualLogits(ce, kd), torch.tensor([item.label for item in items])[ids], unreadable


class Shifted:
    """A test set whose classes may be some of the student's (ImageNet-A and -R): the answers compete among these alone.

    Classes are found by name. Where the student has a name twice (ImageNet's `missile`, `sunglasses`), and the set once,
    the higher of the two logits counts.
    """

    def __init__(self, inner: Classification) -> None:
        self.inner, self.name = inner, inner.name
        self.dataset, self.items = inner.dataset, inner.items

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """Classify the images of all ranks.

        Raises:
            UserError: a class that the student does not have.
        """
        require_protocol(self.name, predictor, ImageClassifier)
        if list(predictor.class_names) != self.inner.class_names:
            predictor = _OfClasses(predictor, self.inner.class_names, self.inner.dataset)
        return self.inner.run(predictor, context)


class _OfClasses:
    """An ImageClassifier restricted to the classes of these names."""

    def __init__(self, inner: ImageClassifier, class_names: list[str], dataset: str) -> None:
        self.name, self.image_spec, self.class_names, self._inner = (
            inner.name,
            inner.image_spec,
            class_names,
            inner,
        )
        places: dict[str, list[int]] = {}
        for index, name in enumerate(inner.class_names):
            places.setdefault(name, []).append(index)
        missing = [name for name in class_names if name not in places]
        if missing:
            raise UserError(
                f"test set {dataset}: {len(missing)} of its classes are not the student's (first: {missing[0]}); "
                "name a set with the same classes or some of them"
            )
        self._first = [places[name][0] for name in class_names]
        self._last = [places[name][-1] for name in class_names]

    def classify(self, images: Tensor) -> Tensor:
        logits = self._inner.classify(images)
        return torch.maximum(logits[:, self._first], logits[:, self._last])


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())
