"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vlmkd.config import OptimConfig

NO_DECAY_NAMES = ("bn", "ln", "bias", "logit_scale")


def decay_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters of `module` in a decayed and an undecayed group.

    Decay goes to tensors of two or more dimensions whose name holds none of `NO_DECAY_NAMES` (the rule of the
    TinyCLIP reference). A group may carry its own `lr` and `schedule: False` (constant); see `group_lr`.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY_NAMES)
        (undecayed if plain else decayed).append(parameter)
    groups = [
        {"name": "decay", "params": decayed, "lr": optim.lr, "weight_decay": optim.weight_decay},
        {"name": "no_decay", "params": undecayed, "lr": optim.lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate at optimiser step `step` of `steps`, as a share of the peak.

    Warm-up is linear and starts above zero, (step + 1) / warmup_steps; `cosine` then falls to zero over the rest,
    `wsd` stays and falls linearly over the last `decay_steps`, `constant` stays.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if optim.schedule == "wsd" and optim.decay_steps:
        return min(1.0, (steps - step) / optim.decay_steps)
    return 1.0
