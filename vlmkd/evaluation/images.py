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
from vlmkd.evaluation.base import Context, progress
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.predictors import DualEncoder

UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no usable image (a torn PNG gives SyntaxError)."""
_NAMED = 3  # unreadable files that an error line names


class _Decoded(Dataset[tuple[int, Tensor, bool]]):
    """(index into all images, pixels, readable) of one rank's share; unreadable images are zeros."""

    def __init__(self, images: Sequence[ImageRef], spec: ImageSpec) -> None:
        self._images, self._share = images, distributed.rank_share(len(images))
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
        *,
        keep: bool = False,
    ) -> None:
        """`keep` holds the rows on the CPU, and a second iteration gives these."""
        self._run, self._spec, self._images, self._title, self._context = run, spec, images, title, context
        self._keep, self._kept = keep, list[tuple[Tensor, Tensor]]()
        self._unreadable: list[str] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept:
            yield from self._kept
            return
        context = self._context
        decoded = _Decoded(self._images, self._spec)
        loader = DataLoader(decoded, batch_size=context.batch_size, num_workers=context.workers)
        self._unreadable = []
        kept = []
        for indices, images, readable in progress(loader, len(loader), self._title, context):
            self._unreadable += [str(self._images[int(index)]) for index in indices[~readable]]
            with torch.no_grad():
                rows = self._run(images.to(context.device))
            found = indices[readable], rows[readable.to(rows.device)].float()
            if self._keep:
                kept.append((found[0], found[1].cpu()))
            yield found
        self._kept = kept

    def gathered(
        self, reduce: Callable[[Tensor, Tensor], Tensor] = lambda indices, rows: rows
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Indices [n] of the readable images of all ranks, sorted, their rows [n,...] on the CPU, and the unreadable ones.

        `reduce` makes of (indices [b], rows [b,...] on the CPU) what is kept of a batch, [b,...].
        """
        parts = [(indices, reduce(indices, rows.cpu())) for indices, rows in self]
        unreadable = self.unreadable()
        # The empty tensors stand for the share of a rank that has no images.
        indices = torch.cat([torch.empty(0, dtype=torch.long), *(part[0] for part in parts)])
        rows = torch.cat([torch.empty(0), *(part[1] for part in parts)])
        return (*distributed.gather_rows(indices, rows), unreadable)

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


def embeddings(
    encoder: DualEncoder, images: Sequence[ImageRef], title: str, context: Context
) -> ImageOutputs:
    """Unit vectors [b,D] of the images; a context that remembers them decodes and embeds once for each encoder."""
    known = context.embedded
    if known is None:
        return ImageOutputs(encoder.encode_image, encoder.image_spec, images, title, context)
    key = (id(encoder), tuple(images))
    if key not in known:
        known[key] = ImageOutputs(encoder.encode_image, encoder.image_spec, images, title, context, keep=True)
    return known[key]


def embed_texts(encoder: DualEncoder, texts: list[str], title: str, context: Context) -> Tensor:
    """Unit vectors [N,D] (CPU) of texts, which the ranks share."""
    share = distributed.rank_share(len(texts))
    starts = range(0, len(share), context.batch_size)
    parts = [torch.empty(0)]
    with torch.no_grad():
        for start in progress(starts, len(starts), title, context):
            chunk = share[start : start + context.batch_size]
            parts.append(encoder.encode_text([texts[index] for index in chunk]).float().cpu())
    return distributed.gather_rows(torch.tensor(share, dtype=torch.long), torch.cat(parts))[1]


def class_vectors(
    encoder: DualEncoder, class_names: list[str], templates: list[str], title: str, context: Context
) -> ClassVectors:
    """The zero-shot classifier of an encoder; the ranks share the classes."""
    return encode_classes(
        encoder,
        class_names,
        templates,
        teacher_digest="",
        batch_size=context.batch_size,
        shared=True,
        watch=lambda starts: progress(starts, len(starts), f"{title}: classes", context),
    )
