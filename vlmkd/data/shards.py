"""Shard lists, the samples of one shard in a fixed order, and an endless, resumable stream of them.

A *shard* is a tar in webdataset layout; a *raw sample* is a group of members with one key, or a marker for a shard that
could not be read to its end. Its *position* is (epoch, ordinal of the shard in the worker's share of it, index in the
shard). Bad samples have one too, so positions do not depend on what later steps drop.

The tar reading is not webdataset's, because Python's tarfile takes a header that is missing, torn or garbage for the
end of the archive: a truncated download would look like a short shard.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import random
import re
import tarfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import httpx

from vlmkd import distributed
from vlmkd.data.samples import RawSample
from vlmkd.errors import UserError
from vlmkd.files import new_file, one_line, read_object

log = logging.getLogger(__name__)

_MOST_SHARDS = 1_000_000  # of one entry; LAION-5B has 231,000
_NUMBERS = re.compile(r"\{(-?\d{1,30})\.\.(-?\d{1,30})")
_BY_COMMAND = ("pipe:", "gs://", "hf://", "ais://")
"""What webdataset opens by a command: the shell's, or gsutil, curl and ais, which must be installed."""
_RETRIES = 5  # in a row without a byte
_RETRY_PAUSE = 0.5  # seconds before the first retry, doubled for each next one: 15 s in all
_TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 1 << 20
# webdataset's rule: the key ends at the file name's first dot
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class Unreachable(Exception):
    """A server gives no further bytes of a file."""


def expand(shards: list[str], where: str) -> list[str]:
    """Every shard that these brace ranges, globs and `emoji:` names stand for, in order."""
    found = [name for entry in shards for name in _expand_one(entry, where)]
    if not found:
        raise UserError(f"{where} is empty; name shards, e.g. data/{{00000..00099}}.tar")
    return found


