"""Teacher embeddings stored beside the samples: written once, then training needs no teacher.

A cache folder belongs to one teacher and one set of shards. `cache.json` says what was computed how; each shard has
one safetensors file of the same name with N samples, K views an image and width D:

    image_embeds float16 [N,K,D]   text_embeds float16 [N,D]   boxes int32 [N,K,4] (left, top, width, height)
    flips uint8 [N,K]   jitter float32 [N,K,3]   digests uint8 [N,32] (sha256 of image bytes + caption)
    keys uint8 (UTF-8, one line a key)   with hue or grayscale also: hues float32 [N,K]   greys uint8 [N,K]

The idea of storing several augmentations with their parameters is MobileCLIP's dataset reinforcement.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmkd import files
from vlmkd.config import DataConfig
from vlmkd.data.decode import BadImageError
from vlmkd.data.samples import BadSample, checked_size, members, sample_digest, unpack, view_config, views_of
from vlmkd.data.shards import read_shard, shard_name
from vlmkd.data.transforms import View, ViewConfig, normalise
from vlmkd.errors import UserError
from vlmkd.files import new_folder, read_object
from vlmkd.image_spec import ImageSpec
from vlmkd.predictors import DualEncoder

VERSION = 1
_OPEN_FILES = 4  # a shuffle block rarely spans more shards than this


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What `cache.json` says about a cache."""

    source: str
    """The teacher as its user named it."""
    digest: str
    """sha256 over the teacher's weights."""
    logit_scale: float
    """The teacher's own similarity scale (exp'd)."""
    dim: int
    """Embedding width D."""
    crops: int
    """Views per image, K."""
    seed: int
    """Seed of the views."""
    image_spec: ImageSpec
    """The teacher's input."""
    views: ViewConfig
    """Distribution that the views were drawn from."""
    set_name: str = ""
    """Labelled set that the images are of (`stored_outputs`); empty for shards."""
    dtype: str = "float16"
    """Type of the stored image embeddings."""
    version: int = VERSION
    """Layout of the files; changed whenever old files would be misread."""


@dataclass(slots=True)
class CachedSample:
    """The stored part of one sample."""

    digest: bytes
    views: list[View]
    image_embeds: Tensor
    """float16 [K,D]."""
    text_embed: Tensor
    """float16 [D]."""


class TeacherCache:
    """Reader of one cache folder; opens shard files as they are asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Read `cache.json`.

        Raises:
            UserError: no or an unreadable cache.json, or one of another version.
        """
        self.folder = Path(folder)
        self.info = read_info(self.folder)
        self._files: dict[str, ShardFile] = {}

    def check(
        self, views: ViewConfig, fill: tuple[int, int, int], shards: list[str], digest: str | None = None
    ) -> None:
        """Refuse a cache that does not fit the run; the message names what differs.

        Args:
            views: the run's view distribution.
            fill: the colour under transparent pixels that the run's student uses.
            shards: the source's shards; each needs a finished file.
            digest: sha256 of the teacher that the run's config names; None when it names none.
        """
        differences = [
            f"data.{name} is {_plain(getattr(views, name))} but the cache was written with {_plain(value)}"
            for name, value in dataclasses.asdict(self.info.views).items()
            if getattr(views, name) != value
        ]
        if fill != self.info.image_spec.fill:
            differences.append(
                f"the student lays transparent images on {fill}, the cached teacher on {self.info.image_spec.fill}"
            )
        if digest is not None and digest != self.info.digest:
            differences.append(
                f"the run's teacher has weights {digest[:12]}..., the cache is of {self.info.source} "
                f"with {self.info.digest[:12]}..."
            )
        missing = [url for url in shards if not self.path_of(shard_name(url)).is_file()]
        if missing:
            differences.append(f"{len(missing)} of {len(shards)} shards are not in it (first: {missing[0]})")
        if differences:
            mend = "change the config, or run data_tools/embed_teacher.py (it continues an unfinished folder)"
            raise UserError(
                f"teacher cache {self.folder} does not fit this run: {'; '.join(differences)}; {mend}"
            )

    def path_of(self, shard: str) -> Path:
        """File of the shard with this short name."""
        return self.folder / f"{shard}.safetensors"

    def get(self, shard: str, key: str) -> CachedSample | None:
        """The stored part of a sample, or None when the cache lacks it."""
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                del self._files[next(iter(self._files))]
            self._files[shard] = ShardFile(self.path_of(shard))
        return self._files[shard].get(key)


