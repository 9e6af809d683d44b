"""PromptKD's average of the weights over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd.config import require
from vlmkd.train.selection import Selection, Weights, trainable


class GaussianAverage(Selection):
    """PromptSRC's average of the weights after each epoch (GPA; docs/papers/promptkd.md, eq. 10).

    g_e is proportional to exp(-((e - mean) / std)^2 / 2) and sums to 1 over e = 1 .. N. One float32 copy.
    """

    def __init__(self, epochs: int, mean: float, std: float, steps_per_epoch: int = 1) -> None:
        require(std > 0, "std", f"of the Gaussian average is {std}; it must be above 0")
        bells = [math.exp(-0.5 * ((epoch - mean) / std) ** 2) for epoch in range(1, epochs + 1)]
        require(
            sum(bells) > 0, "mean", f"of the Gaussian average is {mean}, too far from epochs 1 to {epochs}"
        )
        self.coefficients = [bell / sum(bells) for bell in bells]
        self._steps_per_epoch = steps_per_epoch
        self._sum: Weights = {}
        self._epoch = 0

    @property
    def complete(self) -> bool:
        return self._epoch == len(self.coefficients)

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Take in an epoch's weights."""
        coefficient = self.coefficients[self._epoch]
        for name, value in weights.items():
            part = value.detach().float() * coefficient
            self._sum[name] = self._sum[name].to(part.device) + part if name in self._sum else part
        self._epoch += 1

    def after_update(self, student: nn.Module, step: int) -> None:
        if (step + 1) % self._steps_per_epoch == 0:
            self.add(trainable(student))

    def weights(self) -> Weights:
        return self._sum if self.complete else {}

    def state(self) -> dict[str, Any]:
        return {"sum": self._sum, "epoch": self._epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        self._sum, self._epoch = dict(state["sum"]), int(state["epoch"])
