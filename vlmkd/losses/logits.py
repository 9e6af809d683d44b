"""Losses between logits of a student and a teacher.

Letters: C classes, `...` any leading dimensions, whose product is the number of positions.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlmkd.losses.precision import wide


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    reduction: Literal["batch", "element"] = "batch",
    mask: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of tempered softmax distributions [..., C], times temperature^2 (Hinton et al. 2015).

    The factor keeps the gradient's size independent of the temperature. No gradient reaches the teacher. Other
    divergences, and logits that do not fit, are in `vlmkd/losses/tokens.py`.

    Args:
        reduction: `batch` sums over classes and averages over positions; `element` also divides by C (PromptKD).
        mask: bool [...]; only True positions count, in the mean too. No True position gives 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits: student {[*student_logits.shape]}, teacher {[*teacher_logits.shape]}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if reduction not in ("batch", "element"):
        raise ValueError(f"reduction is {reduction!r}; choose batch or element")
    if mask is not None:
        # Selecting first spares the softmax of the other positions, and their memory.
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    student = (wide(student_logits) / temperature).log_softmax(-1)
    teacher = (wide(teacher_logits.detach()) / temperature).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum()
    count = student.numel() if reduction == "element" else student[..., 0].numel()
    return divergence * temperature**2 / max(count, 1)
