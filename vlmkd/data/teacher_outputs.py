"""Teacher outputs stored beside the data: written once, then training needs no teacher.

A folder belongs to one teacher and one labelled set or list of shards; `cache.json` says what was computed how. Its parts
(one a shard, or some thousand items of a set) are safetensors files with N samples, K views an image:

    keys uint8 (UTF-8, one line a key)   digests uint8 [N,32] (sha256 of image bytes + caption)
    boxes int32 [N,K,4] (left, top, width, height)   flips uint8 [N,K]   jitter float32 [N,K,3]
    with hue or grayscale also: hues float32 [N,K]   greys uint8 [N,K]
    and the columns, rows of which are what the teacher said: image_embeds [N,K,D], of shards text_embeds [N,D]

Parts of chats (`vlmkd.data.chat_outputs`) have no views, and columns of their own; where `counts` int64 [N] stands beside
these, a sample has so many rows of each, one sample's behind the other's.

Views are drawn from (seed of the folder, name of the sample, number of the view), so one folder serves every subset,
split and run seed. To store several augmentations with their parameters is MobileCLIP's dataset reinforcement.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from vlmkd import distributed, files
from vlmkd.data.labelled import Item
from vlmkd.data.samples import BadSample, checked_size, sample_digest, views_of
from vlmkd.data.shards import shard_name
from vlmkd.data.transforms import View, ViewConfig, normalise
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.predictors import ImageEncoder

_VERSION = 2
CLEAN = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
"""The one view that nothing random is in: resized and centre-cropped."""

_OPEN_SHARDS = 4  # a shuffle block rarely spans more shards than this
_VIEWS = {
    "boxes": ("box", torch.int32, (4,)),
    "flips": ("flip", torch.uint8, ()),
    "jitter": ("jitter", torch.float32, (3,)),
    "hues": ("hue", torch.float32, ()),
    "greys": ("grey", torch.uint8, ()),
}
"""Tensor -> the field of a `View`, type, and shape."""


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What `cache.json` says about any folder."""

    unit: ClassVar[str] = "images"
    content: ClassVar[str] = "another image or caption"
    """What the digest beside a sample is of."""
    tools: ClassVar[str] = (
        "data_tools/embed_teacher.py (shards) or data_tools/embed_labelled.py (a labelled set)"
    )
    """What writes such a folder."""
    source: str
    """The teacher as its user named it."""
    digest: str
    """sha256 over the teacher's weights."""
    image_spec: ImageSpec
    """The teacher's input."""
    set_name: str = ""
    """What the samples are of; empty for shards."""
    dtype: str = "float16"
    """Type of the columns."""
    version: int = _VERSION
    """Layout of the files; changed whenever old files would be misread."""


@dataclass(frozen=True, kw_only=True)
class OutputsInfo(StoreInfo):
    """What `cache.json` says about a folder of embeddings."""

    logit_scale: float
    """The teacher's own similarity scale (exp'd)."""
    dim: int
    """Embedding width D."""
    crops: int
    """Views per image, K."""
    seed: int
    views: ViewConfig
    """Distribution that the views were drawn from, with the seed."""


@dataclass(slots=True)
class Stored:
    """What is stored of one sample."""

    digest: bytes
    views: list[View]
    columns: dict[str, Tensor]
    """Rows by name; a zero row of `image_embeds` is a view that a black box gave no usable answer to."""


# -------------------------------------------------------------------------------------------------------- reading


class Store:
    """Reader of one folder: parts of shards are opened as they are asked for, those of a set at once."""

    kind: type[StoreInfo]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info: Any = read_info(self.folder, self.kind)
        paths = _part_paths(self.folder) if self.info.set_name else []
        self._part = lru_cache(len(paths) or _OPEN_SHARDS)(_Part)
        self._part_of = {key: path for path in paths for key in self._part(path).rows}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)  # another process maps the files for itself

    def __len__(self) -> int:
        """Samples of a set."""
        return len(self._part_of)

    def __contains__(self, key: str) -> bool:
        return key in self._part_of

    def get(self, key: str, shard: str = "", digest: bytes | None = None, told: str = "") -> Stored | None:
        """What is stored of a sample of a `shard` (short name) or a set, or None; `told` names one of another `digest`."""
        path = _part_path(self.folder, shard) if shard else self._part_of.get(key)
        entry = self._part(path).get(key) if path else None
        if entry is not None and digest not in (None, entry.digest):
            raise UserError(
                f"{self.folder} was written for {self.info.content} than {told or key} has now; run {self.info.tools} "
                "into a new folder"
            )
        return entry

    def refuse(
        self, differences: list[str], shards: Sequence[str], keys: Sequence[str], max_missing_share: float
    ) -> None:
        """Raise a UserError of what differs, of shards without a part, and of keys of which too large a share is missing."""
        if without := [url for url in shards if not _part_path(self.folder, shard_name(url)).is_file()]:
            differences.append(f"{len(without)} of {len(shards)} shards are not in it (first: {without[0]})")
        absent = [key for key in keys if key not in self]
        if len(absent) > max_missing_share * len(keys):
            differences.append(
                f"{len(absent)} of {len(keys)} {self.info.unit} are not in it (first: {absent[0]})"
            )
        if differences:
            raise UserError(
                f"teacher outputs {self.folder} do not fit this run: {'; '.join(differences)}; change the config, or run "
                f"{self.info.tools} to add what is missing"
            )


