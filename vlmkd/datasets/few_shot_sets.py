"""The eleven sets of the few-shot and base-to-novel benchmarks, in the layout of CoOp's data folder.

`sets.yaml` says where each set's images, split and class names are. Reading changes nothing on disk: a set whose split
file is missing is refused, because a split drawn anew gives numbers that compare with nobody's
(`data_tools/make_split.py` draws one on request).
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets import imagenet_sets
from vlmkd.datasets.facts import facts
from vlmkd.datasets.folders import data_set_folder
from vlmkd.datasets.splits import base_and_novel
from vlmkd.errors import UserError
from vlmkd.files import read_object, read_text

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class FewShotSet:
    """Where a set lies below the data root, and what is known of it."""

    title: str
    folder: str
    images: str
    """Image folder inside `folder`; paths of the split file start there."""
    layout: Literal["split", "variants", "wnids"]
    """`split` reads a JSON split file, `variants` FGVC's text lists, `wnids` ImageNet's folders."""
    classes: int
    counts: tuple[int, int, int]
    """Images of train, val and test of the published split; ImageNet's val is its test."""
    halves: tuple[int, int]
    """Test images of the base and of the novel classes."""
    licence: str
    source: str
    """Where images and split come from."""
    template: str = "a photo of a {}."
    """The one prompt of the zero-shot baselines."""
    split_file: str = ""
    split_drive: str = ""
    """Google Drive id of the split file."""
    mark: str = ""
    """What shows that a folder is the set's own folder; empty: the image folder."""
    class_from: Literal["", "folder", "stem", "path"] = ""
    """Where a path of the split file says the class, see `class_of`; empty: nowhere."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Class names of folders whose name is another one."""
    dropped: tuple[str, ...] = ()
    """Folders that are no class."""

    def class_of(self, path: str) -> str:
        """Class name that a path of the split file says.

        `folder`: `airplanes/image_0001.jpg`; `stem`: `Abyssinian_100.jpg`, the stem without the number, in lower case;
        `path`: `c/church/outdoor/sun_a.jpg`, the folders after the letter, last first.
        """
        parts = PurePosixPath(path.lstrip("/"))
        if self.class_from == "stem":
            return parts.stem.rpartition("_")[0].lower()
        if self.class_from == "path":
            return " ".join(reversed(parts.parts[1:-1]))
        return self.renamed.get(parts.parent.name, parts.parent.name)

    @property
    def hint(self) -> str:
        """What to do when something of the set is missing."""
        return f"get it from {self.source} (CoOp's data folder layout)"


SETS = facts("few_shot", FewShotSet)


def load(key: str, root: str) -> LabelledSet:
    """One of `SETS` with its splits `train`, `val` and `test`; numbers that differ from the published ones are logged.

    `root` is the folder that holds the sets' folders, or the set's own. Item keys are paths inside the set's folder.

    Raises:
        UserError: files are missing, belong to another set, or leave a class without training images.
    """
    described = SETS[key]
    if described.layout == "wnids":
        found = imagenet_sets.load_imagenet(root, name=key)
    else:
        folder = set_folder(key, root)
        read = _read_variants if described.layout == "variants" else _read_split
        names, splits = read(key, folder)
        _check_images(key, folder, splits)
        _check_classes(key, folder, names, splits["train"])
        found = LabelledSet(key, names, [described.template], splits)
    _compare_counts(described, found)
    return found


def set_folder(key: str, root: str) -> Path:
    """The folder of a set below the data root.

    Raises:
        UserError: it is not there.
    """
    described = SETS[key]
    marks = [mark for mark in (described.mark or described.images, described.split_file) if mark]
    return data_set_folder(root, [described.folder], marks, key, described.hint)


def _split_hint(key: str) -> str:
    described = SETS[key]
    return (
        f"get it from https://drive.google.com/uc?id={described.split_drive} or inside {described.source}; "
        f"`python data_tools/make_split.py --set {key} --root ROOT --seed 1` draws one whose numbers compare with nobody's"
    )


def _read_split(key: str, folder: Path) -> tuple[list[str], dict[str, list[Item]]]:
    """Class names and items from the split file."""
    described = SETS[key]
    path = folder / described.split_file
    if not path.is_file():
        raise UserError(f"data set {key}: split file {path} does not exist; {_split_hint(key)}")
    content = read_object(path, "split file", "fetch it again")
    if content.get("note"):
        log.warning("%s: %s", path, content["note"])
    names: dict[int, str] = {}
    splits: dict[str, list[Item]] = {}
    for split in SPLITS:
        entries = content.get(split)
        if not isinstance(entries, list):
            raise UserError(f"split file {path} has no list {split!r}; {_split_hint(key)}")
        splits[split] = [_split_item(path, described, folder, entry, names) for entry in entries]
    if sorted(names) != list(range(len(names))):
        gap = next(label for label in range(len(names) + 1) if label not in names)
        raise UserError(
            f"split file {path} has labels up to {max(names)} but no class {gap}; {_split_hint(key)}"
        )
    return [names[label].replace("_", " ") for label in range(len(names))], splits


