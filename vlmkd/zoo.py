"""Named models: what they are, where they come from, and a verified local copy of each.

They are listed in `projects/<paper>/zoo.yaml`, those that recipes start from in `zoo.yaml` beside this file; no torch is
imported for them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from vlmkd.errors import UserError, did_you_mean
from vlmkd.files import cache_root, one_line, read_object, write_json

if TYPE_CHECKING:
    import httpx

PIN_AT_FIRST_DOWNLOAD = "pinned at first download"
REPOSITORY = Path(__file__).resolve().parents[1]
HUB = "https://huggingface.co"
ATTEMPTS = 4  # each continues where the last one broke off
BACKOFF_S = 0.5  # before the second try; doubled each time
_PINS, _OFFLINE = "list of pinned digests", "offline mode is on"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the zoo; the comment at the top of `zoo.yaml` says what its fields mean."""

    name: str
    project: str
    kind: Literal["release", "hub", "local", "manual"]
    source: str
    format: str = "clip"
    revision: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    paper_imagenet_top1: float | None = None
    paper: str = ""
    macs_g: float | None = None
    size_mb: float | None = None
    licence: str
    link: str
    teacher: str = ""
    init: str = ""
    sha256: str = PIN_AT_FIRST_DOWNLOAD
    ours: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


@functools.cache
def lists() -> dict[str, dict[str, Any]]:
    """Each project's title, introduction and models; those that recipes start from are last."""
    files = {path.parent.name: path for path in sorted(REPOSITORY.glob("projects/*/zoo.yaml"))}
    files["foundation"] = Path(__file__).with_name("zoo.yaml")
    return {project: yaml.safe_load(path.read_text(encoding="utf-8")) for project, path in files.items()}


@functools.cache
def entries() -> dict[str, Entry]:
    """By name, in the order of the lists."""
    found: dict[str, Entry] = {}
    for project, content in lists().items():
        for row in content["models"]:
            assert row["name"] not in found, f"the zoo names {row['name']} twice"
            found[row["name"]] = Entry(**row, project=project)
    return found


def entry(name: str) -> Entry:
    """The entry called `name` or `zoo:name`."""
    name = name.removeprefix("zoo:")
    if name in entries():
        return entries()[name]
    hint = did_you_mean(name, entries(), "see scripts/download.py --list")
    raise UserError(f"zoo has no model {name}; {hint}")


def cache_folder() -> Path:
    """Where downloads and their pins live: VLMKD_CACHE/zoo, else ~/.cache/vlmkd/zoo."""
    return cache_root() / "zoo"


def weights_file(name: str) -> Path:
    """Of `zoo:NAME` the verified local copy, else the path itself."""
    return _weights(fetch(name)) if name.startswith("zoo:") else Path(name).expanduser()


