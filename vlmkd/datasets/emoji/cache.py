"""What is built once in the user's cache, and the `emoji` data set in it: real image-text data that needs no hub.

`resolve("emoji:train")` gives the shards and builds the data set the first time, from installed Python packages. See
`catalog` for concepts, classes, styles (= domains) and splits, `draw` for the pictures and `build` for the files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from vlmkd.datasets.emoji.build import SPLITS, VERSION, build
from vlmkd.datasets.emoji.catalog import require_packages
from vlmkd.errors import UserError
from vlmkd.files import new_folder, read_object


def cache_root() -> Path:
    """Folder for everything that is built or fetched once: $VLMKD_CACHE, else ~/.cache/vlmkd."""
    return Path(os.environ.get("VLMKD_CACHE") or "~/.cache/vlmkd").expanduser()


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
    if not name.startswith("emoji:") or split not in SPLITS:
        allowed = ", ".join(f"emoji:{known}" for known in SPLITS)
        raise UserError(f"unknown embedded data set {name!r}; it is one of {allowed}")
    return split


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
