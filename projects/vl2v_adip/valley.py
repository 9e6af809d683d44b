"""SWAD: which stretch of the weights is averaged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmkd.config import require
from vlmkd.evaluation.base import Result
from vlmkd.train.selection import Selection, Weights, kept_copy, trainable


class RunningMean:
    """Arithmetic mean of the weights that it was given, on their device: one float32 copy."""

    def __init__(self) -> None:
        self.mean: Weights = {}
        self.count = 0

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor], count: int = 1) -> None:
        """Take in `weights`, themselves a mean over `count`; the first ones are copied."""
        self.count += count
        for name, value in weights.items():
            current = value.detach().float()
            if name in self.mean:
                # A restored mean comes from the CPU.
                self.mean[name] = self.mean[name].to(current.device).lerp_(current, count / self.count)
            else:
                self.mean[name] = current.clone()

    def state(self) -> dict[str, Any]:
        """Plain data for `load_state`."""
        return {"mean": self.mean, "count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.mean, self.count = dict(state["mean"]), int(state["count"])


Semantics = Literal["reference", "clean"]
Reset = Literal["every_eval", "vl2v_default"]


@dataclass
class _Segment:
    """Mean of the weights over some steps up to an evaluation, and that evaluation's loss."""

    mean: Weights
    count: int
    loss: float
    end: int
    """Step (from 0) that was evaluated."""


