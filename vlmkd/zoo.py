"""Named models: what they are, where they come from, and a verified local copy of each.

`zoo.yaml` (beside this file) is the only list; MODEL_ZOO.md is written from it by `scripts/check_zoo.py --write`.
This module needs no torch, so that listing and downloading start at once.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import functools
import hashlib
import http.client
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vlmkd.errors import UserError

PIN_AT_FIRST_DOWNLOAD = "pinned at first download"
"""`sha256` of an entry whose file we have not seen; the user's cache pins what the first download brings."""
REPOSITORY = Path(__file__).resolve().parents[1]
HUB = "https://huggingface.co"
TIMEOUT_S = 30.0
ATTEMPTS = 4
"""Tries of one download call; each continues where the last one broke off."""
BACKOFF_S = 0.5
"""Wait before the second try; doubled each time."""
PROBE_S = 5.0
"""Longest wait for a connection that only tells whether there is a network."""
CHUNK_BYTES = 1 << 20
HUB_FILES = ["*.json", "*.safetensors", "merges.txt"]
"""Files of a hub repository that a CLIP needs; pickles stay away."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """Millions of parameters; `text` leaves out the token table, 0.0 means not counted yet."""

    vision: float = 0.0
    text: float | None = 0.0
    """None: there is no text tower."""
    total: float = 0.0
    approximate: bool = False
    """True when the figures come from the model's name or a publication and not from a count."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number that we measured, with the command that measures it again."""

    dataset: str
    metric: str
    value: float
    command: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the zoo."""

    name: str
    project: str
    kind: Literal["release", "hub", "local", "manual"]
    """`release`: one file by URL; `hub`: a Hugging Face repository; `local`: a file or folder of this repository;
    `manual`: one file that is published without an address of its own, which the user puts into the cache."""
    source: str
    """URL, repository id, path inside this repository, or (`manual`) the file's path in what is behind `link`."""
    format: Literal["clip", "promptkd", "dho", "backbone"] = "clip"
    """Who reads it: load_clip, projects/promptkd, projects/dho, or load_backbone as `weights`."""
    revision: str = ""
    """Commit of a hub repository; empty: the commit of the first download is pinned in the user's cache."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """open_clip model config of a bare weights file; empty when the source has its own or shapes tell it."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """open_clip preprocess config of a bare weights file; empty: OpenAI's."""
    params: Params = field(default_factory=Params)
    data: str = ""
    paper_imagenet_top1: float | None = None
    """ImageNet-1K zero-shot top-1 (%) as the authors publish it; not measured by us."""
    paper: str = ""
    """Other published accuracy (%), with what it is of; not measured by us."""
    macs_g: float | None = None
    """Billions of multiply-adds of one image and one text."""
    size_mb: float | None = None
    """Megabytes (10^6) of the weights file; None: not seen."""
    licence: str
    link: str
    teacher: str = ""
    init: str = ""
    """What the weights started from."""
    sha256: str = PIN_AT_FIRST_DOWNLOAD
    """Of the weights file."""
    ours: list[Measurement] = field(default_factory=list)
    note: str = ""


@functools.cache
def entries() -> dict[str, Entry]:
    """All entries of zoo.yaml by name, in file order."""
    rows = yaml.safe_load((Path(__file__).parent / "zoo.yaml").read_text(encoding="utf-8"))
    found: dict[str, Entry] = {}
    for row in rows:
        row["params"] = Params(**row.get("params", {}))
        row["ours"] = [Measurement(**item) for item in row.get("ours", [])]
        assert row["name"] not in found, f"zoo.yaml names {row['name']} twice"
        assert row["project"] in SECTIONS, f"zoo.yaml: {row['name']} is of no section {row['project']}"
        found[row["name"]] = Entry(**row)
    return found


def entry(name: str) -> Entry:
    """The entry called `name` (a leading `zoo:` is dropped).

    Raises:
        UserError: no such entry; the nearest names are suggested.
    """
    name = name.removeprefix("zoo:")
    if name in entries():
        return entries()[name]
    lowered = {known.lower(): known for known in entries()}
    near = difflib.get_close_matches(name.lower(), lowered, n=2, cutoff=0.5)
    mend = (
        f"did you mean {' or '.join(lowered[item] for item in near)}?"
        if near
        else "see scripts/download.py --list"
    )
    raise UserError(f"zoo has no model {name}; {mend}")


