"""Running averages of a student's weights, and the weights of its best evaluation.

What is averaged is a mapping name -> tensor, as `trainable` gives it: frozen tensors cost nothing. Sums are float32
running means, so a tensor that never moves keeps its exact value. `state` is plain data that `torch.load` reads with
weights_only=True; after `load_state` everything goes on bit for bit. All of them need whole weights on each rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vlmkd.config import require
from vlmkd.train.task import master_value

Weights = dict[str, Tensor]
Tensors = tuple[Tensor, ...] | list[Tensor]


def moving_average(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `student`, kept in fp32: average = decay * average + (1 - decay) * weight.

    Call it before the engine wraps the student; feed it with `update_average` after each optimiser step. The
    first update copies the weights. Needs whole parameters on each rank, so ZeRO stage 3 is refused by `check_average`.
    """

    def lerp(average: Tensors, current: Tensors, _: Tensor | int) -> None:
        torch._foreach_lerp_(
            average, [value.to(mean) for value, mean in zip(current, average, strict=True)], 1.0 - decay
        )

    return AveragedModel(student, multi_avg_fn=lerp, use_buffers=False).float()


def update_average(average: AveragedModel, student: nn.Module) -> None:
    """Feed a moving average with the student's master weights (see `Task.masters`)."""
    average.update_parameters(_Masters(student))  # type: ignore[arg-type]


class _Masters:
    """What AveragedModel reads of a model."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def parameters(self) -> Iterator[Tensor]:
        return (master_value(parameter).detach() for parameter in self._module.parameters())

    def buffers(self) -> Iterator[Tensor]:
        return self._module.buffers()


def trainable(module: nn.Module, *, buffers: bool = False) -> Weights:
    """The trained parameters of `module` by name, detached; with `buffers` also its floating-point buffers.

    In half precision these are the fp32 master weights of the parameters that `Task.masters` lists.
    """
    weights = {name: master_value(p).detach() for name, p in module.named_parameters() if p.requires_grad}
    if buffers:
        weights |= {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    return weights


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


class GaussianAverage:
    """PromptKD's average of the weights after each epoch: sum over e = 1 .. N of g_e theta_e (spec b.2, GPA).

    g_e is proportional to exp(-((e - mean) / std)^2 / 2) and sums to 1 over e = 1 .. N. One float32 copy.
    """

    def __init__(self, epochs: int, mean: float, std: float) -> None:
        require(epochs >= 1, "epochs", f"is {epochs}; it must be at least 1")
        require(std > 0, "std", f"of the Gaussian average is {std}; it must be above 0")
        bells = [math.exp(-0.5 * ((epoch - mean) / std) ** 2) for epoch in range(1, epochs + 1)]
        require(
            sum(bells) > 0, "mean", f"of the Gaussian average is {mean}, too far from epochs 1 to {epochs}"
        )
        self.coefficients = [bell / sum(bells) for bell in bells]
        self._sum: Weights = {}
        self._epoch = 0

    @property
    def complete(self) -> bool:
        """Whether every epoch was added."""
        return self._epoch == len(self.coefficients)

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after the next epoch."""
        assert not self.complete, f"the average holds all of its {self._epoch} epochs"
        coefficient = self.coefficients[self._epoch]
        for name, value in weights.items():
            part = value.detach().float() * coefficient
            self._sum[name] = self._sum[name].to(part.device) + part if name in self._sum else part
        self._epoch += 1

    def average(self) -> Weights:
        """The average over all N epochs."""
        assert self.complete, f"{self._epoch} of {len(self.coefficients)} epochs were added"
        return self._sum

    def state(self) -> dict[str, Any]:
        """Plain data for `load_state`."""
        return {"sum": self._sum, "epoch": self._epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._sum, self._epoch = dict(state["sum"]), int(state["epoch"])


class BestWeights:
    """The weights of the evaluation with the highest score, on the CPU in float32."""

    def __init__(self, tie: Literal["earlier", "later"]) -> None:
        """`tie`: which of two equal scores counts (PromptKD's code the earlier, VL2V-ADiP's the later)."""
        self._earlier = tie == "earlier"
        self.weights: Weights = {}
        self.score = -math.inf
        self.step = -1

    def offer(self, weights: Mapping[str, Tensor], score: float, step: int) -> bool:
        """Keep `weights` when none was better, nor as good and kept by the rule for ties; True when they were kept."""
        if score < self.score or (score == self.score and self._earlier):
            return False
        self.weights = {name: _kept(value) for name, value in weights.items()}
        self.score, self.step = score, step
        return True

    def state(self) -> dict[str, Any]:
        """Plain data for `load_state`."""
        return {"weights": self.weights, "score": self.score, "step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.weights = dict(state["weights"])
        self.score, self.step = float(state["score"]), int(state["step"])


def _kept(value: Tensor) -> Tensor:
    """A float32 copy on the CPU."""
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True)


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


class LossValley:
    """SWAD: the mean of the weights between convergence and overfitting, both read off a validation loss.

    A segment is the mean of the weights after every step since the evaluation before. Training has converged at the
    first segment whose loss is below those of the `n_converge - 1` evaluations after it; `threshold` is the mean of
    these losses times 1 + `tolerance_ratio`, and the valley is dead (`dead`) when `n_tolerance` evaluations in a row
    lie above it.

    `reference` repeats the released code (VL2V-ADiP spec b.5): each segment weighs 1 whatever its length, the
    converged one usually twice, and the oldest one more often when convergence comes before `n_tolerance` evaluations.
    `clean` takes every step once, from the converged segment to the last one whose loss is not above the threshold.

    Memory, in float32 copies of the averaged tensors: `reference` max(n_converge, n_tolerance) segments, the average
    and the open segment, 8 with the defaults; `clean` n_converge + 1 before convergence, then 3. The open segment lies
    on the weights' device, everything else on the CPU; `state` holds all of it.
    """

    def __init__(
        self,
        *,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance_ratio: float = 0.3,
        semantics: Semantics = "reference",
        segment_reset: Reset = "every_eval",
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

    def add_step(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after an optimiser step."""
        if not self.dead:
            self._open.add(weights)

    def close_segment(self, loss: float, step: int) -> None:
        """Take in the validation loss of the current weights, after optimiser step number `step` (from 0)."""
        if self.dead:
            return
        assert self._open.count, "no step since the last evaluation"
        mean = {name: _kept(value) for name, value in self._open.mean.items()}
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

    def average(self) -> Weights:
        """The averaged weights as if training ended now; without convergence those of the newest segment.

        Does not change the state, so that evaluations may go on.
        """
        if self.converge_step is None:
            assert self._recent, "no evaluation yet"
            return self._recent[-1].mean
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


def check_average(decay: float, zero_stage: int) -> None:
    """Refuse to average partitioned weights."""
    require(
        decay == 0.0 or zero_stage < 3,
        "ema_decay",
        "needs whole weights on each rank; use deepspeed.zero_stage 1 or 2, or ema_decay=0",
    )
