"""Accuracy and cross entropy on one part of one domain: what selection and SWAD read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result, require_protocol
from vlmkd.evaluation.images import image_outputs
from vlmkd.predictors import ImageClassifier
from vlmkd.results import Meaning, share


class DomainAccuracy:
    """`top1` and the mean cross entropy `loss` of a domain's part, e.g. `sketch_out`; over all ranks."""

    name = "domain"
    meanings: ClassVar = {
        "top1": share("top-1", main=True),
        "loss": Meaning("cross entropy", "nats", higher_is_better=False),
    }

    def __init__(self, dataset: str, items: Sequence[Item]) -> None:
        if not items:
            raise UserError(f"{dataset} has no images; the domain is too small to be split")
        self.dataset, self.items = dataset, list(items)

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """Classify the images of all ranks."""
        require_protocol(self.name, predictor, ImageClassifier)
        images = [item.image for item in self.items]
        _, judged, unreadable = image_outputs(
            predictor.classify, predictor.image_spec, images, self.dataset, context, self._judge
        )
        # Summed in double precision: SWAD reacts to differences of 1e-3.
        top1, loss = judged.double().mean(0).tolist()
        details = {"unreadable": unreadable} if unreadable else {}
        metrics = {"top1": top1, "loss": loss}
        return [Result(self.name, self.dataset, metrics, len(judged), details, meanings=self.meanings)]

    def _judge(self, indices: Tensor, logits: Tensor) -> Tensor:
        """Whether an image is right, and its cross entropy: [B,2]."""
        labels = torch.tensor([self.items[index].label for index in indices.tolist()], dtype=torch.long)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([(logits.argmax(1) == labels).float(), losses], dim=1)
