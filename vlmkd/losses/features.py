"""Losses between feature vectors of a student and a teacher of the same width.

Letters: D width, `...` any leading dimensions, whose product is the number of positions. Computed in float32
(float64 stays float64); no gradient reaches the teacher.
"""

from __future__ import annotations

from torch import Tensor

from vlmkd.losses.precision import wide


def feature_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error, mean over positions and over D (CLIP-KD, FD). Both [..., D] unit vectors.

    For unit vectors this is 2 (1 - cosine) / D, so the weight that goes with it is large (CLIP-KD: 2000).
    """
    student, teacher = _pair(student, teacher)
    # Not mse_loss, which saves the teacher's features; autograd refuses to when they come from inference mode.
    return (student - teacher).square().mean()


def l2_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance, summed over D, mean over positions. Both [..., D]."""
    student, teacher = _pair(student, teacher)
    return (student - teacher).square().sum(-1).mean()


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(f"student features {list(student.shape)}, teacher features {list(teacher.shape)}")
    return wide(student), wide(teacher).detach()
