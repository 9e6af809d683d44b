"""Tiny deterministic image-text data with structure to learn: a coloured shape at a place, and its caption."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 30),
    "black": (20, 20, 20),
    "cyan": (60, 200, 210),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}

_SIDE = 64  # pixels


def draw(seed: int, index: int) -> tuple[Image.Image, str]:
    """Image number `index` (64 x 64, RGB) and its caption, e.g. "a red circle at the top left"."""
    rng = random.Random(f"synthetic/{seed}/{index}")
    color, shape, place = rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(PLACES))
    ground = rng.randint(200, 250)
    image = Image.new("RGB", (_SIDE, _SIDE), (ground, ground, ground))
    radius = rng.randint(10, 14)
    x = 16 + 32 * PLACES[place][0] + rng.randint(-2, 2)
    y = 16 + 32 * PLACES[place][1] + rng.randint(-2, 2)
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        pen.rectangle(box, fill=COLORS[color])
    elif shape == "triangle":
        pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLORS[color])
    else:
        pen.rectangle((x - radius // 3, box[1], x + radius // 3, box[3]), fill=COLORS[color])
        pen.rectangle((box[0], y - radius // 3, box[2], y + radius // 3), fill=COLORS[color])
    return image, f"a {color} {shape} at the {place}"


@dataclass(frozen=True, slots=True)
class DrawnPair:
    """Image number `index` and its caption, as an item of a stream."""

    seed: int
    index: int
    image_key: str
    text_key: str

    @property
    def key(self) -> str:
        """Its number."""
        return f"synthetic/{self.index:06d}"

    def members(self) -> dict[str, bytes]:
        """The picture as a PNG, and its caption."""
        image, text = draw(self.seed, self.index)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return {self.image_key: file.getvalue(), self.text_key: text.encode()}