def _expand_one(entry: str, where: str) -> list[str]:
    if entry.startswith("emoji:"):
        from vlmkd.datasets.emoji import resolve

        return resolve(entry)
    found = []
    if entry.startswith("pipe:") and distributed.is_main():
        log.warning("%s: a shell will run `%s`; do so only with configs that you trust", where, entry[5:])
    for name in _brace_range(entry, where):
        path = os.path.expanduser(name)
        matches = [name] if is_remote(name) else [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matches:
            raise UserError(f"{where}: no file matches {name} (looked from {os.getcwd()}); correct the path")
        if folders := [match for match in matches if os.path.isdir(match)]:
            inside = os.path.join(folders[0], "*.tar")
            raise UserError(f"{where}: {folders[0]} is a folder; name its shards: {inside}")
        found += matches
    return found


def _brace_range(entry: str, where: str) -> list[str]:
    from braceexpand import braceexpand

    sizes = [abs(int(last) - int(first)) for first, last in _NUMBERS.findall(entry)]
    names: list[str] = []
    if max(sizes, default=0) < _MOST_SHARDS:  # braceexpand makes a list of each range
        try:
            names = list(itertools.islice(braceexpand(entry), _MOST_SHARDS + 1))
        except ValueError as error:
            raise UserError(f"{where}: {entry} is no brace range ({error}); write {{00000..00099}}") from None
    if not 0 < len(names) <= _MOST_SHARDS:
        raise UserError(f"{where}: {entry} is more than {_MOST_SHARDS} shards; correct the range")
    return names


def is_remote(name: str) -> bool:
    """True for shards that are not local files."""
    return name.startswith(("http://", "https://", *_BY_COMMAND))


def shard_name(url: str) -> str:
    """The file name without `.tar` and what follows; of a pipe that of the last word with one."""
    if url.startswith("pipe:"):
        words = [word.strip("'\"") for word in url[5:].split() if ".tar" in word]
        if not words:
            return "pipe-" + hashlib.sha256(url.encode()).hexdigest()[:12]
        url = words[-1]
    path = urllib.parse.urlparse(url).path if "://" in url else url
    return os.path.basename(path).split(".tar")[0]


def check_count(num_shards: int, world_size: int, workers: int, where: str) -> None:
    """Refuse fewer shards than there are logical workers on all ranks."""
    workers = max(workers, 1)
    streams, fitting = world_size * workers, num_shards // world_size
    if num_shards < streams:
        mend = f"set data.workers={fitting}" if fitting else f"use at most {num_shards} ranks"
        raise UserError(
            f"{where} has {num_shards} shards, but {world_size} ranks x {workers} workers need {streams}; {mend} or re-shard "
            f"with `python data_tools/images_to_shards.py --reshard SHARDS --out FOLDER --num-shards {streams}`"
        )


# ---------------------------------------------------------------------------------------------- opening a shard


@contextmanager
def _open_shard(url: str, shard_cache: str) -> Iterator[Any]:
    """The bytes of a shard as tarfile takes them; the folder `shard_cache`, where named, keeps http(s) shards."""
    if url.startswith(_BY_COMMAND):
        with _open_by_command(url) as stream:
            yield stream
    elif is_remote(url) and not shard_cache:
        # Not webdataset's opener: its curl cannot go on in the middle of a file when a connection breaks.
        with closing(_blocks(url)) as blocks:
            yield SimpleNamespace(read=lambda size: next(blocks, b""))  # tarfile takes blocks of any length
    else:
        with open(download(url, Path(shard_cache)) if is_remote(url) else url, "rb") as file:
            yield file


@contextmanager
def _open_by_command(url: str) -> Iterator[Any]:
    """Output of a command; a failing one is an OSError once its output was read to the end."""
    from webdataset.gopen import gopen

    pipe = gopen(url, "rb")  # closes its stream when it goes
    process, stream = pipe.proc, pipe.proc.stdout
    try:
        yield stream
        while stream.read(_CHUNK):  # a tar is padded behind its end mark; closing early would fail the writer
            pass
        if process.wait() != 0:
            raise OSError(f"`{url.removeprefix('pipe:')}` ended with exit code {process.returncode}")
    finally:
        process.kill()
        stream.close()
        process.wait()


def _blocks(url: str) -> Generator[bytes, None, None]:
    """The bytes of an http(s) file; where a connection breaks, another one goes on there.

    Raises:
        Unreachable: the server refuses, or gives nothing six times in a row.
    """
    position = failures = 0
    while True:
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={position}-"} if position else {})}
        try:
            with httpx.stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as reply:
                reply.raise_for_status()
                skip = 0 if reply.status_code == 206 else position  # a server without ranges starts over
                for block in reply.iter_raw():
                    new, skip = block[skip:], max(skip - len(block), 0)
                    if new:
                        position, failures = position + len(new), 0
                        yield new
            return
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            code = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
            if failures == _RETRIES or (400 <= code < 500 and code != 429):
                raise Unreachable(f"connection closed at byte {position}: {one_line(error)}") from None
        time.sleep(_RETRY_PAUSE * 2**failures)
        failures += 1


def download(url: str, folder: Path) -> Path:
    """`url` as a file in `folder`, fetched when it is not there yet.

    Raises:
        Unreachable: see `_blocks`.
    """
    name = os.path.basename(urllib.parse.urlparse(url).path)
    final = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not final.exists():
        with new_file(final, "data.shard_cache:") as partial, partial.open("wb") as file:
            for block in _blocks(url):
                file.write(block)
    return final


# -------------------------------------------------------------------------------------------- samples of a shard


class StrictTarInfo(tarfile.TarInfo):
    """A header reader for which nothing but the end mark ends an archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from None


def read_shard(
    url: str, members: frozenset[str] | None = None, *, skip: int = 0, shard_cache: str = ""
) -> Iterator[RawSample]:
    """The raw samples of a shard after the first `skip`, with the named members only (None: all).

    Neighbouring members of one key make a sample; a key that comes again is a `duplicate_key`. What ends the reading
    early gives one `broken_tar` in place of the sample that was being read.
    """
    name = shard_name(url)
    seen: set[str] = set()
    extensions: set[str] = set()
    index = 0
    sample: RawSample | None = None
    try:
        for key, extension, file in _open_members(url, members, shard_cache):
            if sample is None or sample.key != key or extension in extensions:
                if sample is not None:
                    if index >= skip:
                        yield sample
                    index += 1
                sample, extensions = RawSample(name, key), set()
                if key in seen:
                    sample.reason, sample.detail = "duplicate_key", "this key came earlier in the shard"
                seen.add(key)
            extensions.add(extension)
            if file is not None:
                sample.members[extension] = file.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error, Unreachable) as error:
        detail = f"{url}: {type(error).__name__}: {one_line(error)}"
        sample = RawSample(name, "", reason="broken_tar", detail=detail)
    if sample is not None and index >= skip:
        yield sample


def _open_members(
    url: str, wanted: frozenset[str] | None, shard_cache: str
) -> Iterator[tuple[str, str, IO[bytes] | None]]:
    """(key, lower-case extension, content to be read before the next one, or None when not wanted) of each regular file."""
    with (
        _open_shard(url, shard_cache) as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as tar,
    ):
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
            match = _MEMBER.match(info.name)
            if not info.isreg() or match is None or info.name.startswith("__"):
                continue
            key, extension = match[1], match[2].lower()
            yield key, extension, tar.extractfile(info) if wanted is None or extension in wanted else None


# ----------------------------------------------------------------------------------------------- endless stream


class ShardStream:
    """Endless raw samples of one source for one of `workers` logical workers, shuffled in blocks, resumable.

    Each epoch orders all shards by (salt, epoch) and deals them to the workers in turn. Each block of `shuffle`
    neighbouring raw samples of a worker (fewer at the end of an epoch) is given out in an order of its own, while the
    next one is read, sample for sample. The state is where a block starts and how many of its samples were given out; a
    resumed stream reads the block again, without decoding.
    """

    def __init__(
        self,
        shards: list[str],
        read: Callable[..., Iterator[RawSample]],
        *,
        salt: str,
        worker: int,
        workers: int,
        shuffle: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        assert len(shards) >= workers
        self._shards, self._read, self._salt = shards, read, salt
        self._worker, self._workers, self._size = worker, workers, max(shuffle, 1)
        state = state or {"start": [0, 0, 0], "block": 0, "given": 0}
        self._block, self._given = state["block"], state["given"]
        self._reader = self._raw(*state["start"])
        self._ahead: list[RawSample] = []
        self._ahead_full = False
        self._next_block()
        del self._current[len(self._current) - self._given :]
        for _ in range(self._given):
            self._extend()

    def __iter__(self) -> ShardStream:
        return self

    def __next__(self) -> RawSample:
        if not self._current:
            self._block, self._given = self._block + 1, 0
            self._next_block()
        self._given += 1
        self._extend()
        return self._current.pop()

    @property
    def passes(self) -> int:
        """How often this worker has gone through its shards."""
        return self._start[0]

    def state_dict(self) -> dict[str, Any]:
        return {"start": list(self._start), "block": self._block, "given": self._given}

    def _next_block(self) -> None:
        while not self._ahead_full:
            self._extend()
        block, self._ahead, self._ahead_full = self._ahead, [], False
        self._start = block[0].position
        random.Random(f"{self._salt}/block/{self._worker}/{self._block}").shuffle(block)
        self._current = block[::-1]  # taken from its end

    def _extend(self) -> None:
        """Read one raw sample into the next block, unless that is complete."""
        if self._ahead_full:
            return
        sample = next(self._reader)
        if sample is None:
            self._ahead_full = bool(self._ahead)  # an epoch's end closes a block, but makes no empty one
            return
        self._ahead.append(sample)
        self._ahead_full = len(self._ahead) == self._size

    def _raw(self, epoch: int, ordinal: int, index: int) -> Iterator[RawSample | None]:
        """From a position on; None after each epoch."""
        fresh = (ordinal, index) == (0, 0)
        while True:
            count = 0
            share = self.epoch_order(epoch)[self._worker :: self._workers]
            for number in range(ordinal, len(share)):
                for sample in self._read(self._shards[share[number]], skip=index):
                    sample.position = (epoch, number, index)
                    index += 1
                    count += 1
                    yield sample
                index = 0
            if count == 0 and fresh:
                names = ", ".join(self._shards[number] for number in share[:3])
                told = f"{len(share)} shards hold no samples at all ({names} ...); check them"
                raise UserError(f"data.sources: {told}")
            yield None
            epoch, ordinal, fresh = epoch + 1, 0, True

    def epoch_order(self, epoch: int) -> list[int]:
        """Indices of all shards, before they are dealt to workers."""
        order = list(range(len(self._shards)))
        random.Random(f"{self._salt}/order/{epoch}").shuffle(order)
        return order


def known_samples(shards: list[str]) -> int | None:
    """Samples in local `shards` by the sizes.json beside them (data_tools/index_shards.py); None unless all are there."""
    if any(map(is_remote, shards)):
        return None
    paths, sizes = list(map(Path, shards)), {}
    for folder in {path.parent for path in paths}:
        file = folder / "sizes.json"
        sizes[folder] = read_object(file, "shard sizes") if file.is_file() else {}
    found: list[Any] = [sizes[path.parent].get(path.name) for path in paths]
    return sum(found) if all(isinstance(count, int) for count in found) else None
