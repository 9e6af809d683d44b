"""The kinds of image batches, and the check that the first one of a run passes.

B batch, T tokens, H and W input pixels, D width of a teacher's embedding.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from vlmkd.image_spec import ImageSpec


class Positions(TypedDict):
    """Where a batch stands in the stream."""

    worker: int
    """Logical worker over all ranks, or rank."""
    raw: int
    """Raw samples that this worker has given out, up to the last one of this batch, bad ones included."""


class _ImagesRequired(TypedDict):
    images: Tensor
    """float32 [B,3,H,W], normalised by the student's statistics."""
    keys: list[str]
    """`shard/key` or key of each sample."""
    positions: Positions


class _Images(_ImagesRequired, total=False):
    """What frozen teachers need or have said of the images; lists hold one entry per teacher."""

    teacher_images: list[Tensor | None]
    """float32 [B,3,H',W'] of the same views; None where the student's images serve after re-normalising."""
    teacher_image_embeds: list[Tensor]
    """float32 [B,D] unit vectors from stored outputs."""


class _ImageTextRequired(_Images):
    tokens: Tensor
    """int64 [B,T] of the student's tokenizer."""
    texts: list[str]
    """Captions."""


class ImageText(_ImageTextRequired, total=False):
    """Images with captions."""

    teacher_tokens: list[Tensor | None]
    """int64 [B,T']; None where the student's tokens serve."""
    teacher_text_embeds: list[Tensor]
    """float32 [B,D] unit vectors from stored outputs."""


class _ImageLabelRequired(_Images):
    labels: Tensor
    """int64 [B]; UNLABELLED (-1) where the method is given no label."""
    domains: Tensor
    """int64 [B]."""
    stream_ids: Tensor
    """int64 [B]: position of the row's stream among the loader's streams; rows of a stream lie together."""


class ImageLabel(_ImageLabelRequired, total=False):
    """Labelled images; a row of `teacher_image_embeds` is zeros where `teacher_valid` is false."""

    teacher_valid: list[Tensor]
    """bool [B]: false where a black-box teacher gave no answer that can be used."""


_SHAPES: dict[str, tuple[torch.dtype, int]] = {
    "tokens": (torch.int64, 2),
    "labels": (torch.int64, 1),
    "domains": (torch.int64, 1),
    "stream_ids": (torch.int64, 1),
    "teacher_images": (torch.float32, 4),
    "teacher_tokens": (torch.int64, 2),
    "teacher_image_embeds": (torch.float32, 2),
    "teacher_text_embeds": (torch.float32, 2),
    "teacher_valid": (torch.bool, 1),
}
"""Type and dimensions of each tensor, or of each of a list; the first dimension is B."""


def check_batch(kind: Any, batch: dict[str, Any], spec: ImageSpec, size: int) -> None:
    """Check names, types and shapes of a batch of `kind`; an AssertionError here is a defect of a pipeline."""
    missing = kind.__required_keys__ - batch.keys()
    unknown = batch.keys() - kind.__required_keys__ - kind.__optional_keys__
    assert not missing and not unknown, f"batch lacks {sorted(missing)} and has unknown {sorted(unknown)}"
    images = batch["images"]
    assert images.dtype == torch.float32 and images.shape == (size, 3, *spec.size), (
        f"batch['images'] is {images.dtype} {tuple(images.shape)}"
    )
    assert torch.isfinite(images).all(), "batch['images'] is not finite"
    for name in ("texts", "keys"):
        texts = batch.get(name, [""] * size)
        assert len(texts) == size and all(isinstance(text, str) for text in texts), f"batch[{name!r}]"
    for name, (dtype, dimensions) in _SHAPES.items():
        value = batch.get(name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                fits = one.dtype == dtype and one.ndim == dimensions and len(one) == size
                assert fits, f"batch[{name!r}] is {one.dtype} {tuple(one.shape)}"
