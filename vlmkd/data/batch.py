"""The kinds of training batches, and the check that the first one of a run passes.

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
    """Logical worker over all ranks."""
    raw: int
    """Raw samples that this worker has given out, up to the last one of this batch, bad ones included."""


class _ImageTextRequired(TypedDict):
    images: Tensor
    """float32 [B,3,H,W], normalised by the student's statistics."""
    tokens: Tensor
    """int64 [B,T] of the student's tokenizer."""
    texts: list[str]
    """Captions."""
    keys: list[str]
    """`shard/key` of each sample."""
    positions: Positions
    """Where the batch stands in the stream."""
    skipped: dict[str, int]
    """This rank's bad samples so far, by reason."""


class ImageText(_ImageTextRequired, total=False):
    """Images with captions, and what frozen teachers need of them; lists hold one entry per teacher."""

    teacher_images: list[Tensor | None]
    """float32 [B,3,H',W'] of the same views; None where the student's images serve after re-normalising."""
    teacher_tokens: list[Tensor | None]
    """int64 [B,T']; None where the student's tokens serve."""
    teacher_image_embeds: list[Tensor]
    """float32 [B,D] unit vectors from a teacher cache."""
    teacher_text_embeds: list[Tensor]
    """float32 [B,D] unit vectors from a teacher cache."""


class _ImageLabelRequired(TypedDict):
    images: Tensor
    """float32 [B,3,H,W], normalised by the student's statistics."""
    labels: Tensor
    """int64 [B]; UNLABELLED (-1) where the method is given no label."""
    domains: Tensor
    """int64 [B]."""
    stream_ids: Tensor
    """int64 [B]: position of the row's stream among the loader's streams; rows of a stream lie together."""
    keys: list[str]
    """Key of each item."""
    positions: Positions
    """Where the batch stands in the stream; `worker` is the rank."""
    skipped: dict[str, int]
    """This rank's bad images so far, by reason."""


class ImageLabel(_ImageLabelRequired, total=False):
    """Labelled images, and what frozen teachers need or have said of them; lists hold one entry per teacher."""

    teacher_images: list[Tensor | None]
    """float32 [B,3,H',W'] of the same views; None where the student's images serve after re-normalising."""
    teacher_image_embeds: list[Tensor]
    """float32 [B,D] unit vectors from stored outputs; zeros where `teacher_valid` is false."""
    teacher_valid: list[Tensor]
    """bool [B] beside `teacher_image_embeds`: false where a black-box teacher gave no answer that can be used."""


def check_batch(batch: dict[str, Any], spec: ImageSpec, batch_size: int) -> None:
    """Check names, types and shapes of an ImageText batch; an AssertionError here is a defect of a loader."""
    missing = _ImageTextRequired.__required_keys__ - batch.keys()
    unknown = batch.keys() - ImageText.__required_keys__ - ImageText.__optional_keys__
    assert not missing and not unknown, f"batch lacks {sorted(missing)} and has unknown {sorted(unknown)}"
    _check_tensor("images", batch["images"], torch.float32, (batch_size, 3, *spec.size))
    assert torch.isfinite(batch["images"]).all(), "batch['images'] is not finite"
    _check_tensor("tokens", batch["tokens"], torch.int64, (batch_size, None))
    for name in ("texts", "keys"):
        assert len(batch[name]) == batch_size and all(isinstance(text, str) for text in batch[name]), (
            f"batch[{name!r}]"
        )
    for name, dtype, shape in (
        ("teacher_images", torch.float32, (batch_size, 3, None, None)),
        ("teacher_tokens", torch.int64, (batch_size, None)),
        ("teacher_image_embeds", torch.float32, (batch_size, None)),
        ("teacher_text_embeds", torch.float32, (batch_size, None)),
    ):
        for value in batch.get(name, []):
            if value is not None:
                _check_tensor(name, value, dtype, shape)


def check_image_label_batch(batch: dict[str, Any], spec: ImageSpec, batch_size: int) -> None:
    """Check names, types and shapes of an ImageLabel batch; an AssertionError here is a defect of a loader."""
    missing = _ImageLabelRequired.__required_keys__ - batch.keys()
    unknown = batch.keys() - ImageLabel.__required_keys__ - ImageLabel.__optional_keys__
    assert not missing and not unknown, f"batch lacks {sorted(missing)} and has unknown {sorted(unknown)}"
    _check_tensor("images", batch["images"], torch.float32, (batch_size, 3, *spec.size))
    assert torch.isfinite(batch["images"]).all(), "batch['images'] is not finite"
    for name in ("labels", "domains", "stream_ids"):
        _check_tensor(name, batch[name], torch.int64, (batch_size,))
    assert (batch["labels"] >= -1).all(), "batch['labels'] holds a label below UNLABELLED"
    assert len(batch["keys"]) == batch_size and all(isinstance(key, str) for key in batch["keys"])
    for name, dtype, shape in (
        ("teacher_images", torch.float32, (batch_size, 3, None, None)),
        ("teacher_image_embeds", torch.float32, (batch_size, None)),
        ("teacher_valid", torch.bool, (batch_size,)),
    ):
        for value in batch.get(name, []):
            if value is not None:
                _check_tensor(name, value, dtype, shape)


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = len(value.shape) == len(shape) and all(
        want in (None, size) for want, size in zip(shape, value.shape, strict=True)
    )
    assert value.dtype == dtype and fits, (
        f"batch[{name!r}] is {value.dtype} {tuple(value.shape)}, not {dtype} {shape}"
    )
