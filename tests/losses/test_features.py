"""Feature losses against hand-worked numbers and float64 loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.losses.features import feature_distillation_loss, l2_loss

LOSSES = [feature_distillation_loss, l2_loss]


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hand_worked() -> None:
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # Squared distances 16 and 5.
    assert l2_loss(student, teacher).item() == pytest.approx(10.5, abs=1e-14)
    assert feature_distillation_loss(student, teacher).item() == pytest.approx(5.25, abs=1e-14)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_equal_loops(shape: tuple[int, ...]) -> None:
    student, teacher = features(0, *shape), features(1, *shape)
    pairs = list(zip(student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist(), strict=True))
    squared = [sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) for s, t in pairs]
    assert l2_loss(student, teacher).item() == pytest.approx(sum(squared) / len(pairs), abs=1e-12)
    fd = feature_distillation_loss(student, teacher).item()
    assert fd == pytest.approx(sum(squared) / len(pairs) / shape[-1], abs=1e-12)


def test_unit_vectors_relate_them_to_the_cosine() -> None:
    student, teacher = (F.normalize(features(seed, 6, 8), dim=-1) for seed in (0, 1))
    cosine = 1 - (student * teacher).sum(-1).mean().item()
    assert feature_distillation_loss(student, teacher).item() == pytest.approx(2 * cosine / 8, abs=1e-12)
    assert l2_loss(student, teacher).item() == pytest.approx(2 * cosine, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_order_equality_and_teacher(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = features(0, 4, 3).requires_grad_(), features(1, 4, 3).requires_grad_()
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda s: loss(s, fixed), (student,))
    loss(student, teacher).backward()
    assert teacher.grad is None
    order = torch.tensor([2, 0, 3, 1])
    assert loss(student[order], teacher[order]).item() == pytest.approx(
        loss(student, teacher).item(), abs=1e-14
    )
    assert loss(student, student).item() == pytest.approx(0, abs=1e-14)
    assert loss(student.detach().bfloat16(), fixed.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"student features \[4, 3\], teacher features \[1, 3\]"):
        loss(student, teacher[:1])


@pytest.mark.parametrize("loss", LOSSES)
def test_teacher_in_inference_mode(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, fixed = features(0, 4, 3).requires_grad_(), features(1, 4, 3)
    with torch.inference_mode():
        teacher = 1.0 * fixed
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    assert torch.equal(gradient, *torch.autograd.grad(loss(student, fixed), student))
