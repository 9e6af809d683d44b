"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from vlmkd.config import OptimConfig, ParamGroupConfig, require

NO_DECAY_NAMES = ("bn", "ln", "bias", "logit_scale")


def decay_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters of `module` in decayed and undecayed groups.

    Decay goes to tensors of two or more dimensions whose name holds none of `NO_DECAY_NAMES` (as in the TinyCLIP
    reference), or to all with `optim.decay_all`. Rate and decay are those of the first of `optim.groups` whose pattern is
    in the name, else the run's; one that counts for nothing is refused. A group may have its own `lr`, and `schedule: False`
    (constant).
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    rules = [*optim.groups, ParamGroupConfig()]
    members: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = [([], []) for _ in rules]
    for name, parameter in trained.items():
        rule = next(index for index, rule in enumerate(rules) if re.search(rule.match, name))
        plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY_NAMES)
        members[rule][plain and not optim.decay_all].append(parameter)
    groups = []
    # The log tells the first rate: the run's own.
    for index in (len(rules) - 1, *range(len(rules) - 1)):
        rule, kinds = rules[index], members[index]
        example = " and ".join(dict.fromkeys([*trained][:1] + [*trained][-1:])) or "none"
        told = f"is {rule.match!r}, which counts for no trained parameter; names are like {example}"
        require(any(kinds) or not rule.match, f"optim.groups.{index}.match", told)
        decay = optim.weight_decay if rule.weight_decay is None else rule.weight_decay
        lr = optim.lr if rule.lr is None else rule.lr
        for kind, params, weight_decay in zip(("decay", "no_decay"), kinds, (decay, 0.0), strict=True):
            if params:
                name = f"{rule.match}/{kind}" if rule.match else kind
                groups.append({"name": name, "params": params, "weight_decay": weight_decay, "lr": lr})
    return groups


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate at optimiser step `step` of `steps`, as a share of the peak; warm-up wastes no step."""
    warmup = optim.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "cosine":
        return half_cosine((step - warmup) / max(1, steps - warmup))
    if optim.schedule == "wsd" and optim.decay_steps:
        return min(1.0, (steps - step) / optim.decay_steps)
    return 1.0


def half_cosine(progress: float) -> float:
    """1 at 0, falling to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
