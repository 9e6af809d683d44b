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
    TinyCLIP reference), or to all of them with `optim.decay_all`. A group may carry its own `lr` and
    `schedule: False` (constant); see `Engine.set_lr`.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY_NAMES)
        (undecayed if plain and not optim.decay_all else decayed).append(parameter)
    groups = [
        {"name": "decay", "params": decayed, "lr": optim.lr, "weight_decay": optim.weight_decay},
        {"name": "no_decay", "params": undecayed, "lr": optim.lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate at optimiser step `step` of `steps`, as a share of the peak. With W = warmup_steps:

    - `cosine`, `wsd`, `constant`: (step + 1) / W up to W, so that no step is lost; then a cosine to zero, a constant
      with a linear fall over the last `decay_steps`, or a constant.
    - `linear`: step / W, then (steps - step) / (steps - W); the first step has rate 0 (DHO, fine-grained sets).
    - `epoch_cosine`: `first_epoch_lr` in epoch 0, then (1 + cos(pi (epoch - 1) / epochs)) / 2 (PromptKD).
    - `warmup_times_cosine`: min(1, 0.01 + 0.99 step / W) (1 + cos(pi step / (steps - W))) / 2; both parts run from
      step 0, so the cosine ends W steps early and then rises again (DHO, low-shot ImageNet).
    """
    warmup = optim.warmup_steps
    if optim.schedule == "epoch_cosine":
        epoch = step // optim.steps_per_epoch
        epochs = math.ceil(steps / optim.steps_per_epoch)
        return _half_cosine((epoch - 1) / epochs) if epoch else optim.first_epoch_lr / optim.lr
    if optim.schedule == "warmup_times_cosine":
        return min(1.0, 0.01 + 0.99 * step / warmup) * _half_cosine(step / (steps - warmup))
    if optim.schedule == "linear":
        return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "cosine":
        return _half_cosine((step - warmup) / max(1, steps - warmup))
    if optim.schedule == "wsd" and optim.decay_steps:
        return min(1.0, (steps - step) / optim.decay_steps)
    return 1.0


def _half_cosine(progress: float) -> float:
    """1 at 0, falling to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