class TeacherOutputs(Store):
    """Reader of a folder of embeddings."""

    kind = OutputsInfo
    info: OutputsInfo

    def __init__(self, folder: str | Path, teacher_view: Literal["same", "clean"] = "same") -> None:
        """With `clean` the student is shown views of its own, whose target is the stored vector of the whole picture."""
        super().__init__(folder)
        self.teacher_view = teacher_view
        self.replays = teacher_view == "same"
        if not self.replays and (self.info.views != CLEAN or self.info.crops != 1):
            raise UserError(
                f"config field data.teacher_view=clean, but {folder} holds {self.info.crops} drawn view(s) an image; "
                "write one with data_tools/embed_labelled.py --clean, or set data.teacher_view=same"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherOutputs, (self.folder, self.teacher_view)

    def check(
        self,
        views: ViewConfig,
        fill: tuple[int, int, int],
        *,
        shards: Sequence[str] = (),
        items: Iterable[Item] = (),
        digest: str | None = None,
        max_missing_share: float = 0.0,
    ) -> None:
        """Refuse a folder that does not fit the run.

        Args:
            views, fill: of the student, which replayed views must suit.
            items: of these `max_missing_share` may be without stored outputs.
            digest: sha256 of the run's teacher; None: any.
        """
        info, differences, keys = self.info, [], [item.key for item in items]
        if bool(info.set_name) != bool(keys):
            differences.append(f"it is of {info.set_name or 'shards'}")
        if self.replays:
            differences += [
                f"data.{name} is {json.dumps(getattr(views, name))} but the views were drawn with {json.dumps(value)}"
                for name, value in vars(info.views).items()
                if getattr(views, name) != value
            ]
            if fill != info.image_spec.fill:
                differences.append(
                    f"the student lays transparent images on {fill}, the teacher on {info.image_spec.fill}"
                )
        if digest is not None and digest != info.digest:
            differences.append(
                f"the run's teacher has digest {digest[:12]}..., the outputs are of {info.source} with {info.digest[:12]}..."
            )
        self.refuse(differences, shards, keys, max_missing_share)


class _Part:
    """One file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            tensors = load_file(path)
            text = bytes(tensors.pop("keys").numpy()).decode("utf-8")
            self._digests = tensors.pop("digests")
        except (OSError, SafetensorError, KeyError, UnicodeDecodeError) as error:
            raise UserError(
                f"teacher outputs {path} cannot be read ({error}); delete the file and embed again"
            ) from None
        self.rows = {key: row for row, key in enumerate([] if text == "\n" else text.split("\n"))}
        self._views = {name: tensors.pop(name) for name in _VIEWS if name in tensors}
        counts = tensors.pop("counts", None)
        self._ends = None if counts is None else [0, *counts.cumsum(0).tolist()]
        self._columns = tensors

    def get(self, key: str) -> Stored | None:
        row = self.rows.get(key)
        if row is None:
            return None
        here = row if self._ends is None else slice(self._ends[row], self._ends[row + 1])
        columns = {name: values[here] for name, values in self._columns.items()}
        parts = zip(*(values[row].tolist() for values in self._views.values()), strict=True)
        views = [View(tuple(box), bool(flip), tuple(jitter), *more) for box, flip, jitter, *more in parts]
        return Stored(bytes(self._digests[row].tolist()), views, columns)


def read_info(folder: Path, kind: type[StoreInfo]) -> Any:
    """What cache.json says."""
    path, hint = folder / "cache.json", f"write one with {kind.tools}"
    if not path.is_file():
        raise UserError(f"teacher outputs {folder} have no cache.json; {hint}")
    data = files.read_object(path, "teacher outputs", hint)
    try:
        info = data["info"]
        if info["version"] != _VERSION:
            raise UserError(
                f"teacher outputs {folder} have version {info['version']}, this code reads {_VERSION}; {hint}"
            )
        if info.keys() - {one.name for one in fields(kind)}:
            raise UserError(f"teacher outputs {folder} are of another kind of data; {hint}")
        for name, part in (("image_spec", ImageSpec), ("views", ViewConfig)):
            if name in info:
                tuples: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in info[name].items()}
                info = info | {name: part(**tuples)}
        return kind(**info)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {hint}") from None


def _part_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _part_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# -------------------------------------------------------------------------------------------------------- writing


@dataclass(slots=True)
class Prepared:
    """A sample ready to be embedded."""

    key: str
    image: bytes
    """The file; of a chat what its digest is over."""
    views: list[View]
    pixels: list[Tensor]
    """uint8 [h,w,3] of each view, at the teacher's input size."""
    text: str = ""
    chat: Any = None


Samples = Iterable[Prepared | BadSample]
Embed = Callable[[list[Prepared]], dict[str, Tensor]]
"""What a teacher says about some samples: columns, a row a sample."""
Progress = Callable[[str], object]


def image_embeds(
    encoder: ImageEncoder, info: OutputsInfo, batch_size: int, device: torch.device | str
) -> Embed:
    """The column `image_embeds` [n,K,D], at most `batch_size` views a forward pass."""

    @torch.inference_mode()
    def embed(batch: list[Prepared]) -> dict[str, Tensor]:
        pixels = [view for one in batch for view in one.pixels]
        chunks = (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))
        rows = [encoder.encode_image(normalise(chunk, info.image_spec).to(device)).cpu() for chunk in chunks]
        return {"image_embeds": torch.cat(rows).view(len(batch), info.crops, -1)}

    return embed


