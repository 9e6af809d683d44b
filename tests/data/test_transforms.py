"""Evaluation transform against open_clip, training views against torchvision, and their replay."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import skimage.data
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from vlmkd.data.transforms import (
    View,
    ViewConfig,
    eval_transform,
    normalise,
    reduction_for,
    render,
)
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COFFEE = Image.fromarray(skimage.data.coffee())


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (96, 128), (128, 96)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_open_clip(size, mode, interpolation):
    spec = ImageSpec(size=size, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    ours = eval_transform(spec)
    theirs = image_transform(
        size if mode == "squash" or size[0] != size[1] else size[0],
        is_train=False, mean=MEAN, std=STD, resize_mode=mode, interpolation=interpolation,
    )  # fmt: skip
    for side in [(600, 400), (333, 501), (224, 300), (100, 60), (64, 97), (501, 333), (224, 224)]:
        image = COFFEE.resize(side)
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(COFFEE.convert("L")), theirs(COFFEE.convert("L")), rtol=0, atol=1e-5)


def test_evaluation_padding_equals_open_clip_and_transparency_is_filled():
    spec = ImageSpec(size=(64, 64), mean=MEAN, std=STD, resize_mode="longest", fill=(127, 127, 127))
    theirs = image_transform(64, is_train=False, mean=MEAN, std=STD, resize_mode="longest", fill_color=127)
    torch.testing.assert_close(eval_transform(spec)(COFFEE), theirs(COFFEE), rtol=0, atol=1e-5)
    clear = eval_transform(spec)(Image.new("RGBA", (50, 50), (255, 0, 0, 0)))
    torch.testing.assert_close(clear, eval_transform(spec)(Image.new("RGB", (50, 50), (127, 127, 127))))


def test_rendered_crop_equals_pillow_within_one_grey_level():
    spec = ImageSpec(size=(56, 48), mean=MEAN, std=STD)
    pixels = torch.from_numpy(np.array(COFFEE))
    for interpolation, resample in (
        ("bicubic", Image.Resampling.BICUBIC),
        ("bilinear", Image.Resampling.BILINEAR),
    ):
        one = ImageSpec(size=(56, 48), mean=MEAN, std=STD, interpolation=interpolation)
        for box in [(0, 0, 600, 400), (31, 17, 333, 222), (100, 50, 20, 30)]:
            expected = COFFEE.crop((box[0], box[1], box[0] + box[2], box[1] + box[3])).resize(
                (48, 56), resample
            )
            difference = render(pixels, View(box), one).int() - torch.from_numpy(np.array(expected)).int()
            assert difference.abs().max() <= 1 and difference.abs().float().mean() < 0.02
    flipped = render(pixels, View((31, 17, 333, 222), flip=True), spec)
    assert torch.equal(flipped, render(pixels, View((31, 17, 333, 222)), spec).flip(1))


def test_jitter_equals_torchvision():
    spec = ImageSpec(size=(40, 40), mean=MEAN, std=STD)
    pixels = torch.from_numpy(np.array(COFFEE))
    view = View((10, 20, 300, 300), jitter=(1.3, 0.7, 1.4))
    plain = render(pixels, View((10, 20, 300, 300)), spec).permute(2, 0, 1).float() / 255
    expected = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(plain, 1.3), 0.7), 1.4)
    difference = render(pixels, view, spec).permute(2, 0, 1) / 255 - expected
    assert difference.abs().max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize("shift", [-0.5, -0.21, 0.07, 0.3])
def test_hue_and_grey_equal_torchvision(shift):
    spec = ImageSpec(size=(40, 40), mean=MEAN, std=STD)
    pixels = torch.from_numpy(np.array(COFFEE))
    box = (10, 20, 300, 300)
    plain = render(pixels, View(box), spec).permute(2, 0, 1).float() / 255
    shifted = render(pixels, View(box, hue=shift), spec).permute(2, 0, 1) / 255
    assert (shifted - TF.adjust_hue(plain, shift)).abs().max() <= 0.5 / 255 + 1e-5
    grey = render(pixels, View(box, hue=shift, grey=True), spec).permute(2, 0, 1) / 255
    expected = TF.rgb_to_grayscale(TF.adjust_hue(plain, shift), 3)
    assert (grey - expected).abs().max() <= 0.5 / 255 + 1e-5


def test_views_without_hue_and_grayscale_are_drawn_as_before():
    """The stored views of earlier caches stay what they were: these were drawn before both existed."""
    plain, full = (
        ViewConfig(flip=0.5, color_jitter=0.3),
        ViewConfig(flip=0.5, color_jitter=0.3, hue=0.2, grayscale=0.25),
    )
    pairs = [
        (plain.draw(64, 48, random.Random(seed)), full.draw(64, 48, random.Random(seed)))
        for seed in range(1000)
    ]
    for old, new in pairs:
        assert (old.box, old.flip, old.jitter) == (new.box, new.flip, new.jitter)
        assert old.hue == 0 and not old.grey and abs(new.hue) <= 0.2
    hues = np.array([new.hue for _, new in pairs])
    assert hues.min() < -0.19 and hues.max() > 0.19 and np.array_equal(hues, hues.astype(np.float32))
    assert np.mean([new.grey for _, new in pairs]) == pytest.approx(0.25, abs=0.05)


def test_normalise_is_bit_equal_to_the_whole_batch_at_once():
    spec = ImageSpec(size=(9, 7), mean=(0.48, 0.45, 0.41), std=(0.27, 0.26, 0.28))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (9, 7, 3), generator=generator).to(torch.uint8) for _ in range(5)]
    images[1] = images[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)  # as `render` gives them
    mean, std = torch.tensor(spec.mean).view(1, 3, 1, 1), torch.tensor(spec.std).view(1, 3, 1, 1)
    whole = torch.stack(images).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
    found = normalise(images, spec)
    assert torch.equal(found, whole) and found.is_contiguous()


def test_normalise_is_the_float64_formula():
    spec = ImageSpec(size=(5, 4), mean=MEAN, std=STD)
    images = [
        torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        for i in (0, 1)
    ]
    expected = (torch.stack(images).double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    batch = normalise(images, spec)
    assert batch.shape == (2, 3, 5, 4) and batch.is_contiguous() and batch.dtype == torch.float32
    torch.testing.assert_close(batch.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [(640, 480), (101, 333), (37, 41)])
def test_drawn_boxes_keep_to_scale_and_ratio(side):
    config = ViewConfig(crop_scale=(0.3, 0.8), crop_ratio=(0.75, 4 / 3))
    rng = random.Random(0)
    shares, slack = [], 0.04  # rounding to whole pixels and to the decoding grid
    for _ in range(1500):
        left, top, width, height = config.draw(*side, rng).box
        assert left >= 0 and top >= 0 and left + width <= side[0] and top + height <= side[1]
        share, ratio = width * height / (side[0] * side[1]), width / height
        shares.append(share)
        fits = 0.3 - slack <= share <= 0.8 + slack
        assert fits or side == (101, 333)  # in a narrow image most areas do not fit, and the centre is taken
        assert 0.75 * (1 - slack) <= ratio <= 4 / 3 * (1 + slack)
    torch.manual_seed(0)
    canvas = torch.empty(3, side[1], side[0])
    oracle = [RandomResizedCrop.get_params(canvas, [0.3, 0.8], [0.75, 4 / 3])[2:] for _ in range(1500)]
    oracle_shares = [height * width / (side[0] * side[1]) for height, width in oracle]
    assert np.mean(shares) == pytest.approx(np.mean(oracle_shares), abs=0.02)
    assert np.std(shares) == pytest.approx(np.std(oracle_shares), abs=0.02)


def test_boxes_of_large_images_lie_on_the_grid_that_fast_decoding_needs():
    config = ViewConfig()
    rng = random.Random(0)
    spec = ImageSpec(size=(224, 224), mean=MEAN, std=STD)
    for side, reduction in [((4000, 3000), 4), ((1300, 1000), 2), ((640, 480), 1), ((300, 200), 1)]:
        for _ in range(50):
            view = config.draw(*side, rng)
            assert reduction_for(view, [spec]) == reduction
    large = ImageSpec(size=(336, 336), mean=MEAN, std=STD)
    assert reduction_for(View((0, 0, 1792, 1792)), [spec, large]) == 2
    assert reduction_for(View((0, 0, 1791, 1792)), [spec]) == 1


def test_scale_and_ratio_of_one_take_the_centre_square():
    config = ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1))
    assert config.draw(60, 40, random.Random(0)).box == (10, 0, 40, 40)
    assert config.draw(40, 61, random.Random(0)).box == (0, 10, 40, 40)


def test_draw_is_a_function_of_its_generator_and_probabilities_hold():
    config = ViewConfig(flip=0.25, color_jitter=0.4)
    draws = [config.draw(64, 64, random.Random(seed)) for seed in range(2000)]
    assert draws == [config.draw(64, 64, random.Random(seed)) for seed in range(2000)]
    assert np.mean([view.flip for view in draws]) == pytest.approx(0.25, abs=0.03)
    factors = np.array([view.jitter for view in draws])
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and np.allclose(factors.mean(0), 1, atol=0.02)
    assert factors.dtype == np.float64 and np.array_equal(factors, factors.astype(np.float32))
    assert not any(view.flip for view in (ViewConfig().draw(64, 64, random.Random(s)) for s in range(200)))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"crop_scale": (0.0, 1.0)}, "data.crop_scale"),
        ({"crop_scale": (0.9, 0.8)}, "data.crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "data.crop_ratio"),
        ({"flip": 1.5}, "data.flip"),
        ({"color_jitter": -0.1}, "data.color_jitter"),
        ({"hue": 0.6}, "data.hue"),
        ({"grayscale": -1.0}, "data.grayscale"),
        ({"crop_scale": (math.nan, 1.0)}, "data.crop_scale"),
    ],
)
def test_impossible_distributions_are_refused(fields, name):
    with pytest.raises(UserError, match=name):
        ViewConfig(**fields)
