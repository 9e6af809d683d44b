"""The frozen teacher sees the pixels that its own preprocessing would give."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import ClipModel, build_clip
from vlmkd.models.towers import ClipTeacher, convert_images

STUDENT = ImageSpec(size=(32, 32), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
TEACHER = ImageSpec(size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))


def teacher_model(spec: ImageSpec) -> ClipModel:
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": spec.size[0], "patch_size": 16, "width": 64, "layers": 2},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2},
    }
    return ClipModel(build_clip(config, seed=0), config, spec, lambda texts: torch.zeros(0), "tiny", "")


def pixels(size: int = 32) -> Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalised(raw: Tensor, spec: ImageSpec) -> Tensor:
    return (raw - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)


def test_output_equals_the_teacher_fed_with_its_own_pixels() -> None:
    model = teacher_model(TEACHER)
    tokens = torch.randint(1, 64, (4, 8))
    with torch.no_grad():
        image = model.module.encode_image(normalised(pixels(), TEACHER), normalize=True)
        text = model.module.encode_text(tokens, normalize=True)
    output = ClipTeacher(model, STUDENT)(normalised(pixels(), STUDENT), tokens)
    assert torch.allclose(output.image_embeds, image, atol=1e-6)
    assert torch.allclose(output.text_embeds, text, atol=1e-6)
    assert output.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_own_view_is_taken_as_it_is() -> None:
    model = teacher_model(TEACHER)
    teacher = ClipTeacher(model, STUDENT)
    view = normalised(pixels(), TEACHER)
    image, text, *_ = teacher(view, own_statistics=True)
    assert text is None
    assert torch.allclose(image, teacher(normalised(pixels(), STUDENT)).image_embeds, atol=1e-6)


def test_equal_statistics_cost_nothing() -> None:
    images = normalised(pixels(), STUDENT)
    assert convert_images(images, STUDENT, copy.copy(STUDENT)) is images


def test_conversion_is_exact_for_every_pair_of_statistics() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        mean, std = (
            torch.rand(2, 3, generator=generator).tolist(),
            (torch.rand(2, 3, generator=generator) + 0.1).tolist(),
        )
        source, target = (
            ImageSpec(size=(8, 8), mean=tuple(m), std=tuple(s)) for m, s in zip(mean, std, strict=True)
        )
        raw = pixels(8).double()
        expected = normalised(raw, target)
        assert torch.allclose(
            convert_images(normalised(raw, source), source, target).double(), expected, atol=2e-5
        )


@pytest.mark.parametrize("size", [16, 48])
def test_another_size_is_resized_like_pixels(size: int) -> None:
    target = ImageSpec(size=(size, size), mean=TEACHER.mean, std=TEACHER.std)
    resized = F.interpolate(pixels(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    converted = convert_images(normalised(pixels(), STUDENT), STUDENT, target)
    assert torch.allclose(converted, normalised(resized, target), atol=2e-5)


def test_teacher_is_frozen_and_its_outputs_serve_a_backward_pass() -> None:
    teacher = ClipTeacher(teacher_model(TEACHER), STUDENT)
    teacher.train()
    assert not any(part.training for part in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    image = teacher(normalised(pixels(), STUDENT)).image_embeds
    student = torch.randn(4, 24, requires_grad=True)
    (student * image).sum().backward()
    assert torch.equal(student.grad, image)


def test_half_precision_teacher_returns_single_precision_unit_vectors() -> None:
    single = ClipTeacher(teacher_model(TEACHER), STUDENT)
    half = ClipTeacher(teacher_model(TEACHER), STUDENT).to(torch.bfloat16)
    images = normalised(pixels(), STUDENT)
    rounded = half(images).image_embeds
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded.norm(dim=-1), torch.ones(4), atol=1e-6)
    assert F.cosine_similarity(rounded, single(images).image_embeds).min() > 0.999