@dataclass
class Writer:
    """Fills a folder with what `embed` says of what `make` makes of items; data_tools/shard_writer.py has one for shards.

    What the folder holds already is not embedded again: the same call continues an interrupted one, and other items add
    to it. Samples that cannot be used are left out and counted by reason in the result. Ranks share the files.
    """

    folder: Path
    info: StoreInfo
    embed: Embed
    per_call: int
    """Most samples that `embed` is given at a time."""
    make: Callable[[Any], Prepared]
    """Raises BadSample for one that cannot be used."""
    progress: Progress

    def items(self, items: Sequence[Any], part_size: int = 2000, workers: int = 0) -> Counter[str]:
        """Items with a `key` that no other one has, as `vlmkd.data.labelled.Item`; a file per `part_size` of them."""
        info = self.info
        if twice := [key for key, count in Counter(item.key for item in items).items() if count > 1]:
            raise UserError(f"{info.set_name}: {len(twice)} keys name two {info.unit} (first: {twice[0]})")
        self.start()
        todo = missing_items(items, self.folder)
        stem = re.sub(r"[^\w.-]+", "_", info.set_name)
        first = max((int(path.stem.rpartition("-")[2]) for path in _part_paths(self.folder)), default=-1) + 1
        parts = []
        for number, start in enumerate(range(0, len(todo), part_size), first):
            chunk = todo[start : start + part_size]
            told = f"{info.set_name}: {start + len(chunk)}/{len(todo)} {info.unit}"
            parts.append((f"{stem}-{number:05d}", told, made(chunk, self.make, workers)))
        return self.write(parts)

    def start(self) -> None:
        """Write cache.json, or check that the one there says the same."""
        files.new_folder(self.folder, "--out")
        if not (self.folder / "cache.json").exists():
            if _part_paths(self.folder):
                raise UserError(
                    f"--out {self.folder} has safetensors files but no cache.json; name an empty folder"
                )
            return self._write_info()
        old, new = asdict(read_info(self.folder, type(self.info))), asdict(self.info)
        if differing := [f"{name} {old[name]} (now {new[name]})" for name in new if old[name] != new[name]]:
            raise UserError(
                f"--out {self.folder} holds outputs made with {'; '.join(differing)}; name another folder"
            )

    def _write_info(self) -> None:
        parts = {}
        for path in _part_paths(self.folder):
            with safe_open(path, framework="pt") as file:
                parts[path.stem] = json.loads(file.metadata()["part"])
        files.write_json(self.folder / "cache.json", {"info": asdict(self.info), "parts": parts}, "--out")

    def write(self, parts: Sequence[tuple[str, str, Samples]]) -> Counter[str]:
        """Write each part: its name, what to tell, and its samples."""
        skipped: Counter[str] = Counter()
        started, done = time.monotonic(), 0
        distributed.barrier()  # every rank has seen which parts are to be written
        parts = parts[distributed.rank() :: distributed.world_size()]
        for number, (name, told, samples) in enumerate(parts, 1):
            kept: list[tuple[str, bytes, list[View]]] = []
            answers: list[dict[str, Tensor]] = []
            good = _without_bad(samples, skipped)
            while batch := list(itertools.islice(good, self.per_call)):
                answers.append(self.embed(batch))
                kept += [(one.key, sample_digest(one.image, one.text), one.views) for one in batch]
            if kept or not self.info.set_name:
                _save(_part_path(self.folder, name), kept, answers, self.info)
            done += len(kept)
            elapsed = max(time.monotonic() - started, 1e-3)
            self.progress(
                f"{told}: {len(kept)} samples, {done / elapsed:.1f} samples/s, {sum(skipped.values())} skipped, "
                f"ETA {elapsed / number * (len(parts) - number) / 60:.1f} min"
            )
        found = distributed.gather_objects(skipped)
        if distributed.is_main():
            self._write_info()
        return sum(found, Counter())