def cache_folder() -> Path:
    """Where downloads and their pins live: VLMKD_CACHE/zoo, else ~/.cache/vlmkd/zoo."""
    root = os.environ.get("VLMKD_CACHE") or Path.home() / ".cache" / "vlmkd"
    return Path(root).expanduser() / "zoo"


def weights_name(folder: Path) -> str:
    """Name of the weights file inside an exported or downloaded model folder."""
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return name
    raise UserError(
        f"{folder} holds neither open_clip_model.safetensors nor model.safetensors; delete it and fetch again"
    )


def weights_file(name: str) -> Path:
    """The file that the name of a checkpoint means: of `zoo:NAME` the verified local copy, else the path itself.

    Raises:
        UserError: as `fetch`.
    """
    if not name.startswith("zoo:"):
        return Path(name).expanduser()
    path = fetch(name)
    return path / weights_name(path) if path.is_dir() else path


def fetch(name: str, *, offline: bool | None = None) -> Path:
    """A verified local copy of `name`: a weights file (`release`, `manual`, `local`) or a model folder (`hub`, `local`).

    The sha256 is compared with the entry's, or with the one pinned at this user's first download. `offline`
    defaults to the variables VLMKD_OFFLINE and HF_HUB_OFFLINE; VLMKD_MIRROR (a base URL under which release files
    lie by their names in the cache) and HF_ENDPOINT replace the hosts; proxies come from the usual variables.

    Raises:
        UserError: unknown name, unreachable source, missing disk space, a file that is not the pinned one, or one
            that must be put there by hand and is not there.
    """
    item = entry(name)
    if item.kind == "local":
        return _local(item)
    from filelock import FileLock  # several ranks may ask for the same file at the same time

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{item.name}.lock"):
            return _cached(item, folder, _is_offline() if offline is None else offline)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise UserError(
                f"cannot write {folder}: {error.strerror}; free space or set VLMKD_CACHE"
            ) from None
        raise


def _cached(item: Entry, folder: Path, offline: bool) -> Path:
    target = folder / _cached_name(item)
    if target.exists():
        _verify(item, target, target)
        return target
    if item.kind == "manual":
        raise UserError(
            f"zoo:{item.name} has no address of its own: get {item.source} from {item.link} and put it at {target}"
        )
    by_hand = (
        f"put {item.source if item.kind == 'release' else 'the files of ' + item.link} at {target} by hand"
    )
    if offline:
        raise UserError(
            f"zoo:{item.name} is not at {target} and offline mode is on; turn it off, or {by_hand}"
        )
    if item.kind == "release":
        arrived = folder / f"{target.name}.part"
        mend = f"set VLMKD_MIRROR to a base URL that has the file, or {by_hand}"
        download(release_url(item), arrived, mend=mend)
    else:
        arrived = folder / f"{item.name}.partial"
        _download_hub(item, arrived, mend=f"set HF_ENDPOINT to a mirror of the hub, or {by_hand}")
    _verify(item, arrived, target)
    os.replace(arrived, target)
    return target


def _cached_name(item: Entry) -> str:
    """Name in the cache, and on a mirror: a file's is the entry's with the published ending."""
    if item.kind == "hub":
        return item.name
    return item.name + "".join(Path(item.source).suffixes)


def release_url(item: Entry) -> str:
    """Where the file of a release entry is asked for, VLMKD_MIRROR and HF_ENDPOINT respected."""
    mirror = os.environ.get("VLMKD_MIRROR", "")
    if mirror:
        return f"{mirror.rstrip('/')}/{_cached_name(item)}"
    if item.source.startswith(f"{HUB}/"):
        return f"{_hub_host()}/{item.source.removeprefix(f'{HUB}/')}"
    return item.source


def _hub_host() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB


def _is_offline() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("VLMKD_OFFLINE", "HF_HUB_OFFLINE"))


