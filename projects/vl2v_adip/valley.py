"""SWAD: which stretch of the weights is averaged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from projects.vl2v_adip.config import SwadConfig
from vlmkd.evaluation.base import Result
from vlmkd.export.folder import stored
from vlmkd.train.selection import Selection, Weights, trainable

_FACTS, _MEANS = ("converge_step", "threshold", "dead_step", "_above"), ("_open", "_final", "_pending")
"""What a LossValley's state holds beside its recent segments."""


@dataclass
class RunningMean:
    """Arithmetic mean of weights in float32, on their device."""

    mean: Weights = field(default_factory=dict)
    count: int = 0

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor], count: int = 1) -> None:
        """Take in a mean over `count`; the first one replaces what is there."""
        self.count += count
        for name, value in weights.items():
            new = value.detach().float()
            if self.count == count:
                self.mean[name] = new.clone()
            else:  # a restored mean comes from the CPU
                self.mean[name] = self.mean[name].to(new.device).lerp_(new, count / self.count)


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
    these losses times 1 + `tolerance_ratio`, and the valley is dead when `n_tolerance` evaluations in a row lie above.

    `reference` is the rule of docs/papers/vl2v_adip.md#the-released-codes-rule: each segment weighs 1, whatever its
    length, and some more often. `clean` takes every step once, from the converged segment to the last one whose loss is
    not above the threshold. The open segment lies on the weights' device, everything else on the CPU.
    """

    name = "SWAD"

    def __init__(
        self,
        swad: SwadConfig,
        loss: Callable[[list[Result]], float] = lambda results: results[0].metrics["loss"],
        *,
        buffers: bool = False,
    ) -> None:
        """`loss` is that of an evaluation's results; `buffers` are averaged too."""
        self.swad, self._loss, self._buffers = swad, loss, buffers
        self._clean = swad.semantics == "clean"
        self.converge_step: int | None = None
        self.threshold: float | None = None
        self.dead_step: int | None = None
        kept = swad.n_converge if self._clean else max(swad.n_converge, swad.n_tolerance)
        self._recent: deque[_Segment] = deque(maxlen=kept)
        self._open, self._final = RunningMean(), RunningMean()
        self._above, self._pending = 0, RunningMean()
        """Of `clean`: evaluations above the threshold, and their steps."""

    @property
    def dead(self) -> bool:
        """Whether the valley has ended."""
        return self.dead_step is not None

    def after_update(self, student: nn.Module, step: int) -> None:
        self.add_step(trainable(student, buffers=self._buffers))

    def after_evaluation(self, student: nn.Module, results: list[Result], step: int) -> bool:
        self.close_segment(self._loss(results), step - 1)
        return self.dead

    def add_step(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after an optimiser step."""
        if not self.dead:
            self._open.add(weights)

    def close_segment(self, loss: float, step: int) -> None:
        """Take in the validation loss of the weights after optimiser step `step` (from 0)."""
        if self.dead:
            return
        assert self._open.count, "no step since the last evaluation"
        mean = {name: stored(value) for name, value in self._open.mean.items()}
        segment = _Segment(mean, self._open.count, float(loss), step)
        if self.swad.segment_reset == "every_eval" or (step > 2500 and step % 1000 == 0):
            self._open = RunningMean()
        if self.converge_step is not None and self._clean:
            self._go_on(segment)
            return
        self._recent.append(segment)
        if self.converge_step is None:
            self._look_for_convergence()
        else:
            self._advance()

    def _queue(self) -> list[_Segment]:
        """The last `n_tolerance` segments, oldest first."""
        return list(self._recent)[-self.swad.n_tolerance :]

    def _look_for_convergence(self) -> None:
        converge, tolerance = self.swad.n_converge, self.swad.n_tolerance
        newest = list(self._recent)[-converge:]
        losses = [segment.loss for segment in newest]
        if len(newest) < converge or losses.index(min(losses)) > 0:
            return
        self.converge_step = newest[0].end
        self.threshold = sum(losses) / len(losses) * (1 + self.swad.tolerance_ratio)
        if self._clean:
            for segment in newest:
                self._go_on(segment)
            self._recent.clear()
            return
        self._final.mean = dict(newest[0].mean)  # its count is 0: the first update replaces it
        joining = newest[1 : 1 + max(converge - tolerance, 0)]
        if tolerance > converge:
            before = self._queue()[: tolerance - converge + 1]
            above = [index for index, segment in enumerate(before, 1) if segment.loss > self.threshold]
            joining = before[max(above, default=0) + 1 :]
        for segment in joining:
            self._final.add(segment.mean)

    def _advance(self) -> None:
        """Reference semantics after convergence: the oldest segment joins while any is low enough."""
        queue = self._queue()
        if queue[0].end < self.converge_step:
            return
        if min(segment.loss for segment in queue) > self.threshold:
            self.dead_step, self._open = queue[-1].end, RunningMean()
        else:
            self._final.add(queue[0].mean)

    def _go_on(self, segment: _Segment) -> None:
        """Clean semantics: steps above the threshold wait for an evaluation below it."""
        if self.dead:
            return
        self._pending.add(segment.mean, segment.count)
        self._above += 1
        if segment.loss <= self.threshold:
            self._final.add(self._pending.mean, self._pending.count)
            self._pending, self._above = RunningMean(), 0
        elif self._above >= self.swad.n_tolerance:
            self.dead_step = segment.end
            self._open, self._pending = RunningMean(), RunningMean()

    def weights(self) -> Weights:
        """The average as if training ended now; before convergence the newest segment's."""
        if self.converge_step is None:
            return self._recent[-1].mean if self._recent else {}
        rest = [] if self._clean or self.dead else self._queue()[1:]
        final = RunningMean(
            {name: value.clone() for name, value in self._final.mean.items()}, self._final.count
        )
        while rest and min(segment.loss for segment in rest) <= self.threshold:
            final.add(rest.pop(0).mean)
        return final.mean

    def state(self) -> dict[str, Any]:
        means = {name: vars(getattr(self, name)) for name in _MEANS}
        recent = [vars(segment) for segment in self._recent]
        return {name: getattr(self, name) for name in _FACTS} | means | {"recent": recent}

    def load_state(self, state: dict[str, Any]) -> None:
        vars(self).update({name: state[name] for name in _FACTS})
        vars(self).update({name: RunningMean(**state[name]) for name in _MEANS})
        self._recent.clear()
        self._recent.extend(_Segment(**segment) for segment in state["recent"])
