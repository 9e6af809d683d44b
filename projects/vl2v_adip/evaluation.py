"""What selection and SWAD read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.data.labelled import Item
from vlmkd.evaluation.base import Result
from vlmkd.evaluation.classify import Classification
from vlmkd.results import Meaning, share


class DomainAccuracy(Classification):
    """`top1` and the mean cross entropy `loss` of a domain's part, e.g. `sketch_out`."""

    name = "domain"

    def judge(self, indices: Tensor, logits: Tensor) -> Tensor:
        """Whether an image is right, and its cross entropy: [B,2]."""
        labels = torch.tensor([self.items[index].label for index in indices.tolist()], dtype=torch.long)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([(logits.argmax(1) == labels).float(), losses], dim=1)

    def result(self, items: list[Item], judged: Tensor, unreadable: list[str]) -> Result:
        # Summed in double precision: SWAD reacts to differences of 1e-3.
        top1, loss = judged.double().mean(0).tolist()
        meaning = Meaning("cross entropy", "nats", higher_is_better=False)
        meanings = {"top1": share("top-1", main=True), "loss": meaning}
        details = {"unreadable": unreadable} if unreadable else {}
        metrics = {"top1": top1, "loss": loss}
        return Result(self.name, self.dataset, metrics, len(items), details, meanings=meanings)
