"""Accuracy and cross entropy on one part of one domain: what selection and SWAD read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, ImageClassifier, Result, gather_rows, require_protocol
from vlmkd.evaluation.images import ImageOutputs


class DomainAccuracy:
    """`top1` and the mean cross entropy `loss` of a domain's part, e.g. `sketch_out`; over all ranks."""

    name = "domain"

    def __init__(self, dataset: str, items: Sequence[Item]) -> None:
        if not items:
            raise UserError(f"{dataset} has no images; the domain is too small to be split")
        self.dataset, self.items = dataset, list(items)

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """Classify the images of all ranks."""
        require_protocol(self.name, predictor, ImageClassifier)
        images = [item.image for item in self.items]
        stream = ImageOutputs(predictor.classify, predictor.image_spec, images, self.dataset, context)
        indices, rows = [torch.empty(0, dtype=torch.long)], [torch.empty(0, 2)]
        for found, logits in stream:
            labels = torch.tensor([self.items[index].label for index in found.tolist()])
            logits = logits.cpu().float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            indices.append(found)
            rows.append(torch.stack([(logits.argmax(1) == labels).float(), losses], dim=1))
        unreadable = stream.unreadable()
        _, judged = gather_rows(torch.cat(indices), torch.cat(rows))
        # Summed in double precision: SWAD reacts to differences of 1e-3.
        top1, loss = judged.double().mean(0).tolist()
        details = {"unreadable": unreadable} if unreadable else {}
        return [Result(self.name, self.dataset, {"top1": top1, "loss": loss}, len(judged), details)]