class LossValley(Selection):
    """SWAD: the mean of the weights between convergence and overfitting, both read off a validation loss.

    A segment is the mean of the weights after every step since the evaluation before. Training has converged at the
    first segment whose loss is below those of the `n_converge - 1` evaluations after it; `threshold` is the mean of
    these losses times 1 + `tolerance_ratio`, and the valley is dead (`dead`) when `n_tolerance` evaluations in a row
    lie above it.

    `reference` is the rule of docs/papers/vl2v_adip.md#the-released-codes-rule: each segment weighs 1 whatever its
    length, the converged one usually twice, and the oldest one more often when convergence comes before `n_tolerance`
    evaluations.
    `clean` takes every step once, from the converged segment to the last one whose loss is not above the threshold.

    Memory, in float32 copies of the averaged tensors: `reference` max(n_converge, n_tolerance) segments, the average
    and the open segment, 8 with the defaults; `clean` n_converge + 1 before convergence, then 3. The open segment lies
    on the weights' device, everything else on the CPU; `state` holds all of it.
    """

    name = "SWAD"

    def __init__(
        self,
        *,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance_ratio: float = 0.3,
        semantics: Semantics = "reference",
        segment_reset: Reset = "every_eval",
        loss: Callable[[list[Result]], float] = lambda results: results[0].metrics["loss"],
        buffers: bool = False,
    ) -> None:
        """`segment_reset`: `every_eval` as described; `vl2v_default` lets a segment go on until an evaluation at a step
        that is a multiple of 1000 above 2500, as all but one of the released VL2V-ADiP scripts do."""
        require(
            semantics == "reference" or segment_reset == "every_eval",
            "swad.segment_reset",
            "is vl2v_default, whose segments overlap; it needs swad.semantics=reference",
        )
        self.n_converge, self.n_tolerance, self.tolerance_ratio = n_converge, n_tolerance, tolerance_ratio
        self.semantics, self.segment_reset = semantics, segment_reset
        self._loss, self._buffers = loss, buffers
        self.converge_step: int | None = None
        self.threshold: float | None = None
        self.dead_step: int | None = None
        self._open = RunningMean()
        kept = max(n_converge, n_tolerance) if semantics == "reference" else n_converge
        self._recent: deque[_Segment] = deque(maxlen=kept)
        self._final = RunningMean()
        self._above = 0  # clean: evaluations in a row above the threshold, whose steps wait in _pending
        self._pending = RunningMean()

    @property
    def dead(self) -> bool:
        """Whether the valley has ended; training may end too."""
        return self.dead_step is not None

    def after_update(self, student: nn.Module, step: int) -> None:
        """Feed the open segment."""
        self.add_step(trainable(student, buffers=self._buffers))

    def after_evaluation(self, student: nn.Module, results: list[Result], step: int) -> bool:
        """Close the segment; a dead valley ends the run."""
        self.close_segment(self._loss(results), step - 1)
        return self.dead

    def add_step(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after an optimiser step."""
        if not self.dead:
            self._open.add(weights)

    def close_segment(self, loss: float, step: int) -> None:
        """Take in the validation loss of the current weights, after optimiser step number `step` (from 0)."""
        if self.dead:
            return
        assert self._open.count, "no step since the last evaluation"
        mean = {name: kept_copy(value) for name, value in self._open.mean.items()}
        segment = _Segment(mean, self._open.count, float(loss), step)
        if self.segment_reset == "every_eval" or (step > 2500 and step % 1000 == 0):
            self._open = RunningMean()
        if self.converge_step is not None and self.semantics == "clean":
            self._go_on(segment)
            return
        self._recent.append(segment)
        if self.converge_step is None:
            self._look_for_convergence()
        elif self._oldest()[0].end >= self.converge_step:
            self._advance(step)

    def _oldest(self) -> list[_Segment]:
        """The last `n_tolerance` segments, oldest first."""
        return list(self._recent)[-self.n_tolerance :]

    def _look_for_convergence(self) -> None:
        newest = list(self._recent)[-self.n_converge :]
        losses = [segment.loss for segment in newest]
        if len(newest) < self.n_converge or losses.index(min(losses)) > 0:
            return
        self.converge_step = newest[0].end
        self.threshold = sum(losses) / len(losses) * (1 + self.tolerance_ratio)
        if self.semantics == "clean":
            for segment in newest:
                self._go_on(segment)
            self._recent.clear()
            return
        self._final.mean = newest[0].mean  # its count is 0: the first update replaces it
        if self.n_tolerance < self.n_converge:
            for segment in newest[1 : 1 + self.n_converge - self.n_tolerance]:
                self._update(segment)
        elif self.n_tolerance > self.n_converge:
            before = self._oldest()[: self.n_tolerance - self.n_converge + 1]
            above = [index for index, segment in enumerate(before) if segment.loss > self.threshold]
            start = above[-1] + 1 if above else 0
            for segment in before[start + 1 :]:
                self._update(segment)

    def _advance(self, step: int) -> None:
        """Reference semantics after convergence: the oldest segment joins while any in the queue is low enough."""
        assert self.threshold is not None
        queue = self._oldest()
        if min(segment.loss for segment in queue) > self.threshold:
            self.dead_step = step
            self._open = RunningMean()
        else:
            self._update(queue[0])

    def _update(self, segment: _Segment) -> None:
        if self._final.count == 0:
            self._final.mean = {}
        self._final.add(segment.mean)

    def _go_on(self, segment: _Segment) -> None:
        """Clean semantics: steps above the threshold wait until a later evaluation is below it again."""
        assert self.threshold is not None
        if self.dead:
            return
        self._pending.add(segment.mean, segment.count)
        if segment.loss <= self.threshold:
            self._final.add(self._pending.mean, self._pending.count)
            self._pending, self._above = RunningMean(), 0
            return
        self._above += 1
        if self._above >= self.n_tolerance:
            self.dead_step = segment.end
            self._open, self._pending = RunningMean(), RunningMean()

    def weights(self) -> Weights:
        """The averaged weights as if training ended now; without convergence those of the newest segment.

        Does not change the state, so that evaluations may go on.
        """
        if self.converge_step is None:
            return self._recent[-1].mean if self._recent else {}
        if self.semantics == "clean" or self.dead:
            return self._final.mean
        assert self.threshold is not None
        rest = self._oldest()[1:]
        final = RunningMean()
        if self._final.count:
            final.add(self._final.mean, self._final.count)
        while rest and min(segment.loss for segment in rest) <= self.threshold:
            final.add(rest.pop(0).mean)
        return final.mean if final.count else self._final.mean

    def state(self) -> dict[str, Any]:
        """Plain data for `load_state`."""
        return {
            "converge_step": self.converge_step,
            "threshold": self.threshold,
            "dead_step": self.dead_step,
            "above": self._above,
            "open": self._open.state(),
            "final": self._final.state(),
            "pending": self._pending.state(),
            "recent": [vars(segment) for segment in self._recent],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.converge_step, self.threshold = state["converge_step"], state["threshold"]
        self.dead_step, self._above = state["dead_step"], state["above"]
        self._open.load_state(state["open"])
        self._final.load_state(state["final"])
        self._pending.load_state(state["pending"])
        self._recent.clear()
        self._recent.extend(_Segment(**segment) for segment in state["recent"])
