"""From raw samples to batches: filter, decode, paired views, stored teacher embeddings, tokens, collation.

Every sample that drops out has one of `samples.REASONS`; nothing is dropped without one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.config import DataConfig
from vlmkd.data.batch import ImageText
from vlmkd.data.decode import BadImageError
from vlmkd.data.samples import BadSample, Encoded, checked_size, unpack, view_config, views_of
from vlmkd.data.shards import RawSample
from vlmkd.data.teacher_outputs import Stored, TeacherOutputs
from vlmkd.data.transforms import View, normalise
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

Tokenizer = Callable[[list[str]], Tensor]
TeacherView = tuple[ImageSpec | None, Tokenizer | None]


@dataclass(slots=True)
class Sample:
    """A sample that is ready to be collated."""

    name: str
    text: str
    pixels: Tensor
    """uint8 [h,w,3] at the student's input size."""
    teacher_pixels: list[Tensor | None] = field(default_factory=list)
    """uint8 [h',w',3] per teacher, or None."""
    cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Image and text embedding [D] per stored teacher."""


class Pipeline:
    """Turns raw samples into samples and samples into batches; holds no state that a resumed run needs."""

    def __init__(
        self,
        cfg: DataConfig,
        image_spec: ImageSpec,
        tokenizer: Tokenizer,
        teacher_views: Sequence[TeacherView] = (),
        caches: Sequence[Sequence[TeacherOutputs]] = (),
    ) -> None:
        self._cfg, self._spec, self._tokenizer = cfg, image_spec, tokenizer
        self._teachers = list(teacher_views)
        self._caches = caches
        self._views = view_config(cfg)
        self._own = [spec for spec, _ in self._teachers if spec is not None and not serves(image_spec, spec)]

    def process(self, raw: RawSample, source: int, rng: random.Random) -> Sample | BadSample:
        """The sample's view drawn from `rng`, or why it was dropped.

        Raises:
            UserError: a teacher cache was written for other bytes under this key.
        """
        encoded = unpack(raw, self._cfg.image_keys, self._cfg.text_key)
        if isinstance(encoded, BadSample):
            return encoded
        caches = self._caches[source] if self._caches else ()
        stored = []
        for cache in caches:
            entry = cache.get_checked(raw.key, encoded.image, encoded.text, raw.shard)
            if entry is None:
                return BadSample("missing_teacher_embedding", raw.name, f"is not in {cache.folder}")
            stored.append(entry)
        try:
            size = checked_size(encoded.image, self._cfg.max_pixels)
            if stored:
                view, cached = self._replay(encoded, stored, rng)
            else:
                view, cached = self._views.draw(*size, rng), []
            pixels = views_of(encoded.image, size, [view], [self._spec, *self._own])[0]
        except BadImageError as error:
            return BadSample(error.reason, raw.name, str(error))
        own = iter(pixels[1:])
        shared = [spec is None or serves(self._spec, spec) for spec, _ in self._teachers]
        teacher_pixels = [None if same else next(own) for same in shared]
        return Sample(raw.name, encoded.text, pixels[0], teacher_pixels, cached)

    @staticmethod
    def _replay(
        encoded: Encoded, stored: Sequence[Stored], rng: random.Random
    ) -> tuple[View, list[tuple[Tensor, Tensor]]]:
        """One of the stored views and what each teacher said about it."""
        pick = rng.randrange(len(stored[0].views))
        view = stored[0].views[pick]
        if any(entry.views[pick] != view for entry in stored):
            raise UserError(
                f"data.sources: the teacher caches hold different crops of {encoded.name}; write them with the same "
                f"--seed, --crops and crop options"
            )
        return view, [(entry.image_embeds[pick], entry.text_embeds) for entry in stored]

    def collate(self, samples: list[Sample]) -> ImageText:
        """One batch; `positions` and `skipped` are the loader's to fill."""
        texts = [sample.text for sample in samples]
        batch = ImageText(
            images=normalise([sample.pixels for sample in samples], self._spec),
            tokens=self._tokenizer(texts),
            texts=texts,
            keys=[sample.name for sample in samples],
            positions={"worker": 0, "raw": 0},
            skipped={},
        )
        if samples[0].cached:
            number = len(samples[0].cached)
            batch["teacher_image_embeds"] = [
                stack_units([s.cached[i][0] for s in samples]) for i in range(number)
            ]
            batch["teacher_text_embeds"] = [
                stack_units([s.cached[i][1] for s in samples]) for i in range(number)
            ]
        if self._teachers:
            batch["teacher_images"] = [self._teacher_images(samples, i) for i in range(len(self._teachers))]
            batch["teacher_tokens"] = [None if own is None else own(texts) for _, own in self._teachers]
        return batch

    def _teacher_images(self, samples: list[Sample], index: int) -> Tensor | None:
        spec = self._teachers[index][0]
        pixels = [
            image for image in (sample.teacher_pixels[index] for sample in samples) if image is not None
        ]
        return normalise(pixels, spec) if spec is not None and pixels else None


def serves(student: ImageSpec, teacher: ImageSpec) -> bool:
    """Whether the student's view only needs other statistics to be the teacher's."""
    return student.size == teacher.size and student.interpolation == teacher.interpolation


def stack_units(vectors: list[Tensor]) -> Tensor:
    """float32 [B,D] of unit length; stored half-precision vectors are off by up to 5e-4."""
    return F.normalize(torch.stack(vectors).float(), dim=-1)
