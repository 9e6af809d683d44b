"""Tiny deterministic image-text data with structure to learn: a coloured shape at a place, and its caption."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageDraw

from vlmkd.config import DataConfig
from vlmkd.data.batch import ImageText, check_batch
from vlmkd.data.pipeline import Pipeline, Sample, TeacherView, Tokenizer
from vlmkd.data.shards import RawSample
from vlmkd.image_spec import ImageSpec

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


class SyntheticLoader:
    """Endless batches of drawn images; batch number n is the same whatever came before it.

    Each epoch orders its `data.synthetic_samples` images anew and deals them to the ranks batch by batch.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        image_spec: ImageSpec,
        tokenizer: Tokenizer,
        teacher_views: Sequence[TeacherView] = (),
    ) -> None:
        self._cfg, self._seed, self._rank, self._world_size = cfg, seed, rank, world_size
        self._batch_size, self._spec = micro_batch_size, image_spec
        self._pipeline = Pipeline(cfg, image_spec, tokenizer, teacher_views)
        self._delivered = 0
        self.samples_per_epoch = cfg.synthetic_samples
        self._order: tuple[int, list[int]] = (-1, [])
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches after the last one that was handed out."""
        first = True
        while True:
            batch: dict[str, Any] = {**self._batch(self._delivered)}
            self._delivered += 1
            if first:
                check_batch(batch, self._spec, self._batch_size)
                first = False
            yield batch

    def _batch(self, number: int) -> ImageText:
        start = (number * self._world_size + self._rank) * self._batch_size
        samples = [self._sample(start + offset) for offset in range(self._batch_size)]
        batch = self._pipeline.collate(samples)
        batch["positions"] = {"worker": self._rank, "raw": (number + 1) * self._batch_size}
        return batch

    def _sample(self, position: int) -> Sample:
        epoch, place = divmod(position, self._cfg.synthetic_samples)
        if self._order[0] != epoch:
            order = list(range(self._cfg.synthetic_samples))
            random.Random(f"{self._seed}/order/{epoch}").shuffle(order)
            self._order = (epoch, order)
        index = self._order[1][place]
        image, text = draw(self._seed, index)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        members = {self._cfg.image_keys[0]: file.getvalue(), self._cfg.text_key: text.encode()}
        raw = RawSample("synthetic", f"{index:06d}", members)
        sample = self._pipeline.process(raw, 0, random.Random(f"{self._seed}/{epoch}/{index}"))
        assert isinstance(sample, Sample), sample
        return sample

    def state_dict(self) -> dict[str, Any]:
        """The number of batches handed out."""
        return {"delivered": self._delivered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of `state`."""
        self._delivered = int(state["delivered"])

    def check_bad_share(self) -> None:
        """See `Loader`; nothing is bad here."""

    def describe(self) -> dict[str, Any]:
        """What went into the run, for data.json."""
        return {
            "kind": "synthetic",
            "samples": self._cfg.synthetic_samples,
            "seed": self._seed,
            "skipped": {},
        }