def missing_items(items: Sequence[Any], folder: Path) -> list[Any]:
    """Those that no part of `folder` holds."""
    done = {key for path in _part_paths(folder) for key in _Part(path).rows}
    return [item for item in items if item.key not in done]


def _without_bad(samples: Samples, skipped: Counter[str]) -> Iterator[Prepared]:
    for sample in samples:
        if isinstance(sample, BadSample):
            skipped[sample.reason] += 1
        else:
            yield sample


def _save(
    path: Path, kept: list[tuple[str, bytes, list[View]]], answers: list[dict[str, Tensor]], info: StoreInfo
) -> None:
    digests = [digest for _, digest, _ in kept]
    keys = "\n".join(key for key, _, _ in kept).encode("utf-8") or b"\n"
    tensors = {}
    for name in answers[0] if answers else ():
        column = torch.cat([answer[name] for answer in answers])
        tensors[name] = column.to(getattr(torch, info.dtype)) if column.is_floating_point() else column
    if isinstance(info, OutputsInfo):
        views = [view for _, _, own in kept for view in own]
        for name, (attribute, kind, shape) in _VIEWS.items():
            if name not in ("hues", "greys") or info.views.hue or info.views.grayscale:
                values = torch.tensor([getattr(view, attribute) for view in views], dtype=kind)
                tensors[name] = values.view(len(kept), info.crops, *shape)
    tensors["digests"] = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).view(-1, 32)
    tensors["keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8)
    # One metadata entry: safetensors writes several in no fixed order, and the same outputs should be the same bytes.
    summary = {"samples": len(kept), "digest": hashlib.sha256(b"".join(digests)).hexdigest()}
    with files.new_file(path, "--out") as partial:
        try:
            save_file(tensors, partial, metadata={"part": json.dumps(summary)})
        except SafetensorError as error:
            raise OSError(str(error)) from None


# ------------------------------------------------------------------------------------------- samples to be embedded


def item_views(item: Item, info: OutputsInfo, max_pixels: int) -> Prepared:
    """The views that `info` asks for of an item."""
    return drawn_views(item.key, item.key, item.read(), info, max_pixels)


def drawn_views(
    key: str, name: str, image: bytes, info: OutputsInfo, max_pixels: int, text: str = ""
) -> Prepared:
    """The views of an image that `info` asks for, drawn from its `name`."""
    size = checked_size(image, max_pixels)
    rngs = (random.Random(f"{info.seed}/{name}/{number}") for number in range(info.crops))
    views = [info.views.draw(*size, rng) for rng in rngs]
    pixels = views_of(image, size, views, [info.image_spec])
    return Prepared(key, image, views, [per_spec[0] for per_spec in pixels], text)


def made(items: Sequence[Any], make: Callable[[Any], Prepared], workers: int = 0) -> Iterator[Any]:
    """What `make` makes of each item, or the BadSample that it raises, in order, in `workers` processes."""
    source: Any = items
    for one in DataLoader(source, batch_size=None, collate_fn=partial(_made, make), num_workers=workers):
        if isinstance(one, UserError):
            raise one
        yield one


def _made(make: Callable[[Any], Prepared], item: Any) -> Prepared | BadSample | UserError:
    try:
        return make(item)
    except (BadSample, UserError) as error:
        return error  # raised by the process that asked
