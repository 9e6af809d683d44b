"""Affinity mimicking against hand-worked numbers, float64 loops, open_clip, and its dense form."""

from __future__ import annotations

import math

import numpy as np
import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.losses.live_bytes import LiveBytes
from vlmkd.losses.affinity import PairEmbeds, affinity_loss


def unit(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def problem(
    rows: int, columns: int, width: int, teacher_widths: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Tensor], list[PairEmbeds]]:
    """Student leaves (gathered columns only when columns > rows) and teachers with scales 10, 15, ..."""
    generator = torch.Generator().manual_seed(seed)
    names = ["image_embeds", "text_embeds"]
    gathered = ["all_image_embeds", "all_text_embeds"] if columns > rows else []
    leaves = {name: unit(generator, rows, width, dtype=dtype) for name in names}
    leaves |= {name: unit(generator, columns, width, dtype=dtype) for name in gathered}
    leaves["logit_scale"] = torch.tensor(12.5, dtype=dtype)
    teachers = []
    for index, teacher_width in enumerate(teacher_widths):
        parts = [unit(generator, rows, teacher_width, dtype=dtype) for _ in range(2)]
        parts += [unit(generator, columns, teacher_width, dtype=dtype) for _ in gathered]
        teachers.append(PairEmbeds(parts[0], parts[1], 10.0 + 5 * index, *parts[2:]))
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, teachers


def oracle(leaves: dict[str, Tensor], teachers: list[PairEmbeds]) -> tuple[float, list[float]]:
    """ce of the 1/2 form, and kl of either direction, by loops over single numbers."""

    def numpy(x: Tensor) -> np.ndarray:
        return x.detach().double().numpy()

    def log_softmax(scale: float, row: np.ndarray, columns: np.ndarray) -> list[float]:
        logits = [scale * float(np.dot(row, column)) for column in columns]
        total = math.log(sum(math.exp(x) for x in logits))
        return [x - total for x in logits]

    ce, kl = 0.0, [0.0, 0.0]
    for direction, (here, there) in enumerate((("image", "text"), ("text", "image"))):
        rows = numpy(leaves[f"{here}_embeds"])
        columns = numpy(leaves.get(f"all_{there}_embeds", leaves[f"{there}_embeds"]))
        for i in range(len(rows)):
            student = log_softmax(leaves["logit_scale"].item(), rows[i], columns)
            target = [0.0] * len(columns)
            for teacher in teachers:
                values = teacher._asdict()
                gathered = values[f"all_{there}_embeds"]
                others = numpy(values[f"{there}_embeds"] if gathered is None else gathered)
                logs = log_softmax(float(teacher.logit_scale), numpy(values[f"{here}_embeds"])[i], others)
                target = [t + math.exp(x) / len(teachers) for t, x in zip(target, logs, strict=True)]
            ce -= sum(t * s for t, s in zip(target, student, strict=True)) / len(rows) / 2
            kl[direction] += sum(t * (math.log(t) - s) for t, s in zip(target, student, strict=True)) / len(
                rows
            )
    return ce, kl


def gradients(
    leaves: dict[str, Tensor], teachers: list[PairEmbeds], which: str = "ce", **options
) -> list[Tensor]:
    loss = getattr(affinity_loss(**leaves, teachers=teachers, **options), which)
    return list(torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("chunk", [0, 2, 8])
def test_hand_worked_two_by_two(chunk: int) -> None:
    # Student logits [[ln 3, 0], [0, 0]]: rows (3/4, 1/4), (1/2, 1/2); the matrix is symmetric, so columns are the same.
    # Teacher logits all 0: every target is (1/2, 1/2), whose entropy is ln 2.
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    loss = affinity_loss(student, student, math.log(3), [PairEmbeds(zeros, zeros, 1.0)], chunk=chunk)
    ce = (-0.5 * math.log(3 / 16) + math.log(2)) / 2
    assert loss.ce.item() == pytest.approx(ce, abs=1e-14)
    assert loss.kl.item() == pytest.approx(ce - math.log(2), abs=1e-14)


@pytest.mark.parametrize("chunk", [0, 3, 100])
@pytest.mark.parametrize("columns", [5, 10])
@pytest.mark.parametrize("teacher_widths", [(7,), (7, 3), (4, 4, 2)])
def test_equals_float64_loops(chunk: int, columns: int, teacher_widths: tuple[int, ...]) -> None:
    leaves, teachers = problem(5, columns, 4, teacher_widths, torch.float64)
    loss = affinity_loss(**leaves, teachers=teachers, chunk=chunk)
    ce, kl = oracle(leaves, teachers)
    assert loss.ce.item() == pytest.approx(ce, abs=1e-12)
    assert loss.kl.item() == pytest.approx(sum(kl) / 2, abs=1e-12)
    assert loss.directions.tolist() == pytest.approx(kl, abs=1e-12) and not loss.directions.requires_grad
    assert affinity_loss(
        **leaves, teachers=teachers, chunk=chunk, reduction="sum"
    ).ce.item() == pytest.approx(2 * ce)


@pytest.mark.parametrize("chunk", [0, 4])
def test_equals_open_clip_distill_term(chunk: int) -> None:
    leaves, teachers = problem(9, 9, 6, (8,), torch.float64)
    image, text, scale = leaves.values()
    _, reference = open_clip.loss.DistillClipLoss()(
        image, text, scale, teachers[0].image_embeds, teachers[0].text_embeds, teachers[0].logit_scale
    )
    assert affinity_loss(**leaves, teachers=teachers, chunk=chunk).ce.item() == pytest.approx(
        reference.item(), abs=1e-12
    )
    for ours, theirs in zip(
        gradients(leaves, teachers, chunk=chunk),
        torch.autograd.grad(reference, [image, text, scale]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 7), (33, 33), (13, 39), (31, 62)])
