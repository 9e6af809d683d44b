"""What a model makes of the images and texts of an evaluation set; the ranks share them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmkd import distributed
from vlmkd.data.images import ImageRef
from vlmkd.data.transforms import eval_transform
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, progress
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.predictors import DualEncoder

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no usable image (a torn PNG gives SyntaxError)."""
Outputs = tuple[Tensor, Tensor, list[str]]
"""Indices [n] of all ranks' readable images, sorted; their rows [n,...] on the CPU; names of the unreadable ones."""
Reduce = Callable[[Tensor, Tensor], Tensor]
"""What is kept of a batch [b,...], from its indices [b] and rows [b,...] on the CPU."""


class _Decoded(Dataset[tuple[int, Tensor, bool]]):
    """(index into all images, pixels, readable) of one rank's share; unreadable images are zeros."""

    def __init__(self, images: Sequence[ImageRef], spec: ImageSpec) -> None:
        self._images, self._share = images, distributed.rank_share(len(images))
        self._transform, self._blank = eval_transform(spec), torch.zeros(3, *spec.size)

    def __len__(self) -> int:
        return len(self._share)

    def __getitem__(self, position: int) -> tuple[int, Tensor, bool]:
        index = self._share[position]
        try:
            with Image.open(io.BytesIO(self._images[index].read())) as image:
                return index, self._transform(image), True
        except UNREADABLE:
            return index, self._blank, False


def image_outputs(
    run: Callable[[Tensor], Tensor],
    spec: ImageSpec,
    images: Sequence[ImageRef],
    title: str,
    context: Context,
    reduce: Reduce | None = None,
    *,
    encoder: DualEncoder | None = None,
) -> Outputs:
    """`run` on batches of images after the evaluation transform of `spec`; too many unreadable ones are refused.

    A context that remembers embeddings makes those of an `encoder` once.
    """
    batches: Iterable[Outputs] = _batches(run, spec, images, title, context)
    if encoder is not None and context.embedded is not None:
        key = (id(encoder), tuple(images))
        batches = context.embedded[key] = context.embedded.get(key) or list(batches)
    parts, own = [(torch.empty(0, dtype=torch.long), torch.empty(0))], []  # for a rank without images
    for indices, rows, unreadable in batches:
        parts.append((indices, rows if reduce is None else reduce(indices, rows)))
        own += unreadable
    found = sorted(name for part in distributed.gather_objects(own) for name in part)
    if len(found) > context.max_unreadable_share * len(images) or len(found) == len(images):
        told = f"{len(found)} of {len(images)} images cannot be read, more than {context.max_unreadable_share:.1%}"
        raise UserError(f"{title}: {told}: {', '.join(found[:3])}; restore them")
    ids, kept = (torch.cat(part) for part in zip(*parts, strict=True))
    return (*distributed.gather_rows(ids, kept), found)


def embeddings(
    encoder: DualEncoder,
    images: Sequence[ImageRef],
    title: str,
    context: Context,
    reduce: Reduce | None = None,
) -> Outputs:
    """As `image_outputs`, of the encoder's unit vectors."""
    run, spec = encoder.encode_image, encoder.image_spec
    return image_outputs(run, spec, images, title, context, reduce, encoder=encoder)


def _batches(
    run: Callable[[Tensor], Tensor], spec: ImageSpec, images: Sequence[ImageRef], title: str, context: Context
) -> Iterator[Outputs]:
    loader: Any = DataLoader(_Decoded(images, spec), context.batch_size, num_workers=context.workers)
    for indices, pixels, readable in progress(loader, len(loader), title, context):
        with torch.no_grad():
            rows = run(pixels.to(context.device)).float().cpu()
        yield indices[readable], rows[readable], [str(images[index]) for index in indices[~readable].tolist()]


def embed_texts(encoder: DualEncoder, texts: list[str], title: str, context: Context) -> Tensor:
    """Unit vectors [N,D] (CPU) of texts."""
    share, parts = distributed.rank_share(len(texts)), [torch.empty(0)]
    starts = range(0, len(share), context.batch_size)
    with torch.no_grad():
        for start in progress(starts, len(starts), title, context):
            chunk = [texts[index] for index in share[start : start + context.batch_size]]
            parts.append(encoder.encode_text(chunk).float().cpu())
    return distributed.gather_rows(torch.tensor(share, dtype=torch.long), torch.cat(parts))[1]


def class_vectors(
    encoder: DualEncoder, class_names: list[str], templates: list[str], title: str, context: Context
) -> ClassVectors:
    return encode_classes(
        encoder, class_names, templates, teacher_digest="", batch_size=context.batch_size, shared=True,
        watch=lambda starts: progress(starts, len(starts), f"{title}: classes", context),
    )  # fmt: skip
