"""Which weights count: averages, the best evaluation, evaluating with them, and restoring them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.train.conftest import restored
from vlmkd.evaluation.base import Result
from vlmkd.train.selection import Best, MovingAverage, completed, trainable, using


def test_a_moving_average_is_the_textbook_sum_even_from_bf16_weights() -> None:
    model, average = nn.Linear(1, 1, bias=False).to(torch.bfloat16), MovingAverage(0.9)
    expected = None
    assert average.weights() == {}
    for step, value in enumerate((1.0, 2.0, 4.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.after_update(model, step)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
        average = restored(lambda: MovingAverage(0.9), average.state())
    assert average.weights()["weight"].dtype == torch.float32
    assert average.weights()["weight"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moving_average_is_that_of_each_tensor_by_itself_to_the_bit(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype)
    average = MovingAverage(0.99)
    expected: list[torch.Tensor] = []
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        now = [parameter.detach().float().clone() for parameter in model.parameters()]
        expected = [torch.lerp(a, b, 1.0 - 0.99) for a, b in zip(expected, now, strict=True)] if step else now
        average.after_update(model, step)
    assert all(torch.equal(a, b) for a, b in zip(average.weights().values(), expected, strict=True))


def results(score: float) -> list[Result]:
    return [Result("x", "set", {"top1": score}, 5)]


@pytest.mark.parametrize(("tie", "kept"), [("earlier", (1.0, 10)), ("later", (2.0, 30))])
def test_the_best_weights_are_a_copy_and_follow_the_rule_for_ties(tie: Any, kept: tuple[float, int]) -> None:
    def make() -> Best:
        return Best("best", lambda found: found[0].metrics["top1"], tie=tie, after_step=5)

    best, model = make(), nn.Linear(1, 1, bias=False)
    for step, value, score in ((5, 9.0, 0.9), (10, 1.0, 0.5), (20, 2.0, 0.4), (30, 2.0, 0.5)):
        with torch.no_grad():
            model.weight.fill_(value)
        assert not best.after_evaluation(model, results(score), step)
    again = restored(make, best.state())
    assert (again.weights()["weight"].item(), again.score, again.step) == (kept[0], 0.5, kept[1])
    again.after_evaluation(model, results(0.6), 40)
    assert again.step == 40


def test_only_trained_tensors_are_held_and_running_statistics_when_asked_for() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[0].requires_grad_(False)
    assert set(trainable(module)) == {"1.weight", "1.bias"}
    assert set(trainable(module, buffers=True)) == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    best = Best("best", lambda found: 1.0, tie="later")
    best.after_evaluation(module, [], 1)
    assert set(best.weights()) == {*trainable(module, buffers=True), "1.num_batches_tracked"}


def test_a_student_uses_other_weights_and_takes_its_own_back_whatever_happens() -> None:
    student: Any = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1)).bfloat16()
    student[0].weight.master = torch.full((1, 2), 7.0)
    before = student[0].weight.data_ptr()
    with (
        pytest.raises(ZeroDivisionError),
        using(student, {"0.weight": torch.ones(2), "1.running_mean": torch.ones(1)}),
    ):
        assert student[0].weight.tolist() == [[1.0, 1.0]] and student[1].running_mean.item() == 1.0
        assert trainable(student)["0.weight"].tolist() == [[1.0, 1.0]]  # what is kept now is what is used now
        raise ZeroDivisionError
    assert student[0].weight.data_ptr() == before and student[1].running_mean.item() == 0.0
    assert trainable(student)["0.weight"].tolist() == [[7.0, 7.0]]
    whole = completed({"a": torch.tensor(1.0), "b": torch.zeros(2)}, {"a": torch.tensor([5.0])})
    assert whole["a"].shape == () and whole["a"].item() == 5.0 and whole["b"].tolist() == [0.0, 0.0]


def test_a_moving_average_reads_the_master_weights_of_a_half_precision_student() -> None:
    student: Any = nn.Linear(3, 2).bfloat16()
    average = MovingAverage(0.9)
    expected = []
    for number in range(3):
        for parameter in student.parameters():
            parameter.master = torch.full(parameter.shape, 1 + 1e-4 * number)  # bf16 rounds each of them to 1
            parameter.data.fill_(1.0)
        average.after_update(student, number)
        found = trainable(student)
        assert all(torch.equal(found[name], p.master) for name, p in student.named_parameters())
        expected.append(1 + 1e-4 * number)
    wanted = 0.9 * (0.9 * expected[0] + 0.1 * expected[1]) + 0.1 * expected[2]
    for value in average.weights().values():
        torch.testing.assert_close(value, torch.full_like(value, wanted), rtol=0, atol=2e-7)
