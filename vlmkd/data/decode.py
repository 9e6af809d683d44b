"""Image bytes to pixels: simplejpeg (libjpeg-turbo) for JPEG, Pillow for all that it cannot read.

Both decode a JPEG to the same bytes; simplejpeg takes a third less time (benchmarks/loader.py).
"""

from __future__ import annotations

import io
import math
from contextlib import suppress

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

REDUCTIONS = (8, 4, 2, 1)
"""Denominators by which a JPEG can be decoded smaller than it is, coarsest first."""

_JPEG_MAGIC = b"\xff\xd8"
_TURBO_COLORS = ("YCbCr", "RGB", "Gray")  # CMYK and YCCK need Pillow's conversion


class BadSample(ValueError):
    """A sample that cannot be used; the loader drops it, and counts it by `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header alone.

    Raises:
        BadSample: `undecodable_image`, or `oversized_image` where Pillow itself refuses the size.
    """
    if data.startswith(_JPEG_MAGIC):
        with suppress(ValueError):  # then Pillow decides
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return width, height
    with _open(data) as image:
        return image.size


def decode(data: bytes, *, fill: tuple[int, int, int] = (0, 0, 0), reduction: int = 1) -> Tensor:
    """Pixels as uint8 [H,W,3]; transparent ones lie on `fill`.

    With a `reduction` r a JPEG is decoded to ceil(H/r) x ceil(W/r) from its DCT coefficients; other images are averaged
    over r x r blocks. EXIF orientation is ignored, as in open_clip.

    Raises:
        BadSample: `undecodable_image`.
    """
    if data.startswith(_JPEG_MAGIC) and (pixels := _decode_turbo(data, reduction)) is not None:
        return pixels
    with _open(data) as image:
        try:
            full_size = image.size
            image.draft(image.mode, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
            rgb = to_rgb(image, fill)
            if reduction > 1 and image.size == full_size:
                rgb = rgb.reduce(reduction)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadSample("undecodable_image", f"{type(error).__name__}: {error}") from None
    return torch.from_numpy(np.array(rgb))


def to_rgb(image: Image.Image, fill: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """`image` as RGB, with `fill` under its transparent pixels."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (*fill, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _decode_turbo(data: bytes, reduction: int) -> Tensor | None:
    """Pixels, or None where Pillow should try."""
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        if color not in _TURBO_COLORS:
            return None
        # Asking for at least this size picks exactly the scale 1/reduction.
        low_height, low_width = math.ceil(height / reduction), math.ceil(width / reduction)
        pixels = simplejpeg.decode_jpeg(data, min_height=low_height, min_width=low_width)
    except ValueError:
        return None  # Pillow forgives some defects that strict decoding does not
    return torch.from_numpy(pixels)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadSample("oversized_image", str(error)) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample("undecodable_image", f"{type(error).__name__}: {error}") from None
