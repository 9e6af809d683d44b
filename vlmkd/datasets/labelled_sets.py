"""Labelled sets by name: `load_set("eurosat", root)`, `load_set("emoji")`, `load_set("folder:PATH")`.

docs/datasets.md lists every name with its size, licence, layout on disk and source.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmkd.class_names import check_class_names, class_key, prompt_name, read_class_names, read_folder_names
from vlmkd.config import LabelledDataConfig
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import UNLABELLED, Item, LabelledSet
from vlmkd.datasets import emoji, published_sets
from vlmkd.datasets.folders import (
    class_folder_names,
    class_items,
    images_of_classes,
    is_image,
    numbered,
    read_domains,
    root_folder,
)
from vlmkd.datasets.published_sets import SPLITS
from vlmkd.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

FOLDER, DOMAINS = "folder:", "domains:"
"""Before the path of a user's own folders: `<class>/*`, or `<domain>/<class>/*`."""
_EMBEDDED = {"emoji": emoji.load_emoji, "emoji-domains": emoji.load_emoji_domains}
_NAMES = [*published_sets.SETS, *_EMBEDDED]
_HELD_OUT = {"test": 0.2, "val": 0.1}
"""Shares of a folder's images, where it has no test or val folder."""
_FEWEST = {"test": 2, "val": 5}
"""From so many images on every class has one held out."""
_UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")
"""Folders of images without a class, beside the class folders."""
_TEMPLATES = ["a photo of a {}."]


def known_sets() -> list[str]:
    """All names that `load_set` takes; `folder:PATH` and `domains:PATH` stand for the user's own folders."""
    return [*_NAMES, f"{FOLDER}PATH", f"{DOMAINS}PATH"]


def require_known(name: str) -> None:
    """Refuse a name that `load_set` does not take."""
    if name in _NAMES or name.startswith((FOLDER, DOMAINS)):
        return
    hint = did_you_mean(name, _NAMES, f"it is one of {', '.join(known_sets())}")
    raise UserError(f"unknown data set {name!r}; {hint}")


def configured_set(data: LabelledDataConfig) -> LabelledSet:
    """The labelled set that a run's config names."""
    return load_set(data.set, data.root, data.class_names, data.templates)


def load_set(name: str, root: str = "", class_names: str = "", templates: Sequence[str] = ()) -> LabelledSet:
    """The labelled set of this name.

    `root` is the folder that holds the sets' folders, or the set's own; embedded sets (`emoji`, `emoji-domains`) and paths
    take none. `class_names`, a file for `with_class_names`, and `templates` are for a user's own folders.
    """
    require_known(name)
    own = name.startswith((FOLDER, DOMAINS))
    if (class_names or templates) and not own:
        told = f"data.class_names and data.templates go with {FOLDER} and {DOMAINS} sets"
        raise UserError(f"data set {name} has its own class names and prompts; {told}")
    if name in published_sets.SETS:
        found = published_sets.load(name, root)
        check_class_names(found.class_names, allow_duplicates=name.startswith("imagenet"))
        return found
    if root:
        why = "the path says where it is" if own else "it is built into the cache"
        raise UserError(f"data set {name} takes no root ({root}): {why}")
    if name in _EMBEDDED:
        return _EMBEDDED[name]()
    if name.startswith(FOLDER):
        found = load_folder(name.removeprefix(FOLDER), class_names)
    else:
        path = name.removeprefix(DOMAINS)
        folder = root_folder(path, name, "name the folder that holds the domains' folders")
        found = read_domains(folder, folder.name)
        found = with_class_names(found, class_names) if class_names else found
    check_class_names(found.class_names)
    return replace(found, templates=list(templates)) if templates else found


def items_of(labelled: LabelledSet, split: str) -> list[Item]:
    """The items of one split; refuses one that the set does not have."""
    if split not in labelled.splits:
        known = ", ".join(labelled.splits)
        raise UserError(f"data set {labelled.name} has no split {split!r}; it has {known}")
    return labelled.splits[split]