def _weights(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    told = "holds neither open_clip_model.safetensors nor model.safetensors; delete it and fetch again"
    raise UserError(f"{path} {told}")


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of the file at `path`."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(name: str) -> Path:
    """A verified local copy: a weights file (`release`, `manual`, `local`) or a model folder (`hub`, `local`).

    Hub repositories lie in huggingface_hub's cache. Environment variables: scripts/download.py --help.
    """
    item = entry(name)
    if item.kind == "local":
        path = REPOSITORY / item.source
        if not path.exists():
            raise UserError(f"zoo:{item.name}: {path} of the repository is missing; use a full clone")
        if (digest := sha256_of(_weights(path))) != item.sha256:
            told = f"has sha256 {digest}, zoo.yaml says {item.sha256}; restore it with git checkout"
            raise UserError(f"{path} {told}")
        return path
    from filelock import FileLock  # several ranks may ask at the same time

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{item.name}.lock"):
            return _cached(item, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        raise UserError(f"cannot write {folder}: {error.strerror}; free space or set VLMKD_CACHE") from None


def _cached(item: Entry, folder: Path) -> Path:
    # A file's name in the cache, and on a mirror, is the entry's with the published ending.
    target = folder / (item.name + ("" if item.kind == "hub" else "".join(Path(item.source).suffixes)))
    if target.exists():
        _verify(item, target, target.name)
        return target
    if item.kind == "manual":
        raise UserError(f"zoo:{item.name}: get {item.source} from {item.link} and put it at {target}")
    if item.kind == "hub":
        return _from_hub(item, f"put the files of {item.link} at {target} by hand")
    by_hand = f"put {item.source} at {target} by hand"
    if _is_offline():
        raise UserError(f"zoo:{item.name} is not at {target} and {_OFFLINE}; turn it off, or {by_hand}")
    url = item.source
    if mirror := os.environ.get("VLMKD_MIRROR", ""):
        url = f"{mirror.rstrip('/')}/{target.name}"
    elif url.startswith(f"{HUB}/"):
        url = _hub_host() + url.removeprefix(HUB)
    part = folder / f"{target.name}.part"
    _download(url, part, by_hand)
    _verify(item, part, target.name)
    os.replace(part, target)
    return target


def _verify(item: Entry, path: Path, name: str = "", revision: str = "") -> None:
    """Compare the digest with the known one, or pin it, and `revision`; what differs is set aside under its `name`."""
    digest, pins_file = sha256_of(_weights(path)), cache_folder() / "pins.json"
    pins = _read_pins()
    pin = pins.get(item.name, {})
    stated = item.sha256 != PIN_AT_FIRST_DOWNLOAD
    expected = item.sha256 if stated else pin.get("sha256", digest)
    if digest != expected:
        aside = path.with_name(f"{name}.rejected-{digest[:8]}") if name else path
        if not aside.exists():
            os.replace(path, aside)
        origin = "of zoo.yaml" if stated else "pinned at the first download"
        told = f"zoo:{item.name} has sha256 {digest}, not the {expected} {origin}; kept as {aside}"
        raise UserError(
            f"{told}: delete it and fetch again, or, if you trust it, delete its line in {pins_file}"
        )
    new = pin | ({} if stated else {"sha256": digest}) | ({"revision": revision} if revision else {})
    if new != pin:
        write_json(pins_file, pins | {item.name: new}, _PINS)
        sys.stderr.write(f"zoo:{item.name}: first download, sha256 {digest} pinned in {pins_file}\n")


def _read_pins() -> dict[str, dict[str, str]]:
    path, hint = cache_folder() / "pins.json", "delete that file and call again"
    pins = read_object(path, _PINS, hint) if path.exists() else {}
    if wrong := [name for name, pin in pins.items() if not isinstance(pin, dict)]:
        raise UserError(f"{_PINS} {path} has no pin at {wrong[0]}; {hint}")
    return pins


def _download(url: str, part: Path, by_hand: str) -> None:
    """Fetch `url` into `part`, continuing what an earlier try or call left there."""
    import httpx
    import tenacity

    def worth_repeating(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code >= 500 or error.response.status_code in (408, 416, 429)
        # A first connection that fails is no matter of waiting.
        unconnected = isinstance(error, (httpx.ConnectError, httpx.UnsupportedProtocol))
        return isinstance(error, httpx.TransportError) and not (unconnected and state.attempt_number == 1)

    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS), wait=tenacity.wait_exponential(BACKOFF_S),
        retry=worth_repeating, reraise=True,
    )  # fmt: skip
    headers = {"User-Agent": "vlmkd", "Accept-Encoding": "identity"}
    try:
        with httpx.Client(headers=headers, follow_redirects=True, timeout=30) as client:
            tries(_transfer, client, url, part)
        return
    except httpx.HTTPStatusError as error:
        reason = f"HTTP {error.response.status_code} {error.response.reason_phrase}"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as error:  # the last two of a proxy
        reason = one_line(error)
    kept = f" ({part.stat().st_size} bytes kept; the next call continues)" if part.exists() else ""
    mend = f"check network and proxy, set VLMKD_MIRROR to a base URL that has the file, or {by_hand}"
    raise UserError(f"cannot download {url}: {reason}{kept}; {mend}")


def _transfer(client: httpx.Client, url: str, part: Path) -> None:
    """One request, appended to `part` where the server still has the version that a note beside it names."""
    import httpx
    from tqdm import tqdm

    note = part.with_name(f"{part.name}.etag")
    if part.is_symlink():  # nothing of ours: it would be followed, and what it names appended to
        part.unlink()
    have = part.stat().st_size if part.exists() and note.exists() else 0
    asked = {"Range": f"bytes={have}-", "If-Range": note.read_text(encoding="utf-8")} if have else {}
    with client.stream("GET", url, headers=asked) as reply:
        if reply.status_code == 416:  # there is nothing behind what we have
            part.unlink()
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0
        told = reply.headers.get("Content-Range", "")
        if have and not told.startswith(f"bytes {have}-"):
            raise httpx.RemoteProtocolError(f"the server continued at {told} instead of byte {have}")
        note.unlink(missing_ok=True)
        etag = reply.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):  # a weak one does not tell that bytes are the same
            note.write_text(etag, encoding="utf-8")
        length = reply.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm.wrapattr(file, "write", total, initial=have, desc=part.stem, mininterval=1.0) as stream,
        ):
            for block in reply.iter_raw():
                stream.write(block)
    note.unlink(missing_ok=True)


def _from_hub(item: Entry, by_hand: str) -> Path:
    """The folder of a repository at its pinned commit in huggingface_hub's cache."""
    from huggingface_hub import snapshot_download

    revision = item.revision or _read_pins().get(item.name, {}).get("revision", "")
    trouble = ""
    try:
        with hub_or_cache() as trouble:
            folder = snapshot_download(
                item.source, revision=revision or None, endpoint=_hub_host(), local_files_only=bool(trouble),
                allow_patterns=["*.json", "*.safetensors", "merges.txt"], ignore_patterns=["*/*"],
            )  # fmt: skip
    except (OSError, ValueError) as error:
        told = f"{item.source} at {revision or 'main'} is neither in the hub's cache nor at {_hub_host()}"
        mend = f"check network and proxy, set HF_ENDPOINT to a mirror of the hub, or {by_hand}"
        raise UserError(f"zoo:{item.name}: {told} ({trouble or one_line(error)}); {mend}") from None
    _verify(item, Path(folder), revision="" if revision else Path(folder).name)
    return Path(folder)


def _hub_host() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB


def _is_offline() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("VLMKD_OFFLINE", "HF_HUB_OFFLINE"))


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Inside, huggingface_hub (and open_clip, timm, transformers by it) fetches, or reads only its cache: yields why.

    It would ask an unreachable hub six times a file. Errors of its HTTP library come out as OSError.
    """
    from huggingface_hub import constants

    trouble = _OFFLINE if _is_offline() else _trouble_with(_hub_host())
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(trouble)
    try:
        yield trouble
    except _hub_error() as error:
        if isinstance(error, OSError):
            raise
        raise ConnectionError(one_line(error)) from None
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_error() -> type[Exception]:
    """Of huggingface_hub's HTTP library, which is httpx or httpx2 by the version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@functools.cache
def _trouble_with(address: str) -> str:
    """Why nobody answers at `address`, or at its proxy; empty: somebody does."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=5)
    except (_hub_error(), OSError, ValueError) as error:
        return f"{address} cannot be reached: {one_line(error)}"
    return ""
