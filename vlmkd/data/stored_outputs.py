"""Stored teacher outputs of a labelled set: written once, then training needs no teacher.

The files are those of `teacher_cache`, with parts of a set in the place of shards and without texts: only image
embeddings are stored, because logits follow from them and the class vectors, and stay valid when the class list,
the temperature or the prompt changes. Views are drawn from (seed of the folder, key of the item, number of the view), so one
folder serves every subset, split and run seed.

K views an image, D width of an embedding.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmkd.data.decode import BadImageError
from vlmkd.data.labelled import Item
from vlmkd.data.samples import BadSample, checked_size, sample_digest, views_of
from vlmkd.data.teacher_cache import (
    CachedSample,
    CacheInfo,
    Columns,
    ShardFile,
    read_info,
    save_shard,
    start_folder,
    write_json,
)
from vlmkd.data.transforms import View, ViewConfig, normalise
from vlmkd.errors import UserError
from vlmkd.predictors import ImageEncoder

CLEAN = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
"""The one view that nothing random is in: resized and centre-cropped."""

_TOOL = "embed_labelled.py"


# -------------------------------------------------------------------------------------------------------- reading


class StoredEmbeds:
    """Reader of one folder of stored outputs."""

    def __init__(self, folder: str | Path, teacher_view: Literal["same", "clean"] = "same") -> None:
        """Open every part; embeddings are mapped, not read.

        Args:
            teacher_view: `same`: the student is shown the stored views; `clean`: it is shown views of its own, and
                the stored vector of the whole picture is the target of each.

        Raises:
            UserError: no folder of stored outputs, a damaged one, or `clean` with one of drawn views.
        """
        self.folder, self.teacher_view = Path(folder), teacher_view
        self.info = read_info(self.folder, _TOOL)
        if not self.info.set_name:
            raise UserError(f"{folder} is a cache of shards; write a labelled set's with data_tools/{_TOOL}")
        if teacher_view == "clean" and (self.info.views != CLEAN or self.info.crops != 1):
            raise UserError(
                f"config field data.teacher_view=clean, but {folder} holds {self.info.crops} drawn view(s) an image; "
                f"write another folder with data_tools/{_TOOL} --clean, or set data.teacher_view=same"
            )
        self._parts = [ShardFile(path) for path in _part_paths(self.folder)]
        self._part_of = {key: part for part in self._parts for key in part.rows}

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files for itself.
        return StoredEmbeds, (self.folder, self.teacher_view)

    def __len__(self) -> int:
        """Images whose embeddings are stored."""
        return len(self._part_of)

    def __contains__(self, key: str) -> bool:
        return key in self._part_of

    @property
    def replays(self) -> bool:
        """Whether the student sees the stored views."""
        return self.teacher_view == "same"

    @property
    def view_count(self) -> int:
        """Stored views per image, K."""
        return self.info.crops

    def check(
        self,
        items: Iterable[Item],
        views: ViewConfig,
        fill: tuple[int, int, int],
        *,
        digest: str | None = None,
        max_missing_share: float = 0.0,
    ) -> None:
        """Refuse a folder that does not fit the run; the message names what differs.

        Args:
            items: the run's images; those without a stored embedding may be `max_missing_share` of them.
            views: the run's view distribution; only compared when the stored views are replayed.
            fill: the colour under transparent pixels that the run's student uses.
            digest: digest of the teacher that the run's config names; None when it names none.
        """
        differences = []
        if self.replays:
            differences = [
                f"data.{name} is {_listed(getattr(views, name))} but the views were drawn with {_listed(value)}"
                for name, value in vars(self.info.views).items()
                if getattr(views, name) != value
            ]
            if fill != self.info.image_spec.fill:
                differences.append(
                    f"the student lays transparent images on {fill}, the teacher on {self.info.image_spec.fill}"
                )
        if digest is not None and digest != self.info.digest:
            differences.append(
                f"the run's teacher has digest {digest[:12]}..., the outputs are of {self.info.source} "
                f"with {self.info.digest[:12]}..."
            )
        keys = [item.key for item in items]
        missing = [key for key in keys if key not in self]
        if len(missing) > max_missing_share * len(keys):
            differences.append(f"{len(missing)} of {len(keys)} images are not in it (first: {missing[0]})")
        if differences:
            raise UserError(
                f"stored teacher outputs {self.folder} do not fit this run: {'; '.join(differences)}; change the "
                f"config, or run data_tools/{_TOOL} (it adds what is missing to a folder of the same settings)"
            )

    def get(self, key: str) -> CachedSample | None:
        """Digest, views and embeddings [K,D] of an image, or None when it has none; zero rows are masked views."""
        part = self._part_of.get(key)
        return part.get(key) if part is not None else None

    def get_checked(self, key: str, image: bytes) -> CachedSample | None:
        """As `get`, for the encoded image that the key stands for now.

        Raises:
            UserError: the outputs were written for another image under this key.
        """
        entry = self.get(key)
        if entry is not None and entry.digest != sample_digest(image, ""):
            raise UserError(
                f"{self.folder} was written for another image than {key} is now; run data_tools/{_TOOL} into a new "
                f"folder"
            )
        return entry


def _listed(value: Any) -> Any:
    """Tuples as lists, the way a config shows them."""
    return list(value) if isinstance(value, tuple) else value


def _part_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# -------------------------------------------------------------------------------------------------------- writing


@dataclass(slots=True)
class Prepared:
    """An image ready to be embedded."""

    key: str
    image: bytes
    """The file as it is."""
    views: list[View]
    pixels: list[Tensor]
    """uint8 [h,w,3] of each view, at the teacher's input size."""


