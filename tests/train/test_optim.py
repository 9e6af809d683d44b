"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest
from torch import nn

from vlmkd.config import OptimConfig, ParamGroupConfig
from vlmkd.errors import UserError
from vlmkd.train.optim import decay_groups, lr_factor


def test_decay_goes_to_matrices_only() -> None:
    module = nn.ModuleDict({"fc": nn.Linear(3, 2), "ln_1": nn.LayerNorm(2), "conv": nn.Conv2d(1, 1, 3)})
    module["fc"].bias.requires_grad_(False)
    decay, plain = decay_groups(module, OptimConfig(lr=0.5, weight_decay=0.1))
    assert {id(p) for p in decay["params"]} == {id(module["fc"].weight), id(module["conv"].weight)}
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in [*module["ln_1"].parameters(), module["conv"].bias]
    }
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_rates_and_decays_by_the_names_of_parameters() -> None:
    module = nn.ModuleDict({"tower": nn.Linear(3, 2), "projector": nn.Linear(2, 2), "mixer": nn.Linear(2, 1)})
    groups = [{"match": "^projector", "lr": 0.1}, {"match": "^(mixer|projector)", "weight_decay": 0.0}]
    optim = OptimConfig(lr=0.5, weight_decay=0.2, groups=[ParamGroupConfig(**group) for group in groups])
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in decay_groups(module, optim)}
    assert found == {
        "decay": (0.5, 0.2),
        "no_decay": (0.5, 0.0),
        "^projector/decay": (0.1, 0.2),
        "^projector/no_decay": (0.1, 0.0),
        "^(mixer|projector)/decay": (0.5, 0.0),
        "^(mixer|projector)/no_decay": (0.5, 0.0),
    }
    with pytest.raises(
        UserError, match=r"optim.groups.0.match is 'experts'.*names are like tower.weight and mixer"
    ):
        decay_groups(module, OptimConfig(groups=[ParamGroupConfig(match="experts")]))
    with pytest.raises(UserError, match="is no pattern"):
        ParamGroupConfig(match="(")


def test_cosine_with_warm_up() -> None:
    optim = OptimConfig(warmup_steps=4)
    assert [lr_factor(step, 12, optim) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 12, optim) == 1.0
    assert lr_factor(8, 12, optim) == pytest.approx(0.5)
    assert lr_factor(11, 12, optim) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_warmup_stable_decay() -> None:
    optim = OptimConfig(warmup_steps=2, schedule="wsd", decay_steps=4)
    assert [lr_factor(step, 10, optim) for step in (2, 5, 6, 7, 9)] == [1.0, 1.0, 1.0, 0.75, 0.25]
    assert lr_factor(9, 10, OptimConfig(warmup_steps=2, schedule="constant")) == 1.0


def test_everything_is_decayed_when_asked_for() -> None:
    module = nn.ModuleDict({"fc": nn.Linear(3, 2), "bn": nn.BatchNorm1d(2)})
    (group,) = decay_groups(module, OptimConfig(weight_decay=0.1, decay_all=True))
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    assert group["weight_decay"] == 0.1