class ShardFile:
    """One shard's file, memory-mapped: its tensors take no memory until rows of them are read."""

    def __init__(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            self.rows = {key: row for row, key in enumerate(_unpack_keys(file.get_tensor("keys")))}
            self._boxes, self._flips = file.get_tensor("boxes"), file.get_tensor("flips")
            self._jitter, self._digests = file.get_tensor("jitter"), file.get_tensor("digests")
            self._image, self._text = file.get_tensor("image_embeds"), file.get_tensor("text_embeds")
            recoloured = "hues" in file.keys()  # noqa: SIM118 - not a dict
            shape = self._flips.shape
            self._hues = file.get_tensor("hues") if recoloured else torch.zeros(shape)
            self._greys = file.get_tensor("greys") if recoloured else torch.zeros(shape, dtype=torch.uint8)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"teacher cache file {path} cannot be read ({error}); delete it and embed again"
            ) from None

    def get(self, key: str) -> CachedSample | None:
        """The stored part of a sample, or None when the file lacks it."""
        row = self.rows.get(key)
        if row is None:
            return None
        columns = (self._boxes, self._flips, self._jitter, self._hues, self._greys)
        views = [
            View(tuple(box), bool(flip), tuple(jitter), hue, bool(grey))
            for box, flip, jitter, hue, grey in zip(
                *(column[row].tolist() for column in columns), strict=True
            )
        ]
        digest = bytes(self._digests[row].tolist())
        return CachedSample(digest, views, self._image[row], self._text[row])


