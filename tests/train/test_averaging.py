"""The moving average, running means and best weights, and restoring them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.train.conftest import restored
from vlmkd.train.averaging import BestWeights, RunningMean, moving_average, trainable, update_average


@pytest.mark.parametrize(("tie", "kept"), [("earlier", (1.0, 10)), ("later", (2.0, 30))])
def test_best_weights_keep_a_copy_and_follow_the_rule_for_ties(tie: Any, kept: tuple[float, int]) -> None:
    best = BestWeights(tie)
    weight = torch.tensor([1.0])
    assert best.offer({"w": weight}, 0.5, 10)
    weight.fill_(2.0)
    assert not best.offer({"w": weight}, 0.4, 20)
    assert best.weights["w"].item() == 1.0
    assert best.offer({"w": weight}, 0.5, 30) == (tie == "later")
    again = restored(lambda: BestWeights(tie), best.state())
    assert (again.weights["w"].item(), again.score, again.step) == (kept[0], 0.5, kept[1])
    assert again.offer({"w": weight}, 0.6, 40)


def test_only_trained_tensors_are_held_and_running_statistics_when_asked_for() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[0].requires_grad_(False)
    assert set(trainable(module)) == {"1.weight", "1.bias"}
    assert set(trainable(module, buffers=True)) == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_a_tensor_that_never_moves_keeps_its_exact_value() -> None:
    mean = RunningMean()
    for _ in range(1000):
        mean.add({"w": torch.tensor([0.1, 1e-8])})
    assert torch.equal(mean.mean["w"], torch.tensor([0.1, 1e-8]))


def test_averages_read_the_master_weights_of_a_half_precision_student() -> None:
    student: Any = nn.Linear(3, 2)
    average = moving_average(student, 0.9)
    student.bfloat16()
    expected = []
    for number in range(3):
        for parameter in student.parameters():
            parameter.master = torch.full(parameter.shape, 1 + 1e-4 * number)  # bf16 rounds each of them to 1
            parameter.data.fill_(1.0)
        update_average(average, student)
        found = trainable(student)
        assert all(torch.equal(found[name], p.master) for name, p in student.named_parameters())
        expected.append(1 + 1e-4 * number)
    wanted = 0.9 * (0.9 * expected[0] + 0.1 * expected[1]) + 0.1 * expected[2]
    for parameter in average.module.parameters():
        assert parameter.dtype is torch.float32
        torch.testing.assert_close(parameter, torch.full_like(parameter, wanted), rtol=0, atol=2e-7)
