"""What a student is judged by: both heads and their mixture on the validation images, and test sets of fewer classes.

Letters: B images of a batch, N of a set, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from projects.dho.mixing import Mixture, mix, search
from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result
from vlmkd.evaluation.classify import Classification
from vlmkd.evaluation.images import image_outputs
from vlmkd.image_spec import ImageSpec
from vlmkd.models.heads import DualLogits
from vlmkd.results import share

NAME = "heads"


@dataclass(frozen=True)
class HeadClassifier:
    """An ImageClassifier whose two heads can be asked apart."""

    name: str
    image_spec: ImageSpec
    class_names: list[str]
    heads: Callable[[Tensor], DualLogits]
    """Images [B, 3, h, w] -> logits [B, C] of both."""
    answer: Callable[[DualLogits], Tensor]
    """Makes one of the two."""

    def classify(self, images: Tensor) -> Tensor:
        return self.answer(self.heads(images))


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

    def run(self, predictor: HeadClassifier, context: Context) -> list[Result]:
        logits, labels, unreadable = head_logits(predictor, self.items, self.dataset, context)
        answers, chosen = {"top1": logits.ce}, {}
        if self.two_heads:
            mixture = self.fixed or search(*logits, labels)
            chosen = {"alpha": mixture.alpha, "beta": mixture.beta}
            answers = {"top1": mix(*logits, **chosen), "ce_top1": logits.ce, "kd_top1": logits.kd}
        metrics = {
            name: float((scores.argmax(1) == labels).double().mean()) for name, scores in answers.items()
        }
        details = {"unreadable": unreadable} if unreadable else {}
        return [Result(self.name, self.dataset, metrics, len(labels), details, chosen, self.meanings)]


def head_logits(
    predictor: HeadClassifier, items: Sequence[Item], title: str, context: Context
) -> tuple[DualLogits, Tensor, list[str]]:
    """Logits [N,C] of both heads and labels [N] of the readable items, and the unreadable ones; the same on every rank."""

    ids, rows, unreadable = image_outputs(
        lambda images: torch.cat(predictor.heads(images), dim=1),
        predictor.image_spec,
        [item.image for item in items],
        title,
        context,
    )
    return DualLogits(*rows.chunk(2, dim=1)), torch.tensor([item.label for item in items])[ids], unreadable


class Shifted:
    """A test set whose classes may be some of the student's (ImageNet-A and -R): the answers compete among these alone.

    Of two classes of one name (ImageNet's `missile`, `sunglasses`) the higher logit counts.
    """

    def __init__(self, inner: Classification) -> None:
        self.inner, self.name = inner, inner.name
        self.dataset, self.items = inner.dataset, inner.items

    def run(self, predictor: HeadClassifier, context: Context) -> list[Result]:
        names, wanted = predictor.class_names, self.inner.class_names
        if names == wanted:
            return self.inner.run(predictor, context)
        if missing := [name for name in wanted if name not in names]:
            raise UserError(
                f"test set {self.dataset}: {len(missing)} of its classes are not the student's (first: {missing[0]}); "
                "name a set with the same classes or some of them"
            )
        first = [names.index(name) for name in wanted]
        last = [len(names) - 1 - names[::-1].index(name) for name in wanted]

        def answer(logits: DualLogits) -> Tensor:
            scores = predictor.answer(logits)
            return torch.maximum(scores[:, first], scores[:, last])

        return self.inner.run(replace(predictor, class_names=wanted, answer=answer), context)
