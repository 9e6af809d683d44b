"""The fast decoder against Pillow on real photographs, odd formats, and broken files."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from vlmkd.data.decode import REDUCTIONS, BadSample, decode, image_size
from vlmkd.data.transforms import View, reduction_for, render
from vlmkd.image_spec import ImageSpec

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


def photo(name: str, size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.fromarray(getattr(skimage.data, name)())
    return image if size is None else image.resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"quality": 60, "subsampling": 0}, {"progressive": True}]
)
def test_jpeg_pixels_equal_pillow(name, options):
    data = saved(photo(name), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data).numpy(), expected)
    assert image_size(data) == photo(name).size


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduced_size_is_exact_for_any_side(mode, reduction):
    for size in [(641, 483), (640, 480), (97, 8)]:
        pixels = decode(saved(photo("coffee", size).convert(mode), "JPEG"), reduction=reduction)
        assert pixels.dtype == torch.uint8
        assert tuple(pixels.shape) == (-(-size[1] // reduction), -(-size[0] // reduction), 3)
    assert decode(saved(photo("coffee", (641, 483)), "PNG"), reduction=reduction).shape[0] == -(
        -483 // reduction
    )


@pytest.mark.parametrize(("kind", "name"), [*(("JPEG", name) for name in PHOTOS), ("PNG", "coffee")])
def test_reduced_decoding_changes_a_model_input_by_less_than_half_a_grey_level(name, kind):
    """The stated tolerance: mean below 0.5 and every pixel within 16 of 255, at twice the input size or more."""
    spec = ImageSpec(size=(80, 80), mean=(0, 0, 0), std=(1, 1, 1))
    data = saved(photo(name, (960, 720)), kind, **({"quality": 90} if kind == "JPEG" else {}))
    view = View((16, 8, 928, 696))
    reduction = reduction_for(view, [spec])
    assert reduction == 4
    difference = render(decode(data), view, spec).int() - render(
        decode(data, reduction=reduction), view, spec, reduction
    )
    assert difference.abs().float().mean() < 0.5
    assert difference.abs().max() <= 16


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_the_fill_colour(kind):
    image = Image.new("RGBA", (4, 2), (200, 100, 0, 255))
    image.putpixel((0, 0), (9, 9, 9, 0))
    image.putpixel((1, 0), (200, 100, 0, 128))
    data = saved(image, kind, lossless=True) if kind == "WEBP" else saved(image, kind)
    white, blue = decode(data, fill=(255, 255, 255)), decode(data, fill=(0, 0, 255))
    assert white[0, 0].tolist() == [255, 255, 255] and blue[0, 0].tolist() == [0, 0, 255]
    assert white[0, 1].tolist() == pytest.approx([227, 177, 127], abs=2)
    assert white[1, 3].tolist() == [200, 100, 0]


def test_palette_and_grey_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = saved(palette, "PNG", transparency=1)
    assert decode(data, fill=(7, 8, 9)).tolist() == [[[10, 20, 30], [7, 8, 9]]]
    grey = Image.merge("LA", [Image.new("L", (1, 1), 80), Image.new("L", (1, 1), 0)])
    assert decode(saved(grey, "PNG"), fill=(7, 8, 9)).tolist() == [[[7, 8, 9]]]


def test_what_is_no_image_has_a_reason():
    for data in (b"", b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBPVP8 "):
        with pytest.raises(BadSample) as caught:
            image_size(data)
            decode(data)
        assert caught.value.reason == "undecodable_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damaged_files_decode_or_have_a_reason_but_never_crash(kind):
    data = saved(photo("coffee", (60, 40)), kind)
    rng = random.Random(kind)
    refused = 0
    for _ in range(150):
        spoilt = bytearray(data)
        for _ in range(rng.randint(1, 12)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        broken = bytes(spoilt[: rng.randint(1, len(spoilt))] if rng.random() < 0.5 else spoilt)
        try:
            width, height = image_size(broken)
            if width * height < 1_000_000:
                decode(broken)
        except BadSample as error:
            assert error.reason in ("undecodable_image", "oversized_image")
            refused += 1
    assert refused > 10
