"""Losses between logits of a student and a teacher.

Letters: C classes (or vocabulary), `...` any leading dimensions, whose product is the number of positions.
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
    direction: Literal["forward", "reverse", "symmetric"] = "forward",
    mask: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of tempered softmax distributions, times temperature^2 (Hinton et al. 2015).

    The factor keeps the size of the gradient independent of the temperature. Computed in float32 (float64 stays).

    Args:
        student_logits: [..., C].
        teacher_logits: [..., C], finite; no gradient reaches them.
        temperature: divides both logits; positive.
        reduction: `batch` sums over classes and averages over positions; `element` also divides by C (PromptKD).
        direction: `forward` KL(teacher || student), `reverse` KL(student || teacher), `symmetric` half of each.
        mask: bool [...]; only True positions count, in the mean too. No True position gives 0.

    Raises:
        ValueError: shapes differ, temperature not positive, unknown reduction or direction.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {list(student_logits.shape)}, teacher logits {list(teacher_logits.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if reduction not in ("batch", "element"):
        raise ValueError(f"reduction is {reduction!r}; choose batch or element")
    if direction not in ("forward", "reverse", "symmetric"):
        raise ValueError(f"direction is {direction!r}; choose forward, reverse or symmetric")
    if mask is not None:
        # Selecting first spares the softmax of prompt and padding positions, and their memory.
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    student = _log_softmax(student_logits, temperature)
    teacher = _log_softmax(teacher_logits.detach(), temperature)
    if direction == "symmetric":
        divergence = ((teacher.exp() - student.exp()) * (teacher - student)).sum() / 2
    elif direction == "reverse":
        divergence = (student.exp() * (student - teacher)).sum()
    else:
        divergence = (teacher.exp() * (teacher - student)).sum()
    classes = student.shape[-1]
    positions = max(student.numel() // classes, 1)
    return divergence * temperature**2 / (positions * (classes if reduction == "element" else 1))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (wide(logits) / temperature).log_softmax(-1)
