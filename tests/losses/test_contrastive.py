"""Contrastive losses against hand-worked numbers, float64 loops and open_clip."""

from __future__ import annotations

import math

import numpy as np
import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.losses.contrastive import clip_loss, sigmoid_loss


def unit(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def cross_entropy_loops(rows: Tensor, columns: Tensor, scale: float, offset: int) -> float:
    total = 0.0
    for i, row in enumerate(rows.detach().numpy()):
        logits = [scale * float(np.dot(row, column)) for column in columns.detach().numpy()]
        total += math.log(sum(map(math.exp, logits))) - logits[offset + i]
    return total / len(rows)


def sigmoid_loops(images: Tensor, texts: Tensor, scale: float, bias: float, offset: int) -> float:
    total = 0.0
    for i, image in enumerate(images.detach().numpy()):
        for j, text in enumerate(texts.detach().numpy()):
            sign = 1 if j == offset + i else -1
            total += math.log1p(math.exp(-sign * (scale * float(np.dot(image, text)) + bias)))
    return total / len(images)


def test_clip_hand_worked() -> None:
    # Logits ln 3 on the diagonal, 0 beside it: every pair has probability 3/4 both ways.
    eye = torch.eye(2, dtype=torch.float64)
    assert clip_loss(eye, eye, math.log(3)).item() == pytest.approx(math.log(4 / 3), abs=1e-14)


def test_sigmoid_hand_worked() -> None:
    # Logits ln 3 on and 0 beside the diagonal: per row ln(1 + 1/3) + ln 2.
    eye = torch.eye(2, dtype=torch.float64)
    assert sigmoid_loss(eye, eye, math.log(3)).item() == pytest.approx(math.log(8 / 3), abs=1e-14)


@pytest.mark.parametrize("offset", [0, 2, 5])
def test_gathered_columns_equal_loops(offset: int) -> None:
    all_images, all_texts = unit(0, 9, 4), unit(1, 9, 4)
    part = slice(offset, offset + 4)
    image, text = all_images[part], all_texts[part]
    loss = clip_loss(image, text, 7.0, all_image_embeds=all_images, all_text_embeds=all_texts, offset=offset)
    expected = cross_entropy_loops(image, all_texts, 7, offset) + cross_entropy_loops(
        text, all_images, 7, offset
    )
    assert loss.item() == pytest.approx(expected / 2, abs=1e-12)

    loss = sigmoid_loss(image, text, 7.0, -3.0, all_text_embeds=all_texts, offset=offset)
    assert loss.item() == pytest.approx(sigmoid_loops(image, all_texts, 7, -3, offset), abs=1e-12)


def test_equal_open_clip_with_gradients() -> None:
    image, text = unit(0, 8, 5).requires_grad_(), unit(1, 8, 5).requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    leaves = [image, text, scale]
    pairs = [
        (clip_loss(image, text, scale), open_clip.loss.ClipLoss()(image, text, scale), leaves),
        (
            sigmoid_loss(image, text, scale, bias),
            open_clip.loss.SigLipLoss()(image, text, scale, bias),
            [*leaves, bias],
        ),
    ]
    for ours, theirs, inputs in pairs:
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), rtol=0, atol=1e-12
        )


def test_gradcheck() -> None:
    images, texts = unit(0, 6, 3).requires_grad_(), unit(1, 6, 3).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    part = slice(2, 5)

    def clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return clip_loss(
            images[part], texts[part], scale, all_image_embeds=images, all_text_embeds=texts, offset=2
        )

    def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(images[part], texts[part], scale, bias, all_text_embeds=texts, offset=2)

    assert torch.autograd.gradcheck(clip, (images, texts, scale))
    assert torch.autograd.gradcheck(sigmoid, (images, texts, scale, bias))


def test_order_of_pairs_does_not_matter() -> None:
    image, text = unit(0, 7, 4), unit(1, 7, 4)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    moved = image[order], text[order]
    assert clip_loss(*moved, 9.0).item() == pytest.approx(clip_loss(image, text, 9.0).item(), abs=1e-12)
    assert sigmoid_loss(*moved, 9.0, -2.0).item() == pytest.approx(
        sigmoid_loss(image, text, 9.0, -2.0).item()
    )


def test_sigmoid_is_exact_for_large_logits() -> None:
    # The only pair has logit 100: softplus(-100) = e^-100; a wrong sign or a cut-off would give 100 or 0.
    one = torch.ones(1, 1, dtype=torch.float64)
    assert sigmoid_loss(one, one, 100.0).item() == pytest.approx(math.exp(-100), rel=1e-12)
    assert sigmoid_loss(one, one, 0.0, -100.0).item() == pytest.approx(100.0, rel=1e-15)


def test_half_precision_inputs_are_widened_under_autocast() -> None:
    image, text = unit(0, 6, 4).bfloat16(), unit(1, 6, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [clip_loss(image, text, 50.0), sigmoid_loss(image, text, 50.0, -10.0)]
    assert torch.equal(losses[0], clip_loss(image.float(), text.float(), 50.0))
    assert torch.equal(losses[1], sigmoid_loss(image.float(), text.float(), 50.0, -10.0))
    assert all(loss.dtype == torch.float32 for loss in losses)


def test_bad_arguments_are_named() -> None:
    image, text = unit(0, 6, 4), unit(1, 6, 4)
    with pytest.raises(ValueError, match="offset is 3"):
        sigmoid_loss(image, text, 1.0, offset=3)
    with pytest.raises(ValueError, match="offset is -1"):
        clip_loss(image, text, 1.0, offset=-1)
    with pytest.raises(ValueError, match="must be given together"):
        clip_loss(image, text, 1.0, all_text_embeds=text)


def test_gathered_columns_without_their_gradient_are_refused() -> None:
    image, text = unit(0, 3, 4).requires_grad_(), unit(1, 3, 4).requires_grad_()
    columns = {"all_image_embeds": torch.cat([image, unit(2, 3, 4)])}
    lost = torch.cat([text, unit(3, 3, 4)]).detach()
    with pytest.raises(ValueError, match="all_text_embeds carries no gradient"):
        clip_loss(image, text, 10.0, all_text_embeds=lost, **columns)
    with pytest.raises(ValueError, match="all_text_embeds carries no gradient"):
        sigmoid_loss(image, text, 10.0, all_text_embeds=lost)
    clip_loss(image, text.detach(), 10.0, all_text_embeds=lost, **columns).backward()  # a frozen text tower
    with torch.no_grad():
        sigmoid_loss(image, text, 10.0, all_text_embeds=lost)
