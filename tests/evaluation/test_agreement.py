"""Teacher-student agreement against NumPy and SciPy-free formulas in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.agreement import Agreement, agreement
from vlmkd.datasets.evaluation_sets import zero_shot_set
from vlmkd.evaluation.base import Context

from .conftest import Encoder, tiny_clip


def test_against_numpy() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.uniform(-1, 1, (40, 6))
    student = 0.5 * teacher + 0.5 * rng.uniform(-1, 1, (40, 6))
    found = agreement(torch.tensor(teacher), torch.tensor(student), 20.0, 10.0)
    p, q = np.exp(20 * teacher), np.exp(10 * student)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-12)
    assert found["affinity_correlation"] == pytest.approx(
        np.corrcoef(teacher.ravel(), student.ravel())[0, 1], rel=1e-12
    )
    assert found["agreement_top1"] == (teacher.argmax(1) == student.argmax(1)).mean()


def test_hand_worked() -> None:
    """Two classes, one image: teacher (3/4, 1/4), student (1/2, 1/2)."""
    found = agreement(torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]]), 1.0, 1.0)
    assert found["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["affinity_correlation"] == 0.0


def test_a_model_agrees_with_itself_and_less_with_another(
    encoder: Encoder, class_folders: Path, context: Context
) -> None:
    evaluator = Agreement(encoder, zero_shot_set(str(class_folders), templates="simple"))
    (same,) = evaluator.run(encoder, context)
    (other,) = evaluator.run(Encoder(tiny_clip(1), name="other"), context)
    assert same.metrics["agreement_top1"] == 1 and same.metrics["kl"] == pytest.approx(0, abs=1e-12)
    assert same.metrics["affinity_correlation"] == pytest.approx(1)
    assert other.metrics["agreement_top1"] < 1 and other.metrics["kl"] > 0.01
    assert abs(other.metrics["affinity_correlation"]) < 0.9 and other.count == 96
