"""From raw samples to batches: what a sample is, how it is made, collated and checked.

B batch, T tokens, D width of a teacher's embedding; H, W pixels of a model's input.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

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
        """A sample ready to be collated; one that raises BadSample is dropped."""

    def collate(self, samples: list[S]) -> dict[str, Any]:
        """One batch, with the `keys` of its samples.

        The loader adds `positions`: `worker`, the logical worker over all ranks, or the rank, and `raw`, how many raw
        samples it had given out after this batch, bad ones included.
        """

    def check(self, batch: dict[str, Any], size: int) -> None:
        """Look at the first batch of a run; an AssertionError is a defect of the pipeline."""

    def describe(self) -> dict[str, Any]:
        """What it brings into a run beside the source's data, for data.json."""


_TENSORS = {
    "images": (torch.float32, 4),  # [B,3,H,W]
    "teacher_images": (torch.float32, 4),  # the same views, [B,3,H',W']
    "teacher_image_embeds": (torch.float32, 2),  # [B,D], unit length; float16 storage costs up to 5e-4
    # with captions
    "tokens": (torch.int64, 2),  # [B,T]
    "teacher_tokens": (torch.int64, 2),  # [B,T']
    "teacher_text_embeds": (torch.float32, 2),  # [B,D], as those of the images
    # with labels
    "labels": (torch.int64, 1),  # UNLABELLED (-1) where the method is given none
    "stream_ids": (torch.int64, 1),  # number of the row's stream; rows of a stream lie together
    "teacher_valid": (torch.bool, 1),  # false where a black box gave no usable answer: a vector of zeros
}
"""Type and dimensions of a batch's tensors. What is of teachers is a list with one for each, or None: the student's serves."""


@dataclass(slots=True)
class Sample:
    """An image that is ready to be collated."""

    raw: RawSample
    text: str
    pixels: Tensor
    """uint8 [H,W,3]."""
    teacher_pixels: list[Tensor]
    """uint8 [H',W',3] for each teacher that the student's pixels do not serve."""
    stored: list[dict[str, Tensor]]
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
        """With a `tokenizer` images have captions, else labels.

        Args:
            teacher_specs, teacher_tokenizers: of the teachers that run beside the student; None: the student's.
            stored: for each source, the outputs of the teachers that do not run.
        """
        self.spec, self._views, self._max_pixels = image_spec, views, max_pixels
        self.stored, self._image_keys, self._text_key = stored, image_keys, text_key
        self._tokenizer, self._teacher_tokenizers = tokenizer, teacher_tokenizers
        own = (image_spec.size, image_spec.interpolation)  # what has to be alike; statistics may differ
        self._teacher_specs = [
            None if spec is None or (spec.size, spec.interpolation) == own else spec for spec in teacher_specs
        ]

    def process(self, raw: RawSample) -> Sample:
        """See `Pipeline`."""
        image, text = unpack(raw, self._image_keys, self._text_key)
        teachers = self.stored[raw.source] if self.stored else ()
        digest = sample_digest(image, text) if teachers else b""
        entries = []
        for outputs in teachers:
            entry = outputs.get(raw.key, raw.shard, digest, raw.name)
            if entry is None:
                raise BadSample("missing_teacher_embedding", f"is not in {outputs.folder}")
            entries.append(entry)
        size, rng, pick = checked_size(image, self._max_pixels), random.Random(raw.seed), 0
        if teachers and teachers[0].replays:
            pick = rng.randrange(len(entries[0].views)) if raw.turn is None else raw.turn
            view = entries[0].views[pick]
            if any(entry.views[pick] != view for entry in entries):
                raise UserError(
                    f"data.sources: the teacher caches hold different crops of {raw.name}; write them with the same "
                    "--seed, --crops and crop options"
                )
        else:
            view = self._views.draw(*size, rng)
        pixels, *own = views_of(image, size, [view], [self.spec, *filter(None, self._teacher_specs)])[0]
        said = [
            {name: rows[pick] if name == "image_embeds" else rows for name, rows in entry.columns.items()}
            for entry in entries
        ]
        raw.members = {}  # frees the bytes
        return Sample(raw, text, pixels, own, said)

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """`keys` and tensors, see `_TENSORS`."""
        batch: dict[str, Any] = {
            "images": normalise([sample.pixels for sample in samples], self.spec),
            "keys": [sample.raw.name for sample in samples],
        }
        for column in samples[0].stored[0] if samples[0].stored else ():
            teachers = zip(*([rows[column] for rows in sample.stored] for sample in samples), strict=True)
            batch[f"teacher_{column}"] = [F.normalize(torch.stack(rows).float(), dim=-1) for rows in teachers]
        if self._teacher_specs:
            pixels = zip(*(sample.teacher_pixels for sample in samples), strict=True)
            batch["teacher_images"] = [
                None if spec is None else normalise(next(pixels), spec) for spec in self._teacher_specs
            ]
        if self._tokenizer is not None:
            texts = [sample.text for sample in samples]
            batch["tokens"] = self._tokenizer(texts)
            if self._teacher_tokenizers:
                batch["teacher_tokens"] = [
                    None if own is None else own(texts) for own in self._teacher_tokenizers
                ]
            return batch
        batch["labels"] = torch.tensor([sample.raw.item.label for sample in samples])
        batch["stream_ids"] = torch.tensor([sample.raw.source for sample in samples])
        if samples[0].stored:
            batch["teacher_valid"] = [embeds.any(dim=1) for embeds in batch["teacher_image_embeds"]]
        return batch

    def check(self, batch: dict[str, Any], size: int) -> None:
        """See `Pipeline`."""
        unknown = batch.keys() - {"images", "keys", "positions", *_TENSORS}
        assert not unknown, f"batch has unknown {sorted(unknown)}"
        for name, expected in _TENSORS.items():
            value = batch.get(name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    fits = (one.dtype, one.ndim, len(one)) == (*expected, size)
                    assert fits, f"batch[{name!r}] is {one.dtype} {tuple(one.shape)}"
        assert batch["images"].shape[2:] == self.spec.size, "batch['images'] is of another size"
        assert batch["images"].isfinite().all(), "batch['images'] is not finite"
        assert len(batch["keys"]) == size, "batch['keys'] is not of every row"

    def describe(self) -> dict[str, Any]:
        """See `Pipeline`; the sources of texts say it for themselves."""
        if self._tokenizer is not None:
            return {}
        if not self.stored:
            return {"teacher_outputs": None}
        (stored,) = self.stored[0]
        facts = {"folder": str(stored.folder), "teacher": stored.info.source, "digest": stored.info.digest}
        return {"teacher_outputs": facts | {"view": stored.teacher_view, "views": stored.info.crops}}