def _local(item: Entry) -> Path:
    path = REPOSITORY / item.source
    if not path.exists():
        raise UserError(
            f"zoo:{item.name} is {item.source} of the repository, and {path} is missing; use a full clone"
        )
    digest = sha256_of(path / weights_name(path) if path.is_dir() else path)
    if digest != item.sha256:
        raise UserError(
            f"{path} has sha256 {digest}, zoo.yaml says {item.sha256}; restore it with git checkout"
        )
    return path


def _verify(item: Entry, path: Path, target: Path) -> None:
    """Compare `path` with the known digest, pin it when there is none, set it aside when it differs."""
    digest = sha256_of(path / weights_name(path) if path.is_dir() else path)
    pins = _read_pins()
    pinned = pins.get(item.name, {}).get("sha256", "")
    expected = pinned if item.sha256 == PIN_AT_FIRST_DOWNLOAD else item.sha256
    if expected and digest != expected:
        aside = target.with_name(f"{target.name}.rejected-{digest[:8]}")
        if not aside.exists():
            os.replace(path, aside)
        origin = "pinned at the first download" if expected == pinned else "of zoo.yaml"
        raise UserError(
            f"zoo:{item.name} has sha256 {digest}, not the {expected} {origin}; kept as {aside}: fetch again, from "
            f"another mirror if it happens twice, or delete its line in {_pins_file()} if you trust the new file"
        )
    if not expected:
        pins.setdefault(item.name, {})["sha256"] = digest
        _write_pins(pins)
        sys.stderr.write(f"zoo:{item.name}: first download, sha256 {digest} pinned in {_pins_file()}\n")


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of the file at `path`."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _pins_file() -> Path:
    return cache_folder() / "pins.json"


def _read_pins() -> dict[str, dict[str, str]]:
    path = _pins_file()
    if not path.exists():
        return {}
    pins: dict[str, dict[str, str]] = _read_json(path, "list of pinned digests")
    for name, pin in pins.items():
        if not isinstance(pin, dict):
            raise UserError(
                f"list of pinned digests ({path}) has no pin at {name}; delete that file and call again"
            )
    return pins


def _write_pins(pins: dict[str, dict[str, str]]) -> None:
    temporary = _pins_file().with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(pins, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, _pins_file())


# ---------------------------------------------------------------------------------------------- one file by URL


_NO_NETWORK = (socket.gaierror, ConnectionRefusedError)


class _Broken(Exception):
    """A transfer that may succeed when it is tried again."""