@pytest.mark.parametrize("teacher_widths", [(24,), (24, 8)])
@pytest.mark.parametrize("chunk", [1, 2, 10, 16, 1000])
def test_chunked_equals_dense_float32(
    rows: int, columns: int, teacher_widths: tuple[int, ...], chunk: int
) -> None:
    leaves, teachers = problem(rows, columns, 16, teacher_widths, torch.float32)
    dense = affinity_loss(**leaves, teachers=teachers)
    chunked = affinity_loss(**leaves, teachers=teachers, chunk=chunk)
    torch.testing.assert_close(chunked, dense, rtol=1e-6, atol=1e-6)
    for reduction in ("half", "sum"):
        expected = gradients(leaves, teachers, reduction=reduction)
        found = gradients(leaves, teachers, reduction=reduction, chunk=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 64])
def test_float32_is_near_float64_at_scale_100(chunk: int) -> None:
    leaves, teachers = problem(96, 96, 32, (32,), torch.float32)
    leaves["logit_scale"] = torch.tensor(100.0, requires_grad=True)
    teachers = [teachers[0]._replace(logit_scale=100.0)]
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    wide_teachers = [PairEmbeds(teachers[0].image_embeds.double(), teachers[0].text_embeds.double(), 100.0)]
    loss = affinity_loss(**leaves, teachers=teachers, chunk=chunk)
    exact = affinity_loss(**wide, teachers=wide_teachers)
    torch.testing.assert_close(loss.ce.double(), exact.ce, rtol=2e-6, atol=0)
    for found, expected in zip(
        gradients(leaves, teachers, chunk=chunk), gradients(wide, wide_teachers), strict=True
    ):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("chunk", [0, 2, 9])
@pytest.mark.parametrize("columns", [4, 8])
def test_gradcheck(chunk: int, columns: int) -> None:
    leaves, teachers = problem(4, columns, 3, (5, 2), torch.float64)
    names = list(leaves)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(affinity_loss(**dict(zip(names, values, strict=True)), teachers=teachers, chunk=chunk))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("chunk", [0, 4])
def test_gradient_through_log_scale(chunk: int) -> None:
    leaves, teachers = problem(6, 6, 4, (4,), torch.float64)
    log_scale = torch.tensor([math.log(12.5)], dtype=torch.float64, requires_grad=True)

    def function(theta: Tensor) -> Tensor:
        leaves["logit_scale"] = theta.exp()
        return affinity_loss(**leaves, teachers=teachers, chunk=chunk).ce

    assert torch.autograd.gradcheck(function, (log_scale,))


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("columns", [6, 12])
def test_ce_and_kl_have_one_gradient(chunk: int, columns: int) -> None:
    leaves, teachers = problem(6, columns, 4, (5,), torch.float64)
    by_ce = gradients(leaves, teachers, "ce", chunk=chunk)
    by_kl = gradients(leaves, teachers, "kl", chunk=chunk)
    torch.testing.assert_close(by_ce, by_kl, rtol=0, atol=1e-15)
    assert all(gradient.abs().sum() > 0 for gradient in by_ce)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("columns", [6, 12])
