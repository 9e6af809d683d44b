"""The released scripts' learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from projects.dho.schedules import linear, warmup_times_cosine


def test_the_fine_grained_rate_rises_from_zero_and_falls_linearly() -> None:
    found = [1e-3 * linear(step, 200, 20) for step in range(200)]  # 10 % of 200 epochs of one step
    assert found[0] == 0.0
    assert [found[step] for step in (1, 10, 20)] == pytest.approx([5e-5, 5e-4, 1e-3])
    assert [found[step] for step in (110, 199)] == pytest.approx([5e-4, 1e-3 / 180])


def test_low_shot_rates() -> None:
    total, warmup = 158_528, 5000  # the 1 % split: 4,954 steps times 32
    at = {
        step: 5e-5 * warmup_times_cosine(step, total, warmup)
        for step in (0, 2500, 5000, total - warmup, total)
    }
    assert at[0] == pytest.approx(5e-7)
    assert at[2500] == pytest.approx(5e-5 * 0.505 * 0.5 * (1 + math.cos(math.pi * 2500 / (total - warmup))))
    assert at[5000] == pytest.approx(4.987e-5, abs=5e-9)
    assert at[total - warmup] == pytest.approx(0.0, abs=1e-18)
    assert at[total] == pytest.approx(1.3e-7, abs=5e-9)


def test_the_low_shot_product_is_what_torchs_schedulers_give() -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-5)
    warm = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=0.01, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=50)
    for step in range(50):
        rate = 5e-5 * warmup_times_cosine(step, 60, 10)
        assert sgd.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-6, abs=1e-15)
        sgd.step()
        warm.step()
        cosine.step()
