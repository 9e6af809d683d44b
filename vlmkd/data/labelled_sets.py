"""Labelled sets by name: `load_set("eurosat", root)`, `load_set("emoji")`, `load_set("folder:PATH")`.

docs/datasets.md lists every name with its size, licence, layout on disk and source.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vlmkd.data import domain_sets, emoji_sets, few_shot_sets, imagenet_sets
from vlmkd.data.folders import class_folder_names, images_of_classes, root_folder
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.data.text import class_names as read_class_names
from vlmkd.errors import UserError

FOLDER = "folder:"
"""Before the path of a user's own class folders."""
DOMAINS = "domains:"
"""Before the path of a user's own `<domain>/<class>` folders."""
VAL_SHARE = 0.1
TEST_SHARE = 0.2
"""Shares of a folder's images that are held out when it has no train folder."""
SPLITS = ("train", "val", "test")

_LOADERS = {
    **{key: partial(few_shot_sets.load, key) for key in few_shot_sets.SETS},
    **{key: partial(imagenet_sets.load_variant, key) for key in imagenet_sets.VARIANTS},
    **{key: partial(domain_sets.load, key) for key in domain_sets.SETS},
}
_EMBEDDED = {"emoji": emoji_sets.load_emoji, "emoji-domains": emoji_sets.load_emoji_domains}


def known_sets() -> list[str]:
    """All names that `load_set` takes; `folder:PATH` and `domains:PATH` stand for the user's own folders."""
    return [*_LOADERS, *_EMBEDDED, f"{FOLDER}PATH", f"{DOMAINS}PATH"]


def load_set(name: str, root: str = "") -> LabelledSet:
    """The labelled set of this name, its files checked.

    `root` is the folder that holds the data sets, each in its own folder, or the data set's own folder. Embedded sets
    (`emoji`, `emoji-domains`) and paths take none. Few-shot sets have the splits `train`, `val` and `test`, ImageNet
    `train` and `test`, its variants `test`, domain sets `all`.

    Raises:
        UserError: an unknown name, or files that are missing or belong to another data set.
    """
    if name in _LOADERS:
        return _LOADERS[name](root)
    own_path = name.startswith((FOLDER, DOMAINS))
    if root and (name in _EMBEDDED or own_path):
        why = "the path says where it is" if own_path else "it is built into the cache"
        raise UserError(f"data set {name} takes no root ({root}): {why}; leave it out")
    if name in _EMBEDDED:
        return _EMBEDDED[name]()
    if name.startswith(FOLDER):
        return load_folder(name.removeprefix(FOLDER))
    if name.startswith(DOMAINS):
        path = name.removeprefix(DOMAINS)
        folder = root_folder(path, name, "name the folder that holds the domains' folders")
        return domain_sets.read_domains(folder, name=folder.name)
    raise UserError(f"unknown data set {name!r}{_nearest(name)}; it is one of {', '.join(known_sets())}")


def items_of(labelled: LabelledSet, split: str) -> list[Item]:
    """The items of one split.

    Raises:
        UserError: the set has no such split.
    """
    if split not in labelled.splits:
        raise UserError(
            f"data set {labelled.name} has no split {split!r}; it has {', '.join(labelled.splits)}"
        )
    return labelled.splits[split]


def load_folder(path: str, *, val_share: float = VAL_SHARE, test_share: float = TEST_SHARE) -> LabelledSet:
    """A user's own images: `PATH/<class>/*`, or `PATH/train/<class>/*` with `val` and `test` beside it.

    Without such folders, a hash of each image's path inside PATH decides its split, so that new images do not move old
    ones. Class names are the folders' names with spaces for underscores, or the lines of PATH/classnames.txt, one for each
    folder in ASCII order.

    Raises:
        UserError: no such folder, no classes, classes without training images, or class names that do not fit.
    """
    if not (0 <= val_share and 0 <= test_share and val_share + test_share < 1):
        raise UserError(
            f"held-out shares are {val_share} and {test_share}; they are from 0 on and below 1 together"
        )
    root = root_folder(path, f"{FOLDER}{path}", "name a folder with one folder per class")
    given = [split for split in SPLITS if (root / split).is_dir()]
    if given:
        classes = _classes(root / given[0])
        splits = {split: _given_split(root, split, classes, given[0]) for split in given}
    else:
        classes = _classes(root)
        splits = _hashed_splits(root, classes, val_share, test_share)
    names = _own_class_names(root, classes)
    return LabelledSet(root.name, names, ["a photo of a {}."], splits)


def _classes(folder: Path) -> list[str]:
    classes = class_folder_names(folder)
    if len(classes) < 2:
        raise UserError(
            f"{folder} holds {len(classes)} class folders; sort the images into one folder per class, at least two"
        )
    return classes


def _given_split(root: Path, split: str, classes: Sequence[str], first: str) -> list[Item]:
    found = class_folder_names(root / split)
    if extra := sorted(set(found) - set(classes)):
        raise UserError(f"class {extra[0]} of {root / split} is not in {root / first}; add or remove it")
    return [
        Item(f"{split}/{path}", ImageRef(str(root / split / path)), classes.index(name))
        for name, images in zip(found, images_of_classes(root / split, found), strict=True)
        for path in images
    ]


def _hashed_splits(
    root: Path, classes: Sequence[str], val_share: float, test_share: float
) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for label, images in enumerate(images_of_classes(root, classes)):
        before = len(splits["train"])
        for path in images:
            place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
            split = "test" if place < test_share else "val" if place < test_share + val_share else "train"
            splits[split].append(Item(path, ImageRef(str(root / path)), label))
        if len(splits["train"]) == before:
            raise UserError(
                f"class folder {root / classes[label]} has {len(images)} images, all of them held out by their hash; "
                f"add images, or make {root}/train, val and test yourself"
            )
    return {split: items for split, items in splits.items() if items}


def _own_class_names(root: Path, classes: Sequence[str]) -> list[str]:
    path = root / "classnames.txt"
    if not path.is_file():
        return [name.replace("_", " ") for name in classes]
    names = read_class_names(str(path))
    if len(names) != len(classes):
        raise UserError(
            f"{path} has {len(names)} names for {len(classes)} class folders; write one a line, in the folders' ASCII order"
        )
    return names


def _nearest(name: str) -> str:
    """Half a sentence with the known name that the user may have meant."""
    plain = {_plain(known): known for known in (*_LOADERS, *_EMBEDDED)}
    given = _plain(name)
    starts = [key for key in plain if given and (key.startswith(given) or given.startswith(key))]
    near = starts[:1] or difflib.get_close_matches(given, plain, n=1, cutoff=0.5)
    return f" (did you mean {plain[near[0]]}?)" if near else ""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