def download(url: str, part: Path, *, mend: str) -> None:
    """Fetch `url` into `part`, continuing what `part` already holds, until the server's length is reached.

    A transfer that breaks is continued with an HTTP Range request, here and in later calls; a note beside the file
    remembers the server's ETag, so that two versions of a file are never joined. `mend` ends the error line: what
    the user can do without this server.

    Raises:
        UserError: the server refuses, cannot be reached, or keeps breaking off.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            _transfer(url, part)
            _note(part).unlink(missing_ok=True)
            return
        except _Broken as error:
            reason = str(error)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except urllib.error.URLError as error:
            reason = str(error.reason)
            if not attempt and isinstance(error.reason, _NO_NETWORK):
                break  # waiting helps a transfer that was under way, and nobody without a network
        except ValueError as error:  # no address at all, from a variable
            reason = str(error)
            break
        except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(error) or type(error).__name__
    kept = f" ({part.stat().st_size} bytes kept; the next call continues)" if part.exists() else ""
    reason = " ".join(reason.split())  # urllib tells of a circle of redirections in four lines
    raise UserError(f"cannot download {url}: {reason}{kept}; check network and proxy, {mend}")


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _transfer(url: str, part: Path) -> None:
    """One request, appended to `part`; raises _Broken when fewer bytes than announced arrived."""
    note = _note(part)
    if part.is_symlink():  # nothing of ours: it would be followed, and what it names appended to
        part.unlink()
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "vlmkd", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        etag = str(_read_json(note, "note on a partial download").get("etag", "")) if note.exists() else ""
        if etag and not etag.startswith("W/"):
            headers["If-Range"] = etag
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return
        part.unlink()
        raise _Broken("the partial file does not belong to the server's file and was dropped") from None
    with reply:
        have = _resume_point(reply, have)
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        note.write_text(json.dumps({"etag": reply.headers.get("ETag", "")}), encoding="utf-8")
        written = have + _copy(reply, part, have, total)
    if total is not None and written < total:
        raise _Broken(f"the transfer stopped at {written} of {total} bytes")


def _resume_point(reply: http.client.HTTPResponse, have: int) -> int:
    """Bytes of the partial file that stay: all when the server continues (206) exactly there, else none."""
    continues = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if reply.status == 206 and not continues:
        raise _Broken(f"the server continued at {reply.headers.get('Content-Range')} instead of byte {have}")
    return have if continues else 0


def _copy(reply: http.client.HTTPResponse, part: Path, have: int, total: int | None) -> int:
    from tqdm import tqdm

    written = 0
    with (
        open(part, "ab" if have else "wb") as stream,
        tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, mininterval=1.0) as bar,
    ):
        while block := reply.read(CHUNK_BYTES):
            stream.write(block)
            written += len(block)
            bar.update(len(block))
    return written


# ---------------------------------------------------------------------------------------------- hub repositories


def _download_hub(item: Entry, folder: Path, *, mend: str) -> None:
    """Fetch the files of a hub repository at its pinned commit into `folder`; later calls continue.

    Speaks the hub's two public addresses itself, so that resuming, proxies and error lines are those of `download`
    and do not change with the hub client's HTTP library.
    """
    host = _hub_host()
    pins = _read_pins()
    revision = item.revision or pins.get(item.name, {}).get("revision", "")
    folder.mkdir(exist_ok=True)
    listing = folder / "listing"
    download(f"{host}/api/models/{item.source}/revision/{revision or 'main'}", listing, mend=mend)
    info = _read_json(listing, f"answer of {host}")
    listing.unlink()
    try:
        found, names = str(info["sha"]), [str(sibling["rfilename"]) for sibling in info["siblings"]]
    except (KeyError, TypeError):
        raise UserError(f"{host} gave no list of the files of {item.source}; check HF_ENDPOINT") from None
    if not revision:
        revision = found
        pins.setdefault(item.name, {})["revision"] = revision
        _write_pins(pins)
    for name in names:
        wanted = "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in HUB_FILES)
        if wanted and not (folder / name).exists():
            part = folder / f"{name}.part"
            download(f"{host}/{item.source}/resolve/{revision}/{name}", part, mend=mend)
            os.replace(part, folder / name)


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{what} ({path}) is not valid JSON ({error}); delete that file and call again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{what} ({path}) is no JSON object; delete that file and call again")
    return content


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """What huggingface_hub (and open_clip, timm, transformers by it) fetches within.

    Where the hub cannot be reached it then looks into its cache only, at once: it would ask six times for each file, with
    pauses of up to eight seconds. Gives what is wrong with the connection, empty where nothing is known to be.
    """
    trouble = "" if _is_offline() else _trouble_with(_hub_host())
    if not trouble:
        yield ""
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield trouble
    finally:
        constants.HF_HUB_OFFLINE = before


@functools.cache
def _trouble_with(address: str) -> str:
    """Why nobody answers at `address`, or at the proxy before it; empty: somebody does."""
    try:
        parts = urllib.parse.urlsplit(address)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
            parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=PROBE_S).close()
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached: {getattr(error, 'strerror', None) or error}"
    return ""


# -------------------------------------------------------------------------------------------------- MODEL_ZOO.md

HEADER = """# Model zoo

Written from `vlmkd/zoo.yaml` by `python scripts/check_zoo.py --write`; do not edit this page.

