"""From raw samples to batches: what a sample is, how it is made, collated and checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.data.batch import ImageLabel, ImageText, check_batch
from vlmkd.data.samples import BadSample, RawSample, checked_size, sample_digest, unpack, views_of
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.data.transforms import ViewConfig, normalise
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

S = TypeVar("S")
Tokenizer = Callable[[list[str]], Tensor]


class Pipeline(Protocol[S]):
    """Holds no state that a resumed run needs; sent to loader processes."""

    def process(self, raw: RawSample) -> S:
        """A sample ready to be collated.

        Raises:
            BadSample: it is dropped.
        """
        ...

    def collate(self, samples: list[S]) -> dict[str, Any]:
        """One batch, with the `keys` of its samples; the loader adds `positions`."""
        ...

    def check(self, batch: dict[str, Any], size: int) -> None:
        """Called with the first batch of a run; an AssertionError is a defect of the pipeline."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it brings into a run beside the source's data, for data.json."""
        ...


@dataclass(slots=True)
class Sample:
    """An image that is ready to be collated."""

    raw: RawSample
    text: str
    pixels: Tensor
    """uint8 [h,w,3] at the student's input size."""
    teacher_pixels: list[Tensor]
    """uint8 [h',w',3] for each teacher that the student's pixels do not serve."""
    stored: list[dict[str, Tensor]] = field(default_factory=list)
    """What each stored teacher said of the view: rows by column."""


class ImagePipeline:
    """One view of an image for the student and its teachers, or one that is stored with what they said of it."""

    def __init__(
        self,
        image_spec: ImageSpec,
        views: ViewConfig,
        tokenizer: Tokenizer | None = None,
        *,
        teacher_specs: Sequence[ImageSpec | None] = (),
        teacher_tokenizers: Sequence[Tokenizer | None] = (),
        stored: Sequence[Sequence[TeacherOutputs]] = (),
        image_keys: Sequence[str] = ("image",),
        text_key: str = "",
        max_pixels: int = 89_478_485,
    ) -> None:
        """Batches are `ImageText` with a tokenizer, else `ImageLabel`.

        Args:
            teacher_specs, teacher_tokenizers: of the teachers that run beside the student; None: the student's.
            stored: for each source, the outputs of the teachers that do not run.
        """
        self.spec, self._views, self._teachers = image_spec, views, list(teacher_specs)
        self.stored, self._image_keys, self._text_key = stored, list(image_keys), text_key
        self._tokenizer, self._teacher_tokenizers = tokenizer, teacher_tokenizers
        self._max_pixels = max_pixels
        self._serves = [spec is None or serves(image_spec, spec) for spec in self._teachers]
        pairs = zip(self._teachers, self._serves, strict=True)
        self._own = [spec for spec, served in pairs if spec is not None and not served]

    def process(self, raw: RawSample) -> Sample:
        """The sample's view, with what was stored of it."""
        image, text = unpack(raw, self._image_keys, self._text_key)
        teachers = self.stored[raw.source] if self.stored else ()
        digest = sample_digest(image, text) if teachers else b""
        entries = []
        for outputs in teachers:
            entry = outputs.get(raw.key, raw.shard, digest, raw.name)
            if entry is None:
                raise BadSample("missing_teacher_embedding", f"is not in {outputs.folder}")
            entries.append(entry)
        rng = random.Random(raw.seed)
        size = checked_size(image, self._max_pixels)
        view, pick = None, 0
        if teachers and teachers[0].replays:
            pick = rng.randrange(len(entries[0].views)) if raw.turn is None else raw.turn
            view = entries[0].views[pick]
            if any(entry.views[pick] != view for entry in entries):
                raise UserError(
                    f"data.sources: the teacher caches hold different crops of {raw.name}; write them with the same --seed, "
                    "--crops and crop options"
                )
        view = view or self._views.draw(*size, rng)
        pixels, *own = views_of(image, size, [view], [self.spec, *self._own])[0]
        said = [
            {name: rows[pick] if name == "image_embeds" else rows for name, rows in entry.columns.items()}
            for entry in entries
        ]
        raw.members = {}  # frees the bytes
        return Sample(raw, text, pixels, own, said)

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """See `Pipeline`; stored vectors in half precision are off by up to 5e-4."""
        batch: dict[str, Any] = {
            "images": normalise([sample.pixels for sample in samples], self.spec),
            "keys": [sample.raw.name for sample in samples],
        }
        for column in samples[0].stored[0] if samples[0].stored else ():
            teachers = zip(*([rows[column] for rows in sample.stored] for sample in samples), strict=True)
            batch[f"teacher_{column}"] = [F.normalize(torch.stack(rows).float(), dim=-1) for rows in teachers]
        if self._teachers:
            pixels = zip(*(sample.teacher_pixels for sample in samples), strict=True)
            own = map(normalise, map(list, pixels), self._own)
            batch["teacher_images"] = [None if served else next(own) for served in self._serves]
        if self._tokenizer is not None:
            texts = [sample.text for sample in samples]
            batch |= {"tokens": self._tokenizer(texts), "texts": texts}
            if self._teachers:
                batch["teacher_tokens"] = [
                    None if one is None else one(texts) for one in self._teacher_tokenizers
                ]
            return batch
        for name, numbers in (
            ("labels", [sample.raw.item.label for sample in samples]),
            ("domains", [sample.raw.item.domain for sample in samples]),
            ("stream_ids", [sample.raw.source for sample in samples]),
        ):
            batch[name] = torch.tensor(numbers, dtype=torch.int64)
        if samples[0].stored:  # a masked answer is stored as zeros
            batch["teacher_valid"] = [embeds.any(dim=1) for embeds in batch["teacher_image_embeds"]]
        return batch

    def check(self, batch: dict[str, Any], size: int) -> None:
        """See `Pipeline`."""
        check_batch(ImageLabel if self._tokenizer is None else ImageText, batch, self.spec, size)
        assert (batch.get("labels", torch.zeros(1)) >= -1).all(), (
            "batch['labels'] holds a label below UNLABELLED"
        )

    def describe(self) -> dict[str, Any]:
        """See `Pipeline`; the sources of texts say it for themselves."""
        if self._tokenizer is not None:
            return {}
        if not self.stored:
            return {"teacher_outputs": None}
        (stored,) = self.stored[0]
        facts = {"folder": str(stored.folder), "teacher": stored.info.source, "digest": stored.info.digest}
        return {"teacher_outputs": facts | {"view": stored.teacher_view, "views": stored.info.crops}}


def serves(student: ImageSpec, teacher: ImageSpec) -> bool:
    """Whether the student's view only needs other statistics to be the teacher's."""
    return student.size == teacher.size and student.interpolation == teacher.interpolation
