"""Images of an evaluation set: where their bytes lie, and batches of them for one rank."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmkd import distributed
from vlmkd.data.images import ImageRef
from vlmkd.data.transforms import eval_transform
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, DualEncoder, progress, rank_share
from vlmkd.image_spec import ImageSpec

UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no usable image (a torn PNG gives SyntaxError)."""
_NAMED = 3  # unreadable files that an error line names


class _Decoded(Dataset[tuple[int, Tensor, bool]]):
    """(index into all images, pixels, readable) of one rank's share; unreadable images are zeros."""

    def __init__(self, images: Sequence[ImageRef], spec: ImageSpec) -> None:
        self._images, self._share = images, rank_share(len(images))
        self._transform = eval_transform(spec)
        self._blank = torch.zeros(3, *spec.size)

    def __len__(self) -> int:
        return len(self._share)

    def __getitem__(self, position: int) -> tuple[int, Tensor, bool]:
        index = self._share[position]
        try:
            with Image.open(io.BytesIO(self._images[index].read())) as image:
                return index, self._transform(image), True
        except UNREADABLE:
            return index, self._blank, False


class ImageOutputs:
    """Iterates over (indices [b], rows [b,...] of `run`, fp32) of this rank's share of `images`, in order.

    Images go through the evaluation transform of `spec`. Unreadable ones are left out and counted; after the iteration
    `unreadable()` gives those of all ranks.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        spec: ImageSpec,
        images: Sequence[ImageRef],
        title: str,
        context: Context,
    ) -> None:
        self._run, self._spec, self._images, self._title, self._context = run, spec, images, title, context
        self._unreadable: list[str] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        context = self._context
        decoded = _Decoded(self._images, self._spec)
        loader = DataLoader(decoded, batch_size=context.batch_size, num_workers=context.workers)
        self._unreadable = []
        for indices, images, readable in progress(loader, len(loader), self._title, context):
            self._unreadable += [str(self._images[int(index)]) for index in indices[~readable]]
            with torch.no_grad():
                rows = self._run(images.to(context.device))
            yield indices[readable], rows[readable.to(rows.device)].float()

    def unreadable(self) -> list[str]:
        """Unreadable images of all ranks, sorted.

        Raises:
            UserError: they are more than the context's share of the set.
        """
        found = sorted(name for part in distributed.gather_objects(self._unreadable) for name in part)
        share = len(found) / len(self._images)
        if share > self._context.max_unreadable_share or share == 1:
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise UserError(
                f"{self._title}: {len(found)} of {len(self._images)} images cannot be read, more than "
                f"{self._context.max_unreadable_share:.1%}: {', '.join(found[:_NAMED])}{more}; restore these files"
            )
        return found


Batches = list[tuple[Tensor, Tensor]]


def embed_batches(
    predictor: DualEncoder, images: Sequence[ImageRef], title: str, context: Context
) -> tuple[Batches, list[str]]:
    """(indices [b], unit vectors [b,D] on the CPU) of this rank's share, batch by batch, and all unreadable names.

    A context that remembers embeddings decodes and embeds the same images once for each predictor.
    """
    key = (id(predictor), tuple(images))
    known = context.embedded
    if known is not None and key in known:
        return known[key]
    stream = ImageOutputs(predictor.encode_image, predictor.image_spec, images, title, context)
    found = [(indices, rows.cpu()) for indices, rows in stream], stream.unreadable()
    if known is not None:
        known[key] = found
    return found


def embed_all(
    predictor: DualEncoder, images: Sequence[ImageRef], title: str, context: Context
) -> tuple[Tensor, Tensor, list[str]]:
    """Indices [n] of the readable images, their vectors [n,D] on this rank's share, and all unreadable names."""
    parts, unreadable = embed_batches(predictor, images, title, context)
    # The empty tensors stand for the share of a rank that has no images.
    indices = torch.cat([torch.empty(0, dtype=torch.long), *(part[0] for part in parts)])
    return indices, torch.cat([torch.empty(0), *(part[1] for part in parts)]), unreadable


def embed_texts(
    predictor: DualEncoder, texts: list[str], title: str, context: Context
) -> tuple[Tensor, Tensor]:
    """Indices [n] and unit vectors [n,D] (CPU) of this rank's share of `texts`."""
    share = rank_share(len(texts))
    starts = range(0, len(share), context.batch_size)
    parts = [torch.empty(0)]
    with torch.no_grad():
        for start in progress(starts, len(starts), title, context):
            chunk = share[start : start + context.batch_size]
            parts.append(predictor.encode_text([texts[index] for index in chunk]).float().cpu())
    return torch.tensor(list(share), dtype=torch.long), torch.cat(parts)
