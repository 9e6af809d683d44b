"""Embedded data in the user's cache (docs/datasets.md): shards (`emoji:train`, ...), `emoji`, `emoji-domains`.

`data_tools/emoji` draws them, once, in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmkd.class_names import read_class_names, read_lines
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.folders import ALL, read_domains
from vlmkd.datasets.tar_index import index_tar
from vlmkd.errors import UserError
from vlmkd.files import cache_root, read_object, read_yaml, write_text

log = logging.getLogger(__name__)

VERSIONS = {"emoji": 2, "emoji-domains": 1}
_INDEX_VERSION = 1
SPLITS = {"train": "train", "val": "dev", "test": "unseen_drawing", "test_unseen_concept": "unseen_concept"}
"""Split of the labelled set -> split of the shards."""
LICENCES: dict[str, str] = read_yaml(Path(__file__).with_name("emoji.yaml"), "emoji licences")
"""Terms of what the data are made of, by part."""
_TRAINING_TEMPLATE = "an emoji of {c}"
_TOOL = Path(__file__).parents[2] / "data_tools" / "emoji" / "build.py"


def split_of(name: str) -> str:
    """The split that `emoji:train` and the like name; builds nothing."""
    split = name.removeprefix("emoji:")
    if not name.startswith("emoji:") or split not in SPLITS.values():
        allowed = ", ".join(f"emoji:{known}" for known in SPLITS.values())
        raise UserError(f"unknown embedded data set {name!r}; it is one of {allowed}")
    return split


def resolve(name: str) -> list[str]:
    """Paths of the shards of `emoji:train` and the like."""
    split = split_of(name)
    folder = emoji_folder("emoji")
    paths = [folder / shard["path"] for shard in _manifest(folder)["shards"] if shard["split"] == split]
    if gone := [path for path in paths if not path.is_file()]:
        raise UserError(f"{gone[0]} is missing from the cached emoji data set; delete {folder} and run again")
    return [str(path) for path in paths]


def load_emoji() -> LabelledSet:
    """`emoji`: the pictures of one emoji in the shards; keys are `<shard split>/<key in the tar>`."""
    folder = emoji_folder("emoji")
    entries = _index(folder)
    splits = {}
    for split, stored in SPLITS.items():
        shards = resolve(f"emoji:{stored}")
        splits[split] = [
            Item(f"{stored}/{name.partition('.')[0]}", ImageRef(shards[shard], offset, size, name), label)
            for shard, name, offset, size, label in entries[stored]
        ]
    names = read_class_names(str(folder / SPLITS["test"] / "classnames.txt"))
    prompts = read_lines(folder / SPLITS["test"] / "templates.txt", "prompts")
    # The first template is the training prompt; the order of the others matters to nobody.
    prompts.sort(key=lambda prompt: prompt != _TRAINING_TEMPLATE)
    return LabelledSet("emoji", names, prompts, splits)


def load_emoji_domains() -> LabelledSet:
    """`emoji-domains`: 1,889 concepts in each of four styles."""
    folder = emoji_folder("emoji-domains")
    found = read_domains(folder, "emoji-domains")
    manifest, pictures = _manifest(folder), len(found.splits[ALL])
    expected = manifest["concepts"] * len(manifest["styles"])
    if pictures != expected:
        raise UserError(f"{folder} has {pictures} of {expected} pictures; delete the folder and run again")
    return replace(found, templates=[_TRAINING_TEMPLATE])


def _manifest(folder: Path) -> dict[str, Any]:
    return read_object(folder / "manifest.json", "emoji manifest", f"delete {folder} and run again")


def cache_folder(name: str) -> Path:
    """Where a set is, whole, or is to be."""
    return cache_root() / f"{name}-v{VERSIONS[name]}"


def emoji_folder(name: str) -> Path:
    """The set's folder, built when absent."""
    folder = cache_folder(name)
    if not (folder / "manifest.json").is_file():
        _build(name)
    return folder


def _build(name: str) -> None:
    if not _TOOL.is_file():
        raise UserError(f"data set {name} is drawn by {_TOOL}; run from a clone of the repository")
    done = subprocess.run([sys.executable, str(_TOOL), name], check=False)
    if done.returncode:
        raise UserError(f"building the {name} data set failed (exit code {done.returncode}); see above")


def _index(folder: Path) -> dict[str, list[list[Any]]]:
    """[shard number, member, offset, size, class] of every picture with one class, by shard split.

    Kept beside the folder: reading the headers of 30,000 samples takes seconds.
    """
    manifest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    path = folder.parent / f"{folder.name}-classes-v{_INDEX_VERSION}.json"
    if path.is_file():
        stored = read_object(path, "index of the emoji classes", "delete it")
        if stored.get("manifest") == manifest and "splits" in stored:
            return stored["splits"]
    log.info("indexing the classes of %s (once)", folder)
    splits: dict[str, list[list[Any]]] = {split: [] for split in SPLITS.values()}
    for split, entries in splits.items():
        for number, shard in enumerate(resolve(f"emoji:{split}")):
            for sample in index_tar(shard):
                label = json.loads(sample.text("json"))["class"]
                if label >= 0:  # scenes of several emoji have no one class
                    image = sample.image()
                    entries.append([number, image.key, image.offset, image.size, label])
    write_text(path, json.dumps({"manifest": manifest, "splits": splits}), "index of the emoji classes")
    return splits