def _split_item(path: Path, described: FewShotSet, folder: Path, entry: Any, names: dict[int, str]) -> Item:
    """One `[relative path, label, class name]`; fills `names`."""
    whole = isinstance(entry, list) and [type(part) for part in entry] == [str, int, str]
    if not whole or entry[1] < 0:
        raise UserError(
            f"split file {path}: {str(entry)[:80]} is not [path, label, class name]; fetch it again"
        )
    relative, label, name = entry
    relative = relative.lstrip("/")
    if ".." in PurePosixPath(relative).parts:
        raise UserError(f"split file {path}: {relative} leaves the image folder; fetch the file again")
    if names.setdefault(label, name) != name:
        raise UserError(
            f"split file {path} calls class {label} both {names[label]!r} and {name!r}; fetch it again"
        )
    key = f"{described.images}/{relative}" if described.images else relative
    return Item(key, ImageRef(str(folder / key)), label)


def _read_variants(key: str, folder: Path) -> tuple[list[str], dict[str, list[Item]]]:
    """FGVC's lists: `variants.txt` names the classes, `images_variant_<split>.txt` has `id variant` a line."""
    described = SETS[key]

    def lines(path: Path) -> list[str]:
        text = read_text(path, f"data set {key}:", described.hint)
        return [line.strip() for line in text.splitlines() if line.strip()]

    variants = lines(folder / "variants.txt")
    labels = {variant: label for label, variant in enumerate(variants)}
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for split, items in splits.items():
        path = folder / f"images_variant_{split}.txt"
        for line in lines(path):
            number, _, variant = line.partition(" ")
            if variant not in labels:
                raise UserError(
                    f"{path}: variant {variant!r} is not in {folder / 'variants.txt'}; {described.hint}"
                )
            name = f"{described.images}/{number}.jpg"
            items.append(Item(name, ImageRef(str(folder / name)), labels[variant]))
    return [variant.replace("_", " ") for variant in variants], splits


def _check_images(key: str, folder: Path, splits: dict[str, list[Item]]) -> None:
    """Every listed image exists; more than half of them missing means another set's list or no images at all."""
    described = SETS[key]
    images = folder / described.images
    if not images.is_dir():
        raise UserError(f"data set {key}: image folder {images} does not exist; {described.hint}")
    items = [item for split in splits.values() for item in split]
    missing = missing_files(folder, [item.key for item in items])
    if not missing:
        return
    if 2 * len(missing) > len(items):
        raise UserError(
            f"{folder / (described.split_file or 'images_variant_*.txt')} seems to be of another data set: "
            f"{len(missing)} of its {len(items)} images are not below {images}, first {missing[0]}; put the list of "
            f"{described.title} there, or unpack the images"
        )
    raise UserError(
        f"data set {key}: {len(missing)} of {len(items)} images are missing, first {folder / missing[0]}; "
        f"unpack the images again ({described.hint})"
    )


def missing_files(folder: Path, keys: Sequence[str]) -> list[str]:
    """Those of the paths that do not exist; every folder is listed once, which is much faster than asking per file."""
    present: dict[str, set[str]] = defaultdict(set)
    for parent in {key.rpartition("/")[0] for key in keys}:
        if (folder / parent).is_dir():
            present[parent] = {entry.name for entry in os.scandir(folder / parent) if entry.is_file()}
    return [key for key in keys if key.rpartition("/")[2] not in present[key.rpartition("/")[0]]]


def _check_classes(key: str, folder: Path, names: list[str], train: list[Item]) -> None:
    """Class names are those of this set, and every class has training images."""
    described = SETS[key]
    path = folder / (described.split_file or "variants.txt")
    seen = {item.label for item in train}
    if absent := [name for label, name in enumerate(names) if label not in seen]:
        more = f" and {len(absent) - 1} more classes" if len(absent) > 1 else ""
        raise UserError(
            f"data set {key}: {path} gives no training image to class {absent[0]!r}{more}; fetch it again"
        )
    expected: dict[int, str] = {}
    if described.class_from:
        strip = f"{described.images}/"
        for item in train:
            expected[item.label] = described.class_of(item.key.removeprefix(strip)).replace("_", " ")
        wrong = [label for label, name in expected.items() if name.lower() != names[label].lower()]
    else:  # the paths of Cars and Flowers say nothing of the class; Cars' names all begin with a year
        cars = key == "stanford_cars"
        wrong = [label for label, name in enumerate(names) if cars and not re.match(r"\d{4} ", name)]
    if 2 * len(wrong) > len(names):
        wanted = repr(expected[wrong[0]]) if expected else "a name that begins with the year"
        raise UserError(
            f"{path} has the class names of another data set: {len(wrong)} of {len(names)} do not fit, such as "
            f"{names[wrong[0]]!r} where {described.title} has {wanted}; {_split_hint(key)}"
        )


def _compare_counts(described: FewShotSet, found: LabelledSet) -> None:
    """Log where a set has other numbers than the published split."""
    counts = tuple(len(found.splits.get(split, [])) for split in SPLITS)
    if (len(found.class_names), counts) != (described.classes, described.counts):
        log.warning(
            "%s has %d classes and %s images (train, val, test); the published split has %d and %s: numbers do not compare",
            described.title, len(found.class_names), counts, described.classes, described.counts,
        )  # fmt: skip
        return
    groups = base_and_novel(found.splits["train"])
    halves = tuple(sum(item.label in half for item in found.splits["test"]) for half in map(set, groups))
    if halves != described.halves:
        log.warning(
            "%s has %s test images of base and novel classes; the published split has %s",
            described.title, halves, described.halves,
        )  # fmt: skip
