"""Tiny deterministic image-text data with structure to learn: a coloured square at a place, and its caption."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

from PIL import Image

_COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "cyan")
_PLACES = {"top left": (8, 8), "top right": (40, 8), "bottom left": (8, 40), "bottom right": (40, 40)}


@dataclass(frozen=True, slots=True)
class DrawnPair:
    """Image number `index` of 64 x 64 and a caption such as "a red square at the top left", as an item of a stream."""

    seed: int
    index: int
    image_key: str
    text_key: str

    @property
    def key(self) -> str:
        return f"synthetic/{self.index:06d}"

    def members(self) -> dict[str, bytes]:
        rng = random.Random(f"synthetic/{self.seed}/{self.index}")
        color, place, side = rng.choice(_COLORS), rng.choice(list(_PLACES)), rng.randint(12, 20)
        left, top = (edge + rng.randint(-4, 4) for edge in _PLACES[place])
        image = Image.new("RGB", (64, 64), "white")
        image.paste(color, (left, top, left + side, top + side))
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return {self.image_key: file.getvalue(), self.text_key: f"a {color} square at the {place}".encode()}
