"""CLIP-KD's terms against hand-worked numbers, float64 loops and the CLIP loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.tinyclip.objective import feature_distillation_loss, interactive_contrastive_loss
from vlmkd.losses.affinity import PairEmbeds
from vlmkd.losses.contrastive import clip_loss


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int, *shape: int) -> Tensor:
    return F.normalize(drawn(seed, *shape), dim=-1)


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return 1.0 * x


def cross_entropy_loops(rows: Tensor, columns: Tensor, scale: float, offset: int) -> float:
    total = 0.0
    for i, row in enumerate(rows.numpy()):
        logits = [scale * float(np.dot(row, column)) for column in columns.numpy()]
        total += math.log(sum(map(math.exp, logits))) - logits[offset + i]
    return total / len(rows)


# -------------------------------------------------------------------------------------------- feature distillation


def test_feature_distillation_hand_worked() -> None:
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # Squared distances 16 and 5.
    assert feature_distillation_loss(student, teacher).item() == pytest.approx(5.25, abs=1e-14)


def test_feature_distillation_equals_loops_and_the_cosine() -> None:
    student, teacher = unit(0, 6, 8), unit(1, 6, 8)
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    squared = [(a - b) ** 2 for s, t in pairs for a, b in zip(s, t, strict=True)]
    loss = feature_distillation_loss(student, teacher).item()
    assert loss == pytest.approx(sum(squared) / 48, abs=1e-12)
    cosine = (student * teacher).sum(-1).mean().item()
    assert loss == pytest.approx(2 * (1 - cosine) / 8, abs=1e-12)


def test_feature_distillation_gradcheck_order_equality_and_teacher() -> None:
    student, teacher = drawn(0, 4, 3).requires_grad_(), drawn(1, 4, 3).requires_grad_()
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda s: feature_distillation_loss(s, fixed), (student,))
    loss = feature_distillation_loss(student, teacher)
    loss.backward()
    assert teacher.grad is None
    order = torch.tensor([2, 0, 3, 1])
    moved = feature_distillation_loss(student[order], teacher[order])
    assert moved.item() == pytest.approx(loss.item(), abs=1e-14)
    assert feature_distillation_loss(student, student).item() == pytest.approx(0, abs=1e-14)
    assert feature_distillation_loss(student.detach().bfloat16(), fixed.bfloat16()).dtype == torch.float32
    (gradient,) = torch.autograd.grad(feature_distillation_loss(student, in_inference_mode(fixed)), student)
    assert torch.equal(gradient, student.grad)


# ------------------------------------------------------------------------------------------ interactive contrastive


@pytest.mark.parametrize("offset", [0, 2, 5])
def test_interactive_on_gathered_keys_equals_loops(offset: int) -> None:
    images, texts, teacher_images, teacher_texts = (unit(seed, 9, 4) for seed in range(4))
    part = slice(offset, offset + 4)
    image, text = images[part], texts[part]
    teacher = PairEmbeds(teacher_images[part], teacher_texts[part], 1.0, teacher_images, teacher_texts)
    ways = [(image, teacher_texts), (text, teacher_images)]
    expected = sum(cross_entropy_loops(*way, 7, offset) for way in ways) / 2
    loss = interactive_contrastive_loss(image, text, teacher, 7.0, offset)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_interactive_gradcheck_and_order() -> None:
    image, text = unit(0, 6, 3).requires_grad_(), unit(1, 6, 3).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    keys = unit(2, 6, 3), unit(3, 6, 3)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return interactive_contrastive_loss(image, text, PairEmbeds(*keys, 1.0), scale)

    assert torch.autograd.gradcheck(loss, (image, text, scale))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5))
    teacher = PairEmbeds(*(key[order] for key in keys), 1.0)
    moved = interactive_contrastive_loss(image[order], text[order], teacher, scale)
    assert moved.item() == pytest.approx(loss(image, text, scale).item(), abs=1e-12)


def test_interactive_is_clip_when_teacher_is_student_and_teacher_gets_no_gradient() -> None:
    image, text = unit(0, 6, 4), unit(1, 6, 4).requires_grad_()
    loss = interactive_contrastive_loss(image, text, PairEmbeds(image, text, 1.0), 8.0)
    assert loss.item() == pytest.approx(clip_loss(image, text, 8.0).item(), abs=1e-12)
    teacher = unit(2, 6, 4).requires_grad_()
    interactive_contrastive_loss(image, text, PairEmbeds(teacher, teacher, 1.0), 8.0).backward()
    assert teacher.grad is None and text.grad is not None


def test_interactive_with_teacher_in_inference_mode() -> None:
    image, fixed = unit(0, 6, 4).requires_grad_(), unit(1, 6, 4)
    teachers = [PairEmbeds(keys, keys, 1.0) for keys in (fixed, in_inference_mode(fixed))]
    losses = [interactive_contrastive_loss(image, fixed, teacher, 8.0) for teacher in teachers]
    assert torch.equal(*(torch.autograd.grad(loss, image)[0] for loss in losses))
