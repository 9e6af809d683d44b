"""Classification of a labelled set: accuracies by class, domain and class group, confusion matrix, worst mistakes.

N images, B batch, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from vlmkd.class_names import require_same_classes
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.labelled_sets import items_of
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result, require_protocol
from vlmkd.evaluation.images import class_vectors, embeddings, image_outputs
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.predictors import DualEncoder, ImageClassifier
from vlmkd.results import UNREADABLE, share

_TOP_K = 5
WORST = 24
"""Mistakes that are kept for the report."""


class ZeroShotClassifier:
    """A DualEncoder with class vectors as an ImageClassifier: the teacher beside its student."""

    def __init__(self, encoder: DualEncoder, vectors: ClassVectors) -> None:
        self.name, self.image_spec, self.class_names = encoder.name, encoder.image_spec, vectors.class_names
        self._encoder, self._vectors = encoder, vectors

    def classify(self, images: Tensor) -> Tensor:
        return self._vectors.logits(self._encoder.encode_image(images))


class Classification:
    """An ImageClassifier answers by its logits; a DualEncoder, where `templates` are given, zero-shot.

    Metrics: `top1`, `top5` (where C > 5), `mean_per_class` (over the classes that occur); with several domains
    `<domain>_top1` and `mean_domain_top1`; with `base` and `novel` classes `base_top1`, `novel_top1` and `harmonic_mean`.
    The classes of a group compete only with each other (as in PromptKD), or, with `rivals="all"`, with every class (the
    open set of VL2V-ADiP).

    Details: `classes`; `per_class` and `per_group`, as (right, seen); `confusion`, the entries that are not 0, as (class,
    predicted class, images); `mistakes`, the wrong answers with the highest probability; the unreadable files.
    """

    name = "classification"

    def __init__(
        self,
        items: Sequence[Item],
        class_names: Sequence[str],
        *,
        dataset: str,
        templates: Sequence[str] = (),
        domains: Sequence[str] = (),
        base: Sequence[int] = (),
        novel: Sequence[int] = (),
        rivals: Literal["group", "all"] = "group",
    ) -> None:
        told = f"classification set {dataset}"
        if not items:
            raise UserError(f"{told} has no images; choose another split")
        for item in items:
            if not 0 <= item.label < len(class_names):
                label = f"label {item.label} of {len(class_names)} classes; evaluate on labelled images"
                raise UserError(f"{told}: {item.key} has {label}")
        if bool(base) != bool(novel) or set(base) & set(novel):
            raise UserError(f"{told}: base and novel must be two class groups without a common class")
        self.items, self.class_names, self.dataset = list(items), list(class_names), dataset
        self.templates, self.domains, self.rivals = list(templates), list(domains), rivals
        self.groups = {"base": list(base), "novel": list(novel)} if base else {}

    @classmethod
    def of(
        cls, data: LabelledSet, split: str = "test", *, base: Sequence[int] = (), novel: Sequence[int] = ()
    ) -> Classification:
        """Of one split; its name is `<set>_<split>`, or `<set>` for the test split."""
        name = data.name if split == "test" else f"{data.name}_{split}"
        return cls(
            items_of(data, split), data.class_names, dataset=name, templates=data.templates, domains=data.domains,
            base=base, novel=novel,
        )  # fmt: skip

    def run(self, predictor: Any, context: Context) -> list[Result]:
        images, title = [item.image for item in self.items], f"{self.dataset}: images"
        if self.templates and not isinstance(predictor, ImageClassifier):
            require_protocol(self.name, predictor, DualEncoder)
            vectors = class_vectors(predictor, self.class_names, self.templates, self.dataset, context)
            outputs = embeddings(
                predictor, images, title, context, lambda ids, rows: self.judge(ids, vectors.logits(rows))
            )
        else:
            require_protocol(self.name, predictor, ImageClassifier)
            require_same_classes(predictor.class_names, self.class_names, f"model {predictor.name}")
            run, spec = predictor.classify, predictor.image_spec
            outputs = image_outputs(run, spec, images, title, context, self.judge)
        ids, judged, unreadable = outputs
        return [self.result([self.items[index] for index in ids.tolist()], judged, unreadable)]

    def judge(self, indices: Tensor, logits: Tensor) -> Tensor:
        """Per image the predicted class, its probability, whether the label is in the top 5 and first in its group.

        [B,4] in fp32, exact for class numbers.
        """
        labels = torch.tensor([self.items[index].label for index in indices.tolist()], dtype=torch.long)
        order = logits.topk(min(_TOP_K, logits.shape[1]), dim=1).indices
        predicted = order[:, 0]
        probability = logits.softmax(dim=1).gather(1, order[:, :1])[:, 0]
        first_in_group = torch.zeros(len(labels), dtype=torch.bool)
        for classes in self.groups.values():
            group = torch.tensor(classes)
            first = predicted if self.rivals == "all" else group[logits[:, group].argmax(dim=1)]
            first_in_group |= torch.isin(labels, group) & (first == labels)
        in_top = (order == labels[:, None]).any(dim=1)
        return torch.stack([part.float() for part in (predicted, probability, in_top, first_in_group)], dim=1)

    def result(self, items: list[Item], judged: Tensor, unreadable: list[str]) -> Result:
        count, labels = len(self.class_names), torch.tensor([item.label for item in items])
        predicted, probability, in_top, first_in_group = judged.unbind(dim=1)
        predicted = predicted.long()
        right = predicted == labels
        per_class = _by_group(right, labels, count)
        metrics = {"top1": int(right.sum()) / len(items)}
        if count > _TOP_K:
            metrics["top5"] = int(in_top.sum()) / len(items)
        metrics["mean_per_class"] = fmean(hits / seen for hits, seen in per_class if seen)
        per_group: dict[str, list[int]] = {}
        if len(self.domains) > 1:
            found = _by_group(right, torch.tensor([item.domain for item in items]), len(self.domains))
            per_group |= dict(zip(self.domains, found, strict=True))
            shares = {f"{name}_top1": hits / seen for name, (hits, seen) in per_group.items() if seen}
            metrics |= shares | {"mean_domain_top1": fmean(shares.values())}
        for name, classes in self.groups.items():
            inside = torch.isin(labels, torch.tensor(classes))
            hits, seen = per_group[name] = [int(first_in_group[inside].sum()), int(inside.sum())]
            if not seen:
                raise UserError(f"classification set {self.dataset} has no readable image of a {name} class")
            metrics[f"{name}_top1"] = hits / seen
        if self.groups:
            metrics["harmonic_mean"] = harmonic_mean(metrics["base_top1"], metrics["novel_top1"])
        cells, numbers = torch.unique(labels * count + predicted, return_counts=True)
        wrong = (~right).nonzero()[:, 0]
        worst = wrong[probability[wrong].argsort(descending=True, stable=True)[:WORST]]
        details: dict[str, Any] = {
            "classes": self.class_names,
            "per_class": per_class,
            "per_group": per_group,
            "confusion": torch.stack([cells // count, cells % count, numbers], dim=1).tolist(),
            "mistakes": [
                {
                    "key": items[i].key, "label": items[i].label, "predicted": int(predicted[i]),
                    "probability": float(probability[i]),
                }
                for i in worst.tolist()
            ],
        }  # fmt: skip
        if unreadable:
            metrics["unreadable"], details["unreadable"] = float(len(unreadable)), unreadable
        labels_of = {name: re.sub(r"top(\d)$", r"top-\1", name).replace("_", " ") for name in metrics}
        meanings = {name: share(label, main=name == "top1") for name, label in labels_of.items()}
        meanings |= {"unreadable": UNREADABLE}
        return Result(self.name, self.dataset, metrics, len(items), details, meanings=meanings)


def harmonic_mean(base: float, novel: float) -> float:
    """2bn / (b + n); 0 when both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def _by_group(right: Tensor, group: Tensor, count: int) -> list[list[int]]:
    """(right, seen) of each group below `count`."""
    pairs = [torch.bincount(own, minlength=count) for own in (group[right], group)]
    return torch.stack(pairs, dim=1).tolist()