`python scripts/download.py NAME` fetches and verifies an entry; `zoo:NAME` names it wherever such a model is asked for.
*Paper* is what the authors publish. *Ours* is what we measured, with the command beside it, or "not run". Parameters
are in millions; *text* leaves out the token table, which *total* includes; – is no text tower; ≈ stands before figures that were not
counted. MACs are of one image and one text, without a text tower of one image. A sha256 that we have not seen is pinned in your
cache at the first download, and a different file is refused from then on. *manual* entries are published in folders
without file addresses: `download.py NAME` says in one line which file to put where.
"""
SECTIONS = {
    "tinyclip": ("TinyCLIP", "CLIPs, for every `model` of a config or command."),
    "promptkd": (
        "PromptKD",
        "Prompted teachers and students: `teacher.prompts=zoo:NAME`, and `--ckpt` and `--teacher` of `projects/promptkd/eval.py`. "
        "*Started from* is the CLIP that `teacher.clip`, `--clip` or `--teacher-clip` must name. Accuracies are base / novel / "
        "harmonic mean; those of students and of PromptSRC are means of three seeds. Cross-dataset students were not "
        "published, PromptSRC's other seeds and its few-shot prompts are behind the links of its docs/EVAL.md. The ViT-L/14 teachers are "
        "mirrored on [Baidu](https://pan.baidu.com/s/1KNJ1mhNKoxdSli4ZldeZUg) (password mjf4), "
        "[TeraBox](https://terabox.com/s/1X4mxJtSaR8W2lrK5bsrCkg) and, not all of them, "
        "[Google Drive](https://drive.google.com/drive/folders/1OdQ9WauZmYAzVSUTTw7tIKKChyECIS5B).",
    ),
    "dho": (
        "DHO",
        "Students with two heads, for `--model` of `projects/dho/eval.py`. Its Tip-Adapter-F teachers and students of "
        "few-shot settings were not published.",
    ),
    "vl2v_adip": (
        "VL2V-ADiP",
        "No weights of this paper were published. Its recipes start from OpenAI's CLIP ViT-B/16 (teacher) and the ViTs, the DeiT or the "
        "ResNet-50 below (students).",
    ),
    "foundation": (
        "Models that the recipes start from",
        "The recipes name them as open_clip, timm and torchvision do, and these libraries fetch them. The entries are for machines "
        "without network, mirrors and pinned files: CLIPs go wherever a CLIP is named, the others into `student.weights=zoo:NAME`.",
    ),
}
"""Title and introduction of each project's table, in the order of the page."""
COLUMNS = (
    "Name",
    "Params vision / text / total (M)",
    "Data",
    "Paper (%)",
    "Ours",
    "GMACs",
    "Size (MB)",
    "Licence",
    "Link",
    "sha256",
)


def markdown() -> str:
    """MODEL_ZOO.md: one table per project, rows in the order of zoo.yaml, then what each model came from."""
    parts = [HEADER]
    for project, (title, introduction) in SECTIONS.items():
        rows = [item for item in entries().values() if item.project == project]
        parts.append(f"\n## {title}\n\n{introduction}")
        if not rows:
            continue
        parts.append("\n| " + " | ".join(COLUMNS) + " |")
        parts.append("|" + " --- |" * len(COLUMNS))
        parts.extend("| " + " | ".join(_cells(item)) + " |" for item in rows)
        parts.append("\n| Name | Teacher | Started from | Note |\n| --- | --- | --- | --- |")
        parts.extend(
            f"| {item.name} | {item.teacher or '–'} | {item.init or '–'} | {item.note or '–'} |"
            for item in rows
        )
    return "\n".join(parts) + "\n"


def _cells(item: Entry) -> list[str]:
    decimals = 0 if item.params.approximate else 2
    sign = "≈" if item.params.approximate else ""
    params = [
        "–" if value is None else f"{sign}{value:.{decimals}f}" if value else "not counted"
        for value in (item.params.vision, item.params.text, item.params.total)
    ]
    paper = item.paper
    if item.paper_imagenet_top1 is not None:
        paper = f"IN-1K zero-shot {item.paper_imagenet_top1:.1f}"
    ours = "<br>".join(f"{one.dataset} {one.metric} {one.value:g} (`{one.command}`)" for one in item.ours)
    return [
        item.name,
        " / ".join(params),
        item.data,
        f"{paper} (paper)" if paper else "–",
        ours or "not run",
        "–" if item.macs_g is None else f"{item.macs_g:g}",
        "not seen" if item.size_mb is None else f"{item.size_mb:g}",
        item.licence,
        f"[{item.kind}]({item.link})",
        f"`{item.sha256}`" if item.sha256 != PIN_AT_FIRST_DOWNLOAD else item.sha256,
    ]