def read_info(folder: Path, tool: str = "embed_teacher.py") -> CacheInfo:
    """What cache.json says; `tool` is the data tool that an error names.

    Raises:
        UserError: no or an unreadable cache.json, or one of another version.
    """
    path = folder / "cache.json"
    mend = f"write one with `python data_tools/{tool} --out FOLDER ...`"
    if not path.is_file():
        raise UserError(f"teacher cache {folder} has no cache.json; {mend}")
    data = read_object(path, "teacher cache", mend)
    try:
        version = data["info"]["version"]
        if version != VERSION:
            raise UserError(
                f"teacher cache {folder} has version {version}, this code reads {VERSION}; {mend}"
            )
        return _info_from(data["info"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {mend}") from None


def _info_from(data: dict[str, Any]) -> CacheInfo:
    def tuples(part: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in part.items()}

    spec, views = tuples(data["image_spec"]), tuples(data["views"])
    return CacheInfo(**{**data, "image_spec": ImageSpec(**spec), "views": ViewConfig(**views)})


# -------------------------------------------------------------------------------------------------------- writing


@dataclass
class Columns:
    """What one shard's file is made of, row by row."""

    keys: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    views: list[list[View]] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)


def embed_shards(
    encoder: DualEncoder,
    shards: list[str],
    out: str | Path,
    *,
    source: str,
    digest: str,
    data: DataConfig,
    crops: int,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> Counter[str]:
    """Embed `crops` views of every image, and every caption, of `shards` into the cache folder `out`.

    Shards whose file is there already are skipped, so the same call continues an interrupted one. Bad samples are
    left out and counted by reason in the result; `data` gives crop options, member names and max_pixels.

    Raises:
        UserError: `out` holds a cache made otherwise, two shards have the same name, or a shard is broken.
    """
    folder = Path(out)
    names = [shard_name(url) for url in shards]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"--shards names {twice[0]}.tar {names.count(twice[0])} times; a cache needs distinct file names"
        )
    views = view_config(data)
    width = encoder.encode_text(["a"]).shape[-1]
    info = CacheInfo(
        source=source, digest=digest, logit_scale=float(encoder.logit_scale), dim=width, crops=crops, seed=seed,
        image_spec=encoder.image_spec, views=views,
    )  # fmt: skip
    start_folder(folder, info)
    skipped: Counter[str] = Counter()
    todo = [url for url in shards if not (folder / f"{shard_name(url)}.safetensors").is_file()]
    started, done = time.monotonic(), 0
    for number, url in enumerate(todo, 1):
        columns = _embed_shard(encoder, url, info, data, batch_size, torch.device(device), skipped)
        save_shard(folder / f"{shard_name(url)}.safetensors", columns, info)
        done += len(columns.keys)
        elapsed = time.monotonic() - started
        rate = done / max(elapsed, 1e-3)
        eta = elapsed / number * (len(todo) - number)
        progress(
            f"shard {number + len(shards) - len(todo)}/{len(shards)} {shard_name(url)}: {len(columns.keys)} samples, "
            f"{rate:.1f} samples/s, {sum(skipped.values())} skipped, ETA {eta / 60:.1f} min"
        )
    write_json(folder, info)
    return skipped


def start_folder(folder: Path, info: CacheInfo) -> None:
    """Write cache.json, or check that the one there says the same."""
    new_folder(folder, "--out")
    if not (folder / "cache.json").exists():
        if any(folder.glob("*.safetensors")):
            raise UserError(f"--out {folder} has safetensors files but no cache.json; name an empty folder")
        write_json(folder, info)
        return
    old = dataclasses.asdict(read_info(folder))
    new = dataclasses.asdict(info)
    differing = [
        f"{name} {_plain(old[name])} (now {_plain(new[name])})" for name in new if old[name] != new[name]
    ]
    if differing:
        raise UserError(f"--out {folder} holds a cache made with {'; '.join(differing)}; name another folder")


def write_json(folder: Path, info: CacheInfo) -> None:
    """Write cache.json for the files that are in the folder."""
    shards = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shards[path.stem] = json.loads(file.metadata()["shard"])
    files.write_json(folder / "cache.json", {"info": dataclasses.asdict(info), "shards": shards}, "--out")


@torch.inference_mode()
def _embed_shard(
    encoder: DualEncoder,
    url: str,
    info: CacheInfo,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    skipped: Counter[str],
) -> Columns:
    columns = Columns()
    images: list[Tensor] = []
    texts: list[str] = []

    def flush(limit: int) -> None:
        """Embed while at least `limit` images wait."""
        while images and len(images) >= limit:
            part = normalise(images[:batch_size], info.image_spec).to(device)
            columns.images.append(encoder.encode_image(part).to("cpu", torch.float16))
            del images[:batch_size]
        while texts and len(texts) >= limit:
            columns.texts.append(encoder.encode_text(texts[:batch_size]).to("cpu", torch.float16))
            del texts[:batch_size]

    for item in _prepared(url, info, data):
        if isinstance(item, BadSample):
            if item.reason == "broken_tar":
                raise UserError(f"shard {item.detail} is broken; fetch it again, or leave it out of --shards")
            skipped[item.reason] += 1
            continue
        key, digest, views, pixels, text = item
        columns.keys.append(key)
        columns.digests.append(digest)
        columns.views.append(views)
        images.extend(pixels)
        texts.append(text)
        flush(batch_size)
    flush(1)
    return columns


def _prepared(
    url: str, info: CacheInfo, data: DataConfig
) -> Iterator[BadSample | tuple[str, bytes, list[View], list[Tensor], str]]:
    """Key, digest, views, pixels of each view and caption of each good sample; the bad ones with their reason."""
    for raw in read_shard(url, members(data), shard_cache=data.shard_cache):
        encoded = unpack(raw, data.image_keys, data.text_key)
        if isinstance(encoded, BadSample):
            yield encoded
            continue
        try:
            size = checked_size(encoded.image, data.max_pixels)
            views = [
                info.views.draw(*size, random.Random(f"{info.seed}/{encoded.name}/{number}"))
                for number in range(info.crops)
            ]
            pixels = views_of(encoded.image, size, views, [info.image_spec])
        except BadImageError as error:
            yield BadSample(error.reason, encoded.name, str(error))
            continue
        digest = sample_digest(encoded.image, encoded.text)
        yield raw.key, digest, views, [per_spec[0] for per_spec in pixels], encoded.text


def save_shard(path: Path, columns: Columns, info: CacheInfo) -> None:
    """Write one file whole or not at all; a labelled set's has texts of width 0."""
    number, crops = len(columns.keys), info.crops
    views = [view for row in columns.views for view in row]
    dtype = getattr(torch, info.dtype)
    images = torch.cat(columns.images).to(dtype) if columns.images else torch.empty(0, info.dim, dtype=dtype)
    no_texts = torch.empty(number, 0 if info.set_name else info.dim, dtype=torch.float16)
    tensors = {
        "image_embeds": images.view(number, crops, info.dim),
        "text_embeds": torch.cat(columns.texts) if columns.texts else no_texts,
        "boxes": torch.tensor([view.box for view in views], dtype=torch.int32).view(number, crops, 4),
        "flips": torch.tensor([view.flip for view in views], dtype=torch.uint8).view(number, crops),
        "jitter": torch.tensor([view.jitter for view in views], dtype=torch.float32).view(number, crops, 3),
        "digests": torch.tensor([list(digest) for digest in columns.digests], dtype=torch.uint8).view(
            number, 32
        ),
        "keys": _pack_keys(columns.keys),
    }
    if info.views.hue or info.views.grayscale:
        tensors["hues"] = torch.tensor([view.hue for view in views], dtype=torch.float32).view(number, crops)
        tensors["greys"] = torch.tensor([view.grey for view in views], dtype=torch.uint8).view(number, crops)
    # One metadata entry: safetensors writes several in no fixed order, and the same cache should be the same bytes.
    summary = {"samples": number, "digest": hashlib.sha256(b"".join(columns.digests)).hexdigest()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"shard": json.dumps(summary)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out {path.parent}: cannot write {path.name} ({error}); free space and run again"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _pack_keys(keys: list[str]) -> Tensor:
    return torch.frombuffer(bytearray("\n".join(keys).encode("utf-8") or b"\n"), dtype=torch.uint8)


def _unpack_keys(packed: Tensor) -> list[str]:
    text = bytes(packed.numpy()).decode("utf-8")
    return [] if text == "\n" else text.split("\n")


def _plain(value: Any) -> Any:
    """Tuples as lists, the way a config shows them."""
    return list(value) if isinstance(value, tuple) else value
