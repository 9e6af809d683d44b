"""The embedded `emoji` data set: real image-text data that needs no hub, drawn from installed Python packages.

`resolve("emoji:train")` gives the shards and builds the data set into the user's cache the first time. See
`embedded_catalog` for concepts, classes, styles (= domains) and splits, `embedded_draw` for the pictures and
`embedded_build` for the files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from vlmkd.datasets.emoji.build import SPLITS, VERSION, build
from vlmkd.datasets.emoji.catalog import (
    Concept,
    base_and_novel,
    class_names,
    concepts,
    domains,
    require_packages,
)
from vlmkd.datasets.emoji.draw import concept_picture
from vlmkd.errors import UserError
from vlmkd.files import new_folder, read_object

__all__ = [
    "Concept",
    "base_and_novel",
    "build_once",
    "cache_root",
    "class_names",
    "concept_picture",
    "concepts",
    "domains",
    "emoji_folder",
    "is_embedded",
    "resolve",
    "split_folder",
]


def cache_root() -> Path:
    """Folder for everything that is built or fetched once: $VLMKD_CACHE, else ~/.cache/vlmkd."""
    return Path(os.environ.get("VLMKD_CACHE") or "~/.cache/vlmkd").expanduser()


def is_embedded(name: str) -> bool:
    """Whether a shard or data-set name belongs to this module."""
    return name.startswith("emoji:")


def emoji_folder() -> Path:
    """The data set's folder; built when absent, by one process while others wait.

    Raises UserError when a package that carries the drawings is missing.
    """
    return build_once(cache_root() / f"emoji-v{VERSION}", lambda folder: build(folder))


def build_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, written by `write` (into an empty folder, `manifest.json` last) when it has no manifest yet.

    One process writes while others wait, and the folder takes its name only when it is whole.
    """
    if (folder / "manifest.json").is_file():
        return folder
    require_packages()
    new_folder(folder.parent, "the cache (set VLMKD_CACHE)")
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "manifest.json").is_file():
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            write(temporary)
            temporary.chmod(0o755)
            # A folder without a manifest was not made by this code's rename: someone deleted files in it.
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def require_known(name: str) -> None:
    """Refuse a name of this module that no split has; nothing is built."""
    _split(name)


def _split(name: str) -> str:
    split = name.removeprefix("emoji:")
    if not is_embedded(name) or split not in SPLITS:
        allowed = ", ".join(f"emoji:{known}" for known in SPLITS)
        raise UserError(f"unknown embedded data set {name!r}; it is one of {allowed}")
    return split


def split_folder(name: str) -> Path:
    """Folder of one split: its tars and, beside test tars, classnames.txt and templates.txt."""
    split = _split(name)
    return emoji_folder() / split


def resolve(name: str) -> list[str]:
    """Paths of the tar files of `emoji:train`, `emoji:dev`, `emoji:unseen_drawing` or `emoji:unseen_concept`.

    Builds the data set into the cache when it is absent. Raises UserError for another name, for a missing package
    and for a cached file that has gone.
    """
    split = _split(name)
    folder = emoji_folder()
    manifest = read_object(folder / "manifest.json", "emoji manifest", f"delete {folder} and run again")
    paths = [folder / shard["path"] for shard in manifest["shards"] if shard["split"] == split]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing from the cached emoji data set; delete {folder} and run again"
            )
    return [str(path) for path in paths]
