"""DHO's losses against float64 sums written out, and PCGrad against its vector form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from projects.dho import objective

GENERATOR = np.random.default_rng(7)
ROWS, LABELLED, CLASSES = 7, 3, 5


def logits() -> np.ndarray:
    """Logits [7, 5] of realistic size."""
    return 4 * GENERATOR.standard_normal((ROWS, CLASSES))


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Row-wise, in float64."""
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_cross_entropy_is_the_mean_of_minus_log_p() -> None:
    x, labels = logits(), np.array([1, 0, 4, 2, 2, 3, 1])
    expected = -np.mean([log_softmax(x)[i, label] for i, label in enumerate(labels)])
    assert objective.cross_entropy(torch.tensor(x), torch.tensor(labels)).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_distillation_adds_the_means_of_both_parts_with_the_teacher_as_target() -> None:
    student, teacher = logits(), logits()
    t, s = log_softmax(teacher / 2), log_softmax(student / 2)
    rows = 4 * (np.exp(t) * (t - s)).sum(1)
    expected = rows[:LABELLED].mean() + rows[LABELLED:].mean()
    loss = objective.distillation(torch.tensor(student), torch.tensor(teacher), LABELLED)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() != pytest.approx(2 * rows.mean(), rel=1e-3)


def test_a_part_without_rows_is_left_out() -> None:
    student, teacher = torch.tensor(logits()), torch.tensor(logits())
    whole = objective.distillation(student, teacher, 0)
    assert whole == objective.distillation(student, teacher, ROWS)
    assert torch.isfinite(whole)


def test_feature_distillation_adds_squared_distances_of_both_parts() -> None:
    student, teacher = logits(), logits()
    squares = ((student - teacher) ** 2).sum(1)
    loss = objective.feature_distillation(torch.tensor(student), torch.tensor(teacher), LABELLED)
    assert loss.item() == pytest.approx(squares[:3].mean() + squares[3:].mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "balance", "expected"),
    [
        ("dho", "convex", {"ce": 0.3, "kd": 0.7}),
        ("dho", "sum", {"ce": 1.0, "kd": 1.0}),
        ("ce", "convex", {"ce": 1.0}),
        ("kd", "convex", {"kd": 1.0}),
        ("ce_kd", "convex", {"ce": 0.3, "kd": 0.7}),
        ("pcgrad", "sum", {"ce": 1.0, "kd": 1.0}),
        ("kd_feature", "convex", {"feature": 1.0}),
        ("ce_kd_feature", "convex", {"ce": 0.3, "feature": 0.7}),
    ],
)
def test_term_weights(
    method: objective.Method, balance: objective.Balance, expected: dict[str, float]
) -> None:
    assert objective.term_weights(method, 0.3, balance) == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_surgery_weights_give_the_sum_of_the_projected_gradients(sign: float) -> None:
    one = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    other = sign * torch.tensor([0.5, 0.2, -2.0], dtype=torch.float64)
    dot = one @ other
    expected = one + other
    if dot < 0:
        expected = (one - dot / (other @ other) * other) + (other - dot / (one @ one) * one)
    a, b = objective.surgery_weights(dot, one @ one, other @ other)
    torch.testing.assert_close(a * one + b * other, expected)
    assert ((a, b) == (1, 1)) == (sign > 0)


def test_surgery_of_a_vanished_gradient_changes_nothing() -> None:
    zero, square = torch.tensor(0.0), torch.tensor(2.0)
    assert objective.surgery_weights(zero, zero, square) == (1, 1)
