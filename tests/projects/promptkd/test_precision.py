"""fp16 towers: gradients of any size against fp32, and where fp16 is refused."""

from __future__ import annotations

import pytest
import torch

from projects.promptkd.build import student_job, teacher_job
from projects.promptkd.precision import autocast, encode
from projects.promptkd.prompts import PromptedCLIP, PromptShape, class_tokens
from projects.promptkd.student import PromptedStudent
from projects.promptkd.task import TeacherNet
from tests.projects.promptkd import tiny
from tests.projects.promptkd.test_recipes import load
from vlmkd.errors import UserError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def gradients(module: torch.nn.Module, outputs: list[torch.Tensor], weight: float) -> dict[str, torch.Tensor]:
    """Of weight times a sum over the outputs, divided by the weight again."""
    module.zero_grad()
    generator = torch.Generator().manual_seed(5)
    total = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    (weight * total).backward()  # type: ignore[union-attr]
    return {name: p.grad / weight for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e9])
def test_a_students_fp16_gradients_neither_vanish_nor_overflow(weight: float) -> None:
    student = PromptedStudent(
        tiny.clip(), 24, depth=3, length=2, seed=1
    ).eval()  # BatchNorm would hide some biases
    expected = gradients(student, [student(IMAGES)], 1.0)
    student.autocast_dtype = torch.float16
    output = student(IMAGES)
    assert output.dtype == torch.float32
    found = gradients(student, [output], weight)
    assert found.keys() == expected.keys() and "image.prompts" in found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0.02 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_teachers_fp16_gradients(chunk: int, checkpointing: bool) -> None:
    """Also where parts of either tower are computed again in the backward pass."""
    clip = tiny.clip()
    shape = PromptShape(image_depth=2, image_length=2, text_depth=2, text_length=2)
    model = PromptedCLIP(clip, shape, init="a photo")
    model.text.classes_per_chunk, model.image.activation_checkpointing = chunk, checkpointing
    tokens = class_tokens(clip.tokenizer, ["cat", "dog", "toad"], "a photo of a {}.")
    by_type = {dtype: TeacherNet(model, tokens, torch.zeros(3, 16), dtype) for dtype in (None, torch.float16)}
    found = {
        dtype: gradients(net, list(net(IMAGES)), 1e-9 if dtype else 1.0) for dtype, net in by_type.items()
    }
    assert set(found[None]) == {"prompted.image.prompts", "prompted.text.prompts"}
    for name, value in found[None].items():
        limit = 0.02 * float(value.abs().max())
        torch.testing.assert_close(found[torch.float16][name], value, rtol=0, atol=limit, msg=name)


def test_without_the_factor_small_gradients_would_vanish() -> None:
    student = PromptedStudent(tiny.clip(), 24, depth=3, length=2, seed=1)
    with autocast(IMAGES.device, torch.float16):
        features = student.image(IMAGES)
    (1e-9 * features.float().sum()).backward()
    assert student.image.prompts is not None and student.image.prompts.grad is not None
    assert not student.image.prompts.grad.any()
    student.zero_grad()
    (1e-9 * encode(student.image, IMAGES, torch.float16).sum()).backward()
    assert student.image.prompts.grad.abs().min() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is allowed with a GPU")
@pytest.mark.parametrize(
    ("stage", "job", "name"),
    [("teacher", teacher_job, "teacher_base2novel"), ("student", student_job, "base2novel")],
)
def test_fp16_is_refused_without_a_gpu(stage: str, job, name: str) -> None:
    with pytest.raises(UserError, match="autocast is fp16, which needs a GPU; use bf16 or none"):
        job(load(stage, name, autocast="fp16"))
