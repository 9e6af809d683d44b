"""Temperature KL against hand-worked numbers, float64 loops and torch's own divergence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.losses.logits import kl_divergence


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """KL(teacher || student) summed over classes and positions, without the temperature^2."""

    def log_softmax(row: Tensor) -> list[float]:
        values = [float(x) / temperature for x in row]
        total = math.log(sum(map(math.exp, values)))
        return [x - total for x in values]

    total = 0.0
    for s, t in zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True):
        total += sum(math.exp(b) * (b - a) for a, b in zip(log_softmax(s), log_softmax(t), strict=True))
    return total


def test_hand_worked() -> None:
    # Teacher (3/4, 1/4), student (1/2, 1/2).
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(student, teacher).item() == pytest.approx(forward, abs=1e-14)
    assert kl_divergence(student, teacher, reduction="element").item() == pytest.approx(
        forward / 2, abs=1e-14
    )
    # Logits twice as large at temperature 2 are the same distributions; the factor is 4.
    assert kl_divergence(student, 2 * teacher, 2.0).item() == pytest.approx(4 * forward, abs=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_equals_loops_and_torch(temperature: float, shape: tuple[int, ...]) -> None:
    student, teacher = logits(0, *shape), logits(1, *shape)
    positions = math.prod(shape[:-1])
    factor = temperature**2 / positions
    forward = factor * loops(student, teacher, temperature)
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(forward, abs=1e-12)
    logs = [(x / temperature).log_softmax(-1).flatten(0, -2) for x in (student, teacher)]
    library = F.kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(library.item(), abs=1e-12)
    per_element = F.kl_div(*logs, reduction="none", log_target=True).mean() * temperature**2
    found = kl_divergence(student, teacher, temperature, reduction="element")
    assert found.item() == pytest.approx(per_element.item(), abs=1e-12)


@pytest.mark.parametrize("reduction", ["batch", "element"])
def test_mask_counts_only_true_positions(reduction: str) -> None:
    student, teacher = logits(0, 2, 4, 5).requires_grad_(), logits(1, 2, 4, 5)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    options = {"reduction": reduction}
    loss = kl_divergence(student, teacher, 2.0, mask=mask, **options)
    kept = [(b, t) for b in range(2) for t in range(4) if mask[b, t]]
    each = [kl_divergence(student[b, t], teacher[b, t], 2.0, **options).item() for b, t in kept]
    assert loss.item() == pytest.approx(sum(each) / 3, abs=1e-12)
    loss.backward()
    assert torch.equal(student.grad.abs().sum(-1) > 0, mask)
    nothing = kl_divergence(student, teacher, mask=torch.zeros_like(mask), **options)
    nothing.backward()
    assert nothing.item() == 0


def test_gradcheck_zero_when_equal_and_no_teacher_gradient() -> None:
    student, teacher = logits(0, 3, 4).requires_grad_(), logits(1, 3, 4).requires_grad_()
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s, fixed, 2.0), (student,))
    kl_divergence(student, teacher).backward()
    assert teacher.grad is None
    assert kl_divergence(student, student, 3.0).item() == pytest.approx(0, abs=1e-15)
    assert kl_divergence(student, teacher).item() > 0


def test_large_and_half_precision_logits() -> None:
    # (1, 0) against (0, 1) at logit distance 1000: KL is 1000, also when exp underflows.
    student, teacher = torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]])
    assert kl_divergence(student, teacher).item() == pytest.approx(1000)
    half = kl_divergence(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(1000)


def test_bad_arguments_are_named() -> None:
    student, teacher = logits(0, 3, 4), logits(1, 3, 4)
    with pytest.raises(ValueError, match="logits: student .*teacher"):
        kl_divergence(student, teacher[:1])
    with pytest.raises(ValueError, match="temperature is 0"):
        kl_divergence(student, teacher, 0)
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        kl_divergence(student, teacher, reduction="mean")
