"""TAID over a run: a target between student and teacher, which moves as far as the student follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmkd import distributed
from vlmkd.losses.tokens import Taid


class TaidSchedule:
    """The teacher's share t of the target, from `start` to 1 within `steps` optimiser steps (Shing et al. 2025).

    All ranks see all losses, so that t is the same on each and the state of one is that of all.
    """

    def __init__(self, start: float, steps: int) -> None:
        self.start, self.steps, self.now = start, steps, Taid(start)
        self.step, self.seen = 0, (0.0, 0.0)

    def at(self, step: int) -> float:
        """t in optimiser step `step`; the first call of a step looks at the loss of the step before."""
        if step != self.step:
            loss, rows = self.seen
            if rows:
                self.now = self.now.after(loss / rows, step / self.steps, start=self.start)
            self.step, self.seen = step, (0.0, 0.0)
        return self.now.t

    def add(self, loss: Tensor, rows: Tensor) -> None:
        """The target's cross entropy, summed over a micro-batch's rows, and how many they are; a collective."""
        given = distributed.total(torch.stack([loss, rows]).detach().double()).tolist()
        self.seen = (self.seen[0] + given[0], self.seen[1] + given[1])

    def state(self) -> dict[str, Any]:
        return {"now": list(self.now), "step": self.step, "seen": list(self.seen)}

    def load_state(self, state: dict[str, Any]) -> None:
        loss, rows = state["seen"]
        self.now, self.step, self.seen = Taid(*state["now"]), state["step"], (loss, rows)
