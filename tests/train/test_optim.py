"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vlmkd.config import OptimConfig, ParamGroupConfig
from vlmkd.errors import UserError
from vlmkd.train.averaging import check_average, moving_average
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


def rates(optim: OptimConfig, steps: int) -> list[float]:
    """Learning rate of every step."""
    return [lr_factor(step, steps, optim) * optim.lr for step in range(steps)]


def test_everything_is_decayed_when_asked_for() -> None:
    module = nn.ModuleDict({"fc": nn.Linear(3, 2), "bn": nn.BatchNorm1d(2)})
    (group,) = decay_groups(module, OptimConfig(weight_decay=0.1, decay_all=True))
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_promptkds_rate_changes_between_epochs_only(steps_per_epoch: int) -> None:
    published = [1e-5, .005, .00496922, .00487764, .00472752, .00452254, .00426777, .00396946, .00363498, .00327254,
                 .00289109, .0025, .00210891, .00172746, .00136502, .00103054, .00073223, .00047746, .00027248,
                 .00012236]  # fmt: skip
    optim = OptimConfig(
        lr=0.005,
        schedule="epoch_cosine",
        steps_per_epoch=steps_per_epoch,
        first_epoch_lr=1e-5,
        warmup_steps=0,
    )
    found = rates(optim, 20 * steps_per_epoch)
    expected = [rate for rate in published for _ in range(steps_per_epoch)]
    assert found == pytest.approx(expected, abs=5e-9)


def test_dhos_fine_grained_rate_rises_from_zero_and_falls_linearly() -> None:
    optim = OptimConfig(lr=1e-3, schedule="linear", warmup_steps=20)  # 10 % of 200 epochs of one step
    found = rates(optim, 200)
    assert found[0] == 0.0
    assert [found[step] for step in (1, 10, 20)] == pytest.approx([5e-5, 5e-4, 1e-3])
    assert [found[step] for step in (110, 199)] == pytest.approx([5e-4, 1e-3 / 180])


def test_dhos_low_shot_rates() -> None:
    total, warmup = 158_528, 5000  # the 1 % split: 4,954 steps times 32
    compat = OptimConfig(lr=5e-5, schedule="warmup_times_cosine", warmup_steps=warmup)
    at = {step: lr_factor(step, total, compat) * compat.lr for step in (0, 2500, 5000, total - warmup, total)}
    assert at[0] == pytest.approx(5e-7)
    assert at[2500] == pytest.approx(5e-5 * 0.505 * 0.5 * (1 + math.cos(math.pi * 2500 / (total - warmup))))
    assert at[5000] == pytest.approx(4.987e-5, abs=5e-9)
    assert at[total - warmup] == pytest.approx(0.0, abs=1e-18)
    assert at[total] == pytest.approx(1.3e-7, abs=5e-9)
    clean = OptimConfig(lr=5e-5, schedule="cosine", warmup_steps=warmup)
    assert lr_factor(warmup, total, clean) == 1.0
    assert lr_factor(total, total, clean) == pytest.approx(0.0, abs=1e-12)


def test_the_low_shot_product_is_what_torchs_schedulers_give() -> None:
    optim = OptimConfig(lr=5e-5, schedule="warmup_times_cosine", warmup_steps=10)
    weight = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=optim.lr)
    warm = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=0.01, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=50)
    for rate in rates(optim, 60)[:50]:
        assert sgd.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-6, abs=1e-15)
        sgd.step()
        warm.step()
        cosine.step()


def test_moving_average_is_the_textbook_sum_even_from_bf16_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = moving_average(model, 0.9)
    expected = None
    model.to(torch.bfloat16)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    assert average.module.weight.dtype == torch.float32
    assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_average_is_that_of_each_tensor_by_itself_to_the_bit(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    average = moving_average(model, 0.99)
    model.to(dtype)
    expected: list[torch.Tensor] = []
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        now = [parameter.detach().float().clone() for parameter in model.parameters()]
        expected = (
            [torch.lerp(a, b, 1.0 - 0.99) for a, b in zip(expected, now, strict=True)] if expected else now
        )
        average.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), expected, strict=True))


def test_averaging_partitioned_weights_is_refused() -> None:
    check_average(0.99, 2)
    with pytest.raises(UserError, match="ema_decay needs whole weights"):
        check_average(0.99, 3)
