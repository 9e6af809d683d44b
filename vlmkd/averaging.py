"""Running averages of a student's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vlmkd.config import require


def moving_average(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `student`, kept in fp32: average = decay * average + (1 - decay) * weight.

    Call it before the engine wraps the student; feed it with `update_parameters` after each optimiser step. The
    first update copies the weights. Needs whole parameters on each rank, so ZeRO stage 3 is refused by `check_average`.
    """

    def lerp(average: Tensor, current: Tensor, _: Tensor | int) -> Tensor:
        return torch.lerp(average, current.to(average.dtype), 1.0 - decay)

    return AveragedModel(student, avg_fn=lerp, use_buffers=False).float()


def check_average(decay: float, zero_stage: int) -> None:
    """Refuse a decay outside [0, 1) and averaging of partitioned weights."""
    require(0.0 <= decay < 1.0, "ema_decay", f"is {decay}; it must be in [0, 1), 0 turns the average off")
    require(
        decay == 0.0 or zero_stage < 3,
        "ema_decay",
        "needs whole weights on each rank; use deepspeed.zero_stage 1 or 2, or ema_decay=0",
    )
