"""Which weights of the student count: the present ones, or what `Task.average` and `Task.selections` keep.

They need whole weights on each rank, so ZeRO stage 3 is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmkd.evaluation.base import Result
from vlmkd.export.folder import stored
from vlmkd.train.task import master_value

Weights = dict[str, Tensor]
"""Parameters and buffers of the student by name; those that are not named are the present ones."""


class Selection:
    """A rule that keeps weights; after `load_state` of its `state` all goes on bit for bit."""

    name = ""
    """How results call the student with these weights."""
    folder = ""
    """Folder of the run for their export, where they are not the last selection; empty: none."""

    def after_update(self, student: nn.Module, step: int) -> None:
        """Called after optimiser step `step` (from 0)."""

    def after_evaluation(self, student: nn.Module, results: list[Result], step: int) -> bool:
        """Called after an evaluation at `step`, whose weights `student` still has; True ends the run."""
        return False

    def weights(self) -> Weights:
        """What was kept; empty: nothing yet."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Tensors and plain data."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class MovingAverage(Selection):
    """average = decay * average + (1 - decay) * weight in fp32, from the first step on."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: Weights = {}

    @torch.no_grad()
    def after_update(self, student: nn.Module, step: int) -> None:
        current = {name: value.float() for name, value in trainable(student).items()}
        if not self._average:
            self._average = {name: value.clone() for name, value in current.items()}
            return
        # A restored average comes from the CPU.
        self._average = {name: value.to(current[name].device) for name, value in self._average.items()}
        weights = [current[name] for name in self._average]
        torch._foreach_lerp_([*self._average.values()], weights, 1.0 - self._decay)

    def weights(self) -> Weights:
        return self._average

    def state(self) -> dict[str, Any]:
        return self._average

    def load_state(self, state: dict[str, Any]) -> None:
        self._average = state


class Best(Selection):
    """Weights and buffers of the evaluation with the highest score, as `stored`."""

    def __init__(
        self,
        name: str,
        score: Callable[[list[Result]], float],
        *,
        tie: Literal["earlier", "later"],
        after_step: int = 0,
    ) -> None:
        """`tie`: which of two equal scores counts; evaluations up to step `after_step` do not."""
        self.name, self._rule, self._earlier, self._after = name, score, tie == "earlier", after_step
        self._weights: Weights = {}
        self.score = -math.inf
        self.step = 0

    def after_evaluation(self, student: nn.Module, results: list[Result], step: int) -> bool:
        score = self._rule(results) if step > self._after else -math.inf
        if score > self.score or (score == self.score > -math.inf and not self._earlier):
            kept = set(student.state_dict())
            buffers = {name: value for name, value in student.named_buffers() if name in kept}
            self._weights = {name: stored(value) for name, value in (trainable(student) | buffers).items()}
            self.score, self.step = score, step
        return False

    def weights(self) -> Weights:
        return self._weights

    def state(self) -> dict[str, Any]:
        return {"weights": self._weights, "score": self.score, "step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self._weights, self.score, self.step = state["weights"], state["score"], state["step"]


def trainable(module: nn.Module, *, buffers: bool = False) -> Weights:
    """Trained parameters of `module`, or their masters (`Task.masters`); `buffers`: and floating-point buffers."""
    weights = {name: master_value(p).detach() for name, p in module.named_parameters() if p.requires_grad}
    if buffers:
        weights |= {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    return weights


@contextmanager
def using(student: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, `student` has these weights, in its own types."""
    held: dict[str, Any] = dict([*student.named_parameters(), *student.named_buffers()])
    before = [(held[name], held[name].data, getattr(held[name], "master", None)) for name in weights]
    try:
        for (own, data, master), value in zip(before, weights.values(), strict=True):
            own.data = value.to(data.device, data.dtype).reshape(data.shape)
            if master is not None:
                own.master = value.to(master.device, master.dtype).reshape(master.shape)
        yield
    finally:
        for own, data, master in before:
            own.data = data
            if master is not None:
                own.master = master


def completed(weights: Weights, own: Mapping[str, Tensor]) -> Weights:
    """`weights` with those of `own` in their places, types and shapes (the engine makes vectors of scalars)."""
    return {
        name: own[name].detach().cpu().to(value.dtype).reshape(value.shape) if name in own else value
        for name, value in weights.items()
    }