def test_kl_and_gradient_vanish_when_student_is_teacher(chunk: int, columns: int) -> None:
    leaves, _ = problem(6, columns, 4, (), torch.float64)
    teacher = PairEmbeds(**{name: leaf.detach() for name, leaf in leaves.items()})
    assert affinity_loss(**leaves, teachers=[teacher, teacher], chunk=chunk).kl.item() == pytest.approx(
        0, abs=1e-14
    )
    for gradient in gradients(leaves, [teacher], chunk=chunk):
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("chunk", [0, 3])
def test_order_of_pairs_does_not_matter(chunk: int) -> None:
    leaves, teachers = problem(7, 7, 4, (5,), torch.float64)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = {name: leaf[order] if leaf.ndim else leaf for name, leaf in leaves.items()}
    moved_teacher = PairEmbeds(teachers[0].image_embeds[order], teachers[0].text_embeds[order], 10.0)
    expected = affinity_loss(**leaves, teachers=teachers, chunk=chunk)
    torch.testing.assert_close(
        affinity_loss(**moved, teachers=[moved_teacher], chunk=chunk), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("chunk", [0, 4])
def test_teacher_gets_no_gradient_and_half_precision_is_widened(chunk: int) -> None:
    leaves, teachers = problem(6, 6, 4, (5,), torch.float32)
    teacher = PairEmbeds(
        teachers[0].image_embeds.requires_grad_(),
        teachers[0].text_embeds,
        torch.tensor(10.0, requires_grad=True),
    )
    half = {name: leaf.detach().bfloat16().requires_grad_() for name, leaf in leaves.items()}
    half["logit_scale"] = leaves["logit_scale"]
    same = {name: leaf.detach().float().requires_grad_() for name, leaf in half.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = affinity_loss(**half, teachers=[teacher], chunk=chunk)
    assert loss.ce.dtype == torch.float32
    assert torch.equal(loss.ce, affinity_loss(**same, teachers=[teacher], chunk=chunk).ce)
    loss.ce.backward()
    assert teacher.image_embeds.grad is None and teacher.logit_scale.grad is None
    assert half["image_embeds"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk", [0, 4])
def test_teacher_in_inference_mode(chunk: int) -> None:
    leaves, teachers = problem(6, 12, 4, (5, 3), torch.float64)
    with torch.inference_mode():
        copies = [PairEmbeds(*(1.0 * value for value in teacher)) for teacher in teachers]
    torch.testing.assert_close(
        gradients(leaves, copies, chunk=chunk), gradients(leaves, teachers, chunk=chunk), rtol=0, atol=1e-15
    )


def test_only_needed_gradients() -> None:
    leaves, teachers = problem(6, 12, 4, (5,), torch.float64)
    expected = dict(zip(leaves, gradients(leaves, teachers), strict=True))
    for name in leaves:
        wanted = (name, f"all_{name}")  # local rows never come without their columns
        alone = {key: leaf.detach().requires_grad_(key in wanted) for key, leaf in leaves.items()}
        affinity_loss(**alone, teachers=teachers, chunk=5).ce.backward()
        for key, leaf in alone.items():
            if key in wanted:
                torch.testing.assert_close(leaf.grad, expected[key])
            else:
                assert leaf.grad is None
    with torch.no_grad():
        assert not affinity_loss(**leaves, teachers=teachers, chunk=5).ce.requires_grad


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returned, in the forward and the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.mark.parametrize(("rows", "columns"), [(512, 512), (256, 512)])
@pytest.mark.parametrize("teacher_widths", [(8,), (8, 8)])
def test_chunked_memory_fits_the_budget(rows: int, columns: int, teacher_widths: tuple[int, ...]) -> None:
    chunk, width = 40, 8
    leaves, teachers = problem(rows, columns, width, teacher_widths, torch.float32)
    budget = 2 * chunk * columns * 4
    features = (
        4 * (rows + columns) * width * 4
    )  # gradients, scaled rows, and what autograd adds while it sums
    with LiveBytes() as live:
        gradients(leaves, teachers, chunk=chunk)
    with Largest() as largest:
        gradients(leaves, teachers, chunk=chunk)
    assert largest.bytes <= budget / 2
    assert budget / 2 < live.peak <= budget + features
    # The measures see what they should: the dense form keeps several whole blocks.
    with LiveBytes() as live:
        gradients(leaves, teachers)
    with Largest() as largest:
        gradients(leaves, teachers)
    assert largest.bytes >= rows * columns * 4
    assert live.peak >= 4 * rows * columns * 4


def test_bad_arguments_are_named() -> None:
    leaves, teachers = problem(6, 12, 4, (5,), torch.float32)
    with pytest.raises(ValueError, match="teachers is empty"):
        affinity_loss(**leaves, teachers=[])
    with pytest.raises(ValueError, match="chunk is -1"):
        affinity_loss(**leaves, teachers=teachers, chunk=-1)
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        affinity_loss(**leaves, teachers=teachers, reduction="mean")
    with pytest.raises(ValueError, match="gathered embeddings must be given"):
        affinity_loss(**leaves, teachers=[teachers[0]._replace(all_image_embeds=None)])
    with pytest.raises(ValueError, match="row counts differ"):
        affinity_loss(**leaves, teachers=[teachers[0]._replace(image_embeds=teachers[0].image_embeds[:5])])


@pytest.mark.parametrize("name", ["image", "text"])
@pytest.mark.parametrize("chunk", [0, 4])
def test_gathered_columns_without_their_gradient_are_refused(name: str, chunk: int) -> None:
    leaves, teachers = problem(6, 12, 4, (5,), torch.float32)
    cut = {**leaves, f"all_{name}_embeds": leaves[f"all_{name}_embeds"].detach()}
    with pytest.raises(ValueError, match=f"all_{name}_embeds carries no gradient"):
        affinity_loss(**cut, teachers=teachers, chunk=chunk)
    with torch.no_grad():  # an evaluation's columns, and a frozen tower's, need none
        affinity_loss(**cut, teachers=teachers, chunk=chunk)
    affinity_loss(**{**cut, f"{name}_embeds": leaves[f"{name}_embeds"].detach()}, teachers=teachers)