def embed_items(
    encoder: ImageEncoder,
    items: Sequence[Item],
    folder: str | Path,
    *,
    name: str,
    source: str,
    digest: str,
    views: ViewConfig,
    view_count: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
    part_size: int = 2000,
    max_pixels: int = 89_478_485,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> Counter[str]:
    """Embed `view_count` views of every item into `folder`, a file per `part_size` items.

    Items that the folder holds already are not embedded again, so the same call continues an interrupted one and
    another list adds to it. Images that cannot be used are left out and counted by reason in the result.

    Args:
        name: the data set, which a folder has one of.
        source: the teacher as its user named it.
        digest: sha256 over the teacher's weights.
        views: distribution of the views; CLEAN with `view_count` 1 stores the whole picture.
        dtype: float16, or float32 to store the vectors as they are.
        workers: processes that read and decode.

    Raises:
        UserError: `folder` holds outputs of other settings, two items have one key, or an image file is missing.
    """
    width = encoder.encode_image(torch.zeros(1, 3, *encoder.image_spec.size, device=device)).shape[-1]
    info = CacheInfo(
        source=source, digest=digest, logit_scale=float(encoder.logit_scale), dim=int(width), crops=view_count,
        seed=seed, image_spec=encoder.image_spec, views=views, set_name=name, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip

    @torch.inference_mode()
    def embed(batch: list[Prepared]) -> Tensor:
        pixels = [view for prepared in batch for view in prepared.pixels]
        rows = [
            encoder.encode_image(
                normalise(pixels[start : start + batch_size], info.image_spec).to(device)
            ).cpu()
            for start in range(0, len(pixels), batch_size)
        ]
        return torch.cat(rows)

    per_call = max(batch_size // view_count, 1)
    return write_parts(
        embed, items, folder, info, per_call, part_size=part_size, max_pixels=max_pixels, workers=workers,
        progress=progress,
    )  # fmt: skip


def write_parts(
    embed: Callable[[list[Prepared]], Tensor],
    items: Sequence[Item],
    folder: str | Path,
    info: CacheInfo,
    per_call: int,
    *,
    part_size: int,
    max_pixels: int,
    workers: int,
    progress: Callable[[str], None],
) -> Counter[str]:
    """Fill `folder` with what `embed` gives for at most `per_call` images at a time: [images * K, D] rows."""
    twice = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    if twice:
        raise UserError(f"{info.set_name}: {len(twice)} keys name two images (first: {twice[0]})")
    folder = Path(folder)
    start_folder(folder, info)
    todo = missing_items(items, folder)
    stem = re.sub(r"[^\w.-]+", "_", info.set_name)
    first = max((int(path.stem.rpartition("-")[2]) for path in _part_paths(folder)), default=-1) + 1
    skipped: Counter[str] = Counter()
    started = time.monotonic()
    for start in range(0, len(todo), part_size):
        chunk = todo[start : start + part_size]
        columns = _embed_part(embed, chunk, info, per_call, max_pixels, workers, skipped)
        if columns.keys:
            save_shard(folder / f"{stem}-{first + start // part_size:05d}.safetensors", columns, info)
        finished = start + len(chunk)
        elapsed = max(time.monotonic() - started, 1e-3)
        eta = elapsed / finished * (len(todo) - finished)
        progress(
            f"{info.set_name}: {len(items) - len(todo) + finished}/{len(items)} images, "
            f"{finished / elapsed:.1f} images/s, {sum(skipped.values())} skipped, ETA {eta / 60:.1f} min"
        )
    write_json(folder, info)
    return skipped


def missing_items(items: Sequence[Item], folder: Path) -> list[Item]:
    """The items whose outputs `folder` does not hold."""
    done = {key for path in _part_paths(folder) for key in ShardFile(path).rows}
    return [item for item in items if item.key not in done]


def _embed_part(
    embed: Callable[[list[Prepared]], Tensor],
    items: Sequence[Item],
    info: CacheInfo,
    per_call: int,
    max_pixels: int,
    workers: int,
    skipped: Counter[str],
) -> Columns:
    columns = Columns()
    waiting: list[Prepared] = []

    def flush() -> None:
        columns.images.append(embed(waiting))
        waiting.clear()

    for prepared in prepare(items, info, max_pixels, workers):
        if isinstance(prepared, BadSample):
            skipped[prepared.reason] += 1
            continue
        columns.keys.append(prepared.key)
        columns.digests.append(sample_digest(prepared.image, ""))
        columns.views.append(prepared.views)
        waiting.append(prepared)
        if len(waiting) == per_call:
            flush()
    if waiting:
        flush()
    return columns


def prepare(
    items: Sequence[Item], info: CacheInfo, max_pixels: int, workers: int = 0
) -> Iterator[Prepared | BadSample]:
    """The views that `info` asks for of each item, in order, or why it has none.

    Raises:
        UserError: an image file is missing.
    """
    dataset = _Views(items, info, max_pixels)
    for prepared in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_unchanged):
        if isinstance(prepared, UserError):
            raise prepared
        yield prepared


class _Views(Dataset[Any]):
    """Reads, decodes and renders item by item."""

    def __init__(self, items: Sequence[Item], info: CacheInfo, max_pixels: int) -> None:
        self._items, self._info, self._max_pixels = items, info, max_pixels

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Prepared | BadSample | UserError:
        item, info = self._items[index], self._info
        try:
            image = read_item(item)
            size = checked_size(image, self._max_pixels)
            views = [info.views.draw(*size, view_rng(info.seed, item.key, k)) for k in range(info.crops)]
            pixels = views_of(image, size, views, [info.image_spec])
        except BadImageError as error:
            return BadSample(error.reason, item.key, str(error))
        except UserError as error:
            return error  # raised by the process that asked
        return Prepared(item.key, image, views, [per_spec[0] for per_spec in pixels])


def view_rng(seed: int | str, key: str, number: int) -> random.Random:
    """The generator from which view `number` of the image `key` is drawn."""
    return random.Random(f"{seed}/{key}/{number}")


def read_item(item: Item) -> bytes:
    """The encoded image.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    try:
        return item.image.read()
    except OSError as error:
        raise UserError(
            f"image {item.image} of {item.key} cannot be read ({error.strerror}); mend the data set's folder"
        ) from None


def _unchanged(value: Any) -> Any:
    return value
