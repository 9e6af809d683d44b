"""Pictures of the `emoji` data set: one drawing in one style, and composed scenes.

All pictures are RGB at `PIXELS` x `PIXELS`. Random choices are hashes of the sample's key.
"""

from __future__ import annotations

import functools
import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from data_tools.emoji.catalog import TABLES, Concept, drawing_files, package_folder
from vlmkd.errors import UserError

PIXELS = 72
"""Side of every stored picture, the native size of twemoji's PNGs."""
NOTO_WEIGHTS = (300, 500, 700)
"""Stroke weights of the variable Noto font; tests use the middle one."""
TEST_NOTO_WEIGHT = 500

_PHOTO_PIXELS = 288


@dataclass(frozen=True)
class Placed:
    """One emoji of a scene and where it is: box = (left, top, right, bottom) in pixels."""

    concept: Concept
    style: str
    box: tuple[int, int, int, int]


@functools.lru_cache(maxsize=8)
def _noto_font(size: int, weight: int) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise UserError(
            "this Pillow has no raqm, which joins emoji sequences; run: pip install --force-reinstall pillow"
        )
    path = package_folder("manimgx-fonts") / "NotoEmoji[wght].ttf"
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.RAQM)
    font.set_variation_by_axes([weight])
    return font


def _noto(text: str, weight: int) -> Image.Image:
    """Black line art with alpha; the font's advance is 1.27 em, so 56 px fill the 72 px square."""
    mask = Image.new("L", (PIXELS, PIXELS), 0)
    ImageDraw.Draw(mask).text(
        (PIXELS / 2, PIXELS / 2), text, font=_noto_font(56, weight), fill=255, anchor="mm"
    )
    picture = Image.new("RGBA", mask.size, (0, 0, 0, 0))
    picture.putalpha(mask)
    return picture


def _pixelate(picture: Image.Image) -> Image.Image:
    """16x16 pixels, 16 colours, hard alpha, enlarged four times and centred."""
    small = picture.resize((16, 16), Image.Resampling.BOX)
    colours = small.convert("RGB").quantize(16, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    alpha = small.getchannel("A").point(lambda value: 255 if value >= 128 else 0)
    small = colours.convert("RGB").convert("RGBA")
    small.putalpha(alpha)
    canvas = Image.new("RGBA", (PIXELS, PIXELS), (0, 0, 0, 0))
    canvas.paste(small.resize((64, 64), Image.Resampling.NEAREST), (4, 4))
    return canvas


@functools.cache
def drawing(code: str, text: str, style: str, weight: int = TEST_NOTO_WEIGHT) -> Image.Image:
    """Draw one emoji as RGBA at PIXELS x PIXELS; `text` matters to the noto style only, `code` to the others."""
    if style == "noto":
        return _noto(text, weight)
    if style == "pixel":
        return _pixelate(drawing(code, text, "twemoji"))
    path = drawing_files()[style][code]
    if style == "twemoji":
        picture = Image.open(path).convert("RGBA")
    else:
        import resvg_py

        data = resvg_py.svg_to_bytes(svg_path=str(path), width=PIXELS, height=PIXELS)
        picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    assert picture.size == (PIXELS, PIXELS), (path, picture.size)
    return picture


def on_white(picture: Image.Image) -> Image.Image:
    """Flatten RGBA onto white."""
    canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def concept_picture(concept: Concept, style: str, weight: int = TEST_NOTO_WEIGHT) -> Image.Image:
    """One concept in one style on white, RGB: a test picture or a plain training picture."""
    return on_white(drawing(concept.code, concept.text, style, weight))


@functools.lru_cache(maxsize=1)
def _photographs() -> tuple[Image.Image, ...]:
    folder = package_folder("scikit-image") / "data"
    loaded = []
    for name in TABLES["photographs"]:
        photo = Image.open(folder / name).convert("RGB")
        scale = _PHOTO_PIXELS / min(photo.size)
        loaded.append(
            photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BOX)
        )
    return tuple(loaded)


def background(rng: random.Random, side: int = PIXELS) -> Image.Image:
    """A plain, gradient, white or photographic ground, RGB."""
    kind = rng.random()
    if kind < 0.4:
        return Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3)))
    if kind < 0.6:
        ends = np.array([[rng.randrange(256) for _ in range(3)] for _ in range(2)], dtype=np.float64)
        across = np.linspace(0.0, 1.0, side)[None, :] * rng.uniform(-1, 1)
        down = np.linspace(0.0, 1.0, side)[:, None] * rng.uniform(-1, 1)
        ramp = across + down
        ramp = ((ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6))[..., None]
        return Image.fromarray(np.rint(ends[0] * (1 - ramp) + ends[1] * ramp).astype(np.uint8))
    if kind < 0.75:
        return Image.new("RGB", (side, side), (255, 255, 255))
    # A crop too small and too soft to show a nameable thing (a cat, a rocket) that the caption would miss.
    photo = rng.choice(_photographs())
    left, top = rng.randrange(photo.width - side), rng.randrange(photo.height - side)
    crop = photo.crop((left, top, left + side, top + side)).filter(
        ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0))
    )
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def free_boxes(sizes: list[int], rng: random.Random, side: int = PIXELS) -> list[tuple[int, int, int, int]]:
    """Random square boxes without overlap; all sizes shrink a little each time that no place is found."""
    while True:
        for _ in range(40):
            boxes: list[tuple[int, int, int, int]] = []
            for size in sizes:
                left, top = rng.randint(0, side - size), rng.randint(0, side - size)
                boxes.append((left, top, left + size, top + size))
            if not any(_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]):
                return boxes
        sizes = [max(12, size - 2) for size in sizes]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


_SIZES = {1: (44, 72), 2: (28, 40), 3: (22, 32)}


def compose(items: list[tuple[Concept, str]], rng: random.Random) -> tuple[Image.Image, list[Placed]]:
    """Place one to three emoji without overlap on a plain, gradient, white or photographic background."""
    canvas = background(rng)
    low, high = _SIZES[len(items)]
    boxes = free_boxes([rng.randint(low, high) for _ in items], rng)
    placed = []
    for (concept, style), box in zip(items, boxes, strict=True):
        weight = rng.choice(NOTO_WEIGHTS) if style == "noto" else TEST_NOTO_WEIGHT
        picture = drawing(concept.code, concept.text, style, weight)
        if rng.random() < 0.5:
            picture = picture.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
        paste(canvas, picture, style, box)
        placed.append(Placed(concept, style, box))
    return canvas, placed


def paste(canvas: Image.Image, picture: Image.Image, style: str, box: tuple[int, int, int, int]) -> None:
    """Put a drawing into its box."""
    side = box[2] - box[0]
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    if style == "noto" and float(np.asarray(canvas.crop(box).convert("L")).mean()) < 110:
        # White ink where black would vanish.
        ink = Image.new("RGBA", picture.size, (255, 255, 255, 0))
        ink.putalpha(picture.getchannel("A"))
        picture = ink
    canvas.paste(picture, box[:2], picture.getchannel("A"))