def load_folder(path: str, class_names: str = "") -> LabelledSet:
    """A user's own images (docs/datasets.md#your-own-images); `class_names` is a file for `with_class_names`."""
    root = root_folder(path, f"{FOLDER}{path}", "name a folder with one folder per class")
    given = [split for split in SPLITS if (root / split).is_dir()]
    base = root / given[0] if given else root
    unlabelled_folders = [name for name in _UNLABELLED_FOLDERS if (root / name).is_dir()]
    unlabelled = class_items(root, dict.fromkeys(unlabelled_folders, UNLABELLED))
    classes = [name for name in class_folder_names(base) if given or name not in _UNLABELLED_FOLDERS]
    if not classes and unlabelled and class_names:
        return _without_labels(root.name, unlabelled, class_names)
    if len(classes) < 2:
        raise UserError(f"{base} holds {len(classes)} class folders; sort the images into two or more")
    if loose := sum(map(is_image, os.listdir(base))):
        log.warning("%s: %d images lie in no class folder and are left out", base, loose)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    if given[:1] in ([], ["train"]):  # val or test alone is a set to be tested on
        shares = {split: share for split, share in _HELD_OUT.items() if split not in given}
        prefix = "train/" if given else ""
        for label, paths in enumerate(images_of_classes(base, classes).values()):
            for name, split in _hashed(paths, shares).items():
                splits[split].append(Item(f"{prefix}{name}", ImageRef(str(base / name)), label))
    for split in (one for one in given if one != "train"):
        there = class_folder_names(root / split)
        if extra := sorted(set(there) - set(classes)):
            raise UserError(f"class {extra[0]} of {root / split} is not in {base}; add or remove it")
        labels = {name: label for name, label in numbered(classes).items() if name in there}
        splits[split] = class_items(root / split, labels, prefix=f"{split}/")
    splits["unlabelled"] = unlabelled
    names = [name.replace("_", " ") for name in classes]
    if not class_names and (listed := root / "classnames.txt").is_file():
        names = read_class_names(str(listed))
        if len(names) != len(classes):
            told = f"{len(names)} names for {len(classes)} class folders"
            raise UserError(f"{listed} has {told}; write one a line, in ASCII order")
    labelled = LabelledSet(
        root.name, names, _TEMPLATES, {name: items for name, items in splits.items() if items}
    )
    return with_class_names(labelled, class_names) if class_names else labelled


def with_class_names(labelled: LabelledSet, path: str) -> LabelledSet:
    """The set with the class names, and in the order, of a file's lines: `NAME` or `FOLDER<tab>NAME`."""
    check_class_names(labelled.class_names)
    place = {class_key(name): index for index, name in enumerate(labelled.class_names)}
    numbers = {UNLABELLED: UNLABELLED}
    names: list[str] = []
    for folder, name in read_folder_names(path):
        old = place.get(class_key(folder))
        if old is None:
            hint = did_you_mean(class_key(folder), place, "write NAME or FOLDER<tab>NAME a line")
            raise UserError(f"class names {path}: {labelled.name} has no class folder {folder!r}; {hint}")
        if old in numbers:
            raise UserError(f"class names {path}: {folder!r} comes twice; write one line a class")
        numbers[old] = len(names)
        names.append(prompt_name(name))
    if missing := [name for index, name in enumerate(labelled.class_names) if index not in numbers]:
        raise UserError(
            f"class names {path}: class folder {missing[0]!r} has no line; add it, or remove the folder"
        )
    splits = {
        split: [replace(item, label=numbers[item.label]) for item in items]
        for split, items in labelled.splits.items()
    }
    return replace(labelled, class_names=names, splits=splits)


def _without_labels(name: str, items: list[Item], class_names: str) -> LabelledSet:
    """A set of unlabelled images and of names of classes."""
    of_path = _hashed([item.key for item in items], {"test": _HELD_OUT["test"]})
    splits: dict[str, list[Item]] = {"unlabelled": [], "test": []}
    for item in items:
        splits["test" if of_path[item.key] == "test" else "unlabelled"].append(item)
    names = [prompt_name(line) for _, line in read_folder_names(class_names)]
    return LabelledSet(name, names, _TEMPLATES, splits)


def _hashed(paths: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """The split of each image of one class, by a hash of its path: those of `shares`, in their order, or train.

    Where the hash leaves a split empty, one image trains all the same, and tests and validates from `_FEWEST` on.
    """
    digests = {path: hashlib.sha256(path.encode()).digest() for path in paths}
    place = {path: int.from_bytes(digest[:8], "big") / 2**64 for path, digest in digests.items()}
    bounds = dict(zip(shares, itertools.accumulate(shares.values()), strict=True))
    found = {path: next((s for s, bound in bounds.items() if place[path] < bound), "train") for path in paths}
    ranked = sorted(paths, key=place.__getitem__)
    if "train" not in found.values():
        found[ranked[-1]] = "train"
    for position, split in enumerate(shares):
        if split not in found.values() and len(paths) >= _FEWEST[split]:
            found[ranked[position]] = split
    return found
