"""Running averages of a student's weights, and the weights of its best evaluation.

What is averaged is a mapping name -> tensor, as `trainable` gives it: frozen tensors cost nothing. Sums are float32
running means, so a tensor that never moves keeps its exact value. `state` is plain data that `torch.load` reads with
weights_only=True; after `load_state` everything goes on bit for bit. All of them need whole weights on each rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
        self.weights = {name: kept_copy(value) for name, value in weights.items()}
        self.score, self.step = score, step
        return True

    def state(self) -> dict[str, Any]:
        """Plain data for `load_state`."""
        return {"weights": self.weights, "score": self.score, "step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.weights = dict(state["weights"])
        self.score, self.step = float(state["score"]), int(state["step"])


def kept_copy(value: Tensor) -> Tensor:
    """A float32 copy on the CPU."""
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True)


def check_average(decay: float, zero_stage: int) -> None:
    """Refuse to average partitioned weights."""
    require(
        decay == 0.0 or zero_stage < 3,
        "ema_decay",
        "needs whole weights on each rank; use deepspeed.zero_stage 1 or 2, or ema_decay=0",
    )
