"""The published sets of `sets.yaml`: CoOp's eleven few-shot sets, ImageNet's variants, and DomainBed's five.

A set without its split file is refused: numbers of a split drawn anew compare with nobody's. Other counts than the
published ones are logged.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlmkd.class_names import read_lines
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.folders import (
    ALL,
    WNID,
    class_folder_names,
    class_items,
    first_file,
    named_classes,
    numbered,
    read_domains,
    root_folder,
)
from vlmkd.datasets.splits import base_and_novel
from vlmkd.errors import UserError
from vlmkd.files import read_object, read_yaml

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
Found = tuple[list[str], dict[str, list[Item]]]
"""Class names and the items of each split."""


@dataclass(frozen=True)
class PublishedSet:
    """An entry of `sets.yaml`; the comment at its top says what the fields mean."""

    key: str
    title: str
    layout: Literal["split", "variants", "train_val", "wnids", "numbers", "domains"]
    folders: list[str]
    num_classes: int
    licence: str
    source: str
    builds: dict[str, list[int]]
    halves: list[int] = field(default_factory=list)
    template: str = "a photo of a {}."
    marks: list[str] = field(default_factory=list)
    images: str = ""
    split_file: str = ""
    split_drive: str = ""
    class_from: Literal["", "folder", "stem", "path"] = ""
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def class_of(self, path: str) -> str:
        """Class name that a path of the split file says, by `class_from`."""
        parts = PurePosixPath(path.lstrip("/"))
        if self.class_from == "stem":
            return parts.stem.rpartition("_")[0].lower()
        if self.class_from == "path":
            return " ".join(reversed(parts.parts[1:-1]))
        return self.renamed.get(parts.parent.name, parts.parent.name)

    @property
    def hint(self) -> str:
        return f"get it from {self.source}"

    @property
    def split_hint(self) -> str:
        return (
            f"get it from https://drive.google.com/uc?id={self.split_drive} or inside {self.source}; `python "
            f"data_tools/make_split.py --set {self.key} --root ROOT --seed 1` draws one whose numbers compare with nobody's"
        )


_TABLE = read_yaml(Path(__file__).with_name("sets.yaml"), "data sets")
SETS = {key: PublishedSet(key, **facts) for section in _TABLE.values() for key, facts in section.items()}


def load(key: str, root: str) -> LabelledSet:
    """One of `SETS` with `train`, `val` and `test` as far as it has them, or `all` where it has domains.

    `root` is the folder that holds the sets' folders, or the set's own; keys are paths inside that.
    """
    described = SETS[key]
    names, splits = _READERS[described.layout](described, set_folder(key, root))
    found = LabelledSet(key, names, [described.template], splits, described.domains)
    _compare_counts(described, found)
    return found


def set_folder(key: str, root: str) -> Path:
    """Below the data root, or `root` itself when it looks like the set's own."""
    described = SETS[key]
    where = root_folder(root, key, f"it is the folder that holds {described.folders[0]}/")
    if there := [where / name for name in described.folders if (where / name).is_dir()]:
        return there[0]
    marks = [*(described.marks or described.domains or [described.images]), described.split_file]
    if any(any(where.glob(mark)) for mark in filter(None, marks)):
        return where
    raise UserError(f"data set {key}: {where / described.folders[0]} does not exist; {described.hint}")


def _compare_counts(described: PublishedSet, found: LabelledSet) -> None:
    """Log other numbers than the published ones, and which of several builds it is."""
    counts = [len(found.splits.get(split, [])) for split in SPLITS]
    if found.domains:
        images = Counter(item.domain for item in found.splits[ALL])
        counts = [images[domain] for domain in range(len(found.domains))]
    build = next((name for name, build in described.builds.items() if build == counts), "")
    if not build or len(found.class_names) != described.num_classes:
        log.warning(
            "%s has %d classes and %s images (of %s); published are %d and %s: splits and numbers do not compare",
            described.title, len(found.class_names), counts, ", ".join(found.domains or SPLITS),
            described.num_classes, "; ".join(f"{name} {counts}" for name, counts in described.builds.items()),
        )  # fmt: skip
        return
    if found.domains:
        log.info("%s: the build of %s", described.title, build)
    if described.halves:
        groups = base_and_novel(found.splits["train"])
        halves = [sum(item.label in half for item in found.splits["test"]) for half in map(set, groups)]
        if halves != described.halves:
            log.warning(
                "%s has %s test images of base and novel classes; the published split has %s",
                described.title, halves, described.halves,
            )  # fmt: skip


def _read_split(described: PublishedSet, folder: Path) -> Found:
    """CoOp's split file: `[relative path, label, class name]` of every image of a split."""
    path = folder / described.split_file
    if not path.is_file():
        raise UserError(f"split file {path} does not exist; {described.split_hint}")
    content = read_object(path, "split file", "fetch it again")
    if content.get("note"):
        log.warning("%s: %s", path, content["note"])
    names: dict[int, str] = {}
    splits: dict[str, list[Item]] = {}
    for split in SPLITS:
        entries = content.get(split)
        if not isinstance(entries, list):
            raise UserError(f"split file {path} has no list {split!r}; {described.split_hint}")
        splits[split] = [_split_item(path, described, entry, names) for entry in entries]
    if gaps := sorted(set(range(len(names))) - set(names)):
        raise UserError(f"split file {path} has no image of class {gaps[0]}; {described.split_hint}")
    return _checked(described, folder, [names[label] for label in range(len(names))], splits)


def _split_item(path: Path, described: PublishedSet, entry: Any, names: dict[int, str]) -> Item:
    """The item of an entry, whose class name goes into `names`."""
    if not (isinstance(entry, list) and list(map(type, entry)) == [str, int, str] and entry[1] >= 0):
        raise UserError(f"split file {path}: {str(entry)[:80]} is not [path, label, name]; fetch it again")
    relative, label, name = entry
    relative = relative.lstrip("/")
    if ".." in PurePosixPath(relative).parts:
        raise UserError(f"split file {path}: {relative} leaves the image folder; fetch it again")
    if (other := names.setdefault(label, name)) != name:
        raise UserError(f"split file {path} calls class {label} both {other!r} and {name!r}; fetch it again")
    return _item(described, path.parent, relative, label)


def _item(described: PublishedSet, folder: Path, relative: str, label: int) -> Item:
    key = f"{described.images}/{relative}" if described.images else relative
    return Item(key, ImageRef(str(folder / key)), label)


def _read_variants(described: PublishedSet, folder: Path) -> Found:
    """FGVC's lists: `variants.txt` names the classes, `images_variant_<split>.txt` has `id variant` a line."""
    where, what = folder / "variants.txt", f"data set {described.key}:"
    names = read_lines(where, what, described.hint)
    labels = numbered(names)
    splits: dict[str, list[Item]] = {}
    for split in SPLITS:
        path = folder / f"images_variant_{split}.txt"
        pairs = [line.partition(" ")[::2] for line in read_lines(path, what, described.hint)]
        if unknown := [variant for _, variant in pairs if variant not in labels]:
            raise UserError(f"{path}: variant {unknown[0]!r} is not in {where}; {described.hint}")
        splits[split] = [_item(described, folder, f"{number}.jpg", labels[name]) for number, name in pairs]
    return _checked(described, folder, names, splits)


def _checked(described: PublishedSet, folder: Path, names: list[str], splits: dict[str, list[Item]]) -> Found:
    """Names in words, and the splits; refuses missing images, untrained classes and names of another set."""
    listed = folder / (described.split_file or "images_variant_*.txt")
    keys = [item.key for items in splits.values() for item in items]
    missing = missing_files(folder, keys)
    if 2 * len(missing) > len(keys):
        told = f"{len(missing)} of its {len(keys)} images are not below {folder}, first {missing[0]}"
        mend = f"put the list of {described.title} there, or unpack the images ({described.hint})"
        raise UserError(f"{listed} seems to be of another data set: {told}; {mend}")
    if missing:
        told = f"{len(missing)} of {len(keys)} images are missing, first {folder / missing[0]}"
        raise UserError(f"data set {described.key}: {told}; {described.hint}")
    names = [name.replace("_", " ") for name in names]
    path_of = {item.label: item.key.removeprefix(f"{described.images}/") for item in splits["train"]}
    if absent := [name for label, name in enumerate(names) if label not in path_of]:
        raise UserError(f"{listed} gives no training image to class {absent[0]!r}; fetch it again")
    wanted = {label: described.class_of(path).replace("_", " ") for label, path in path_of.items()}
    wrong = [label for label, name in wanted.items() if name.lower() != names[label].lower()]
    if described.class_from and 2 * len(wrong) > len(names):
        told = f"{names[wrong[0]]!r} where {described.title} has {wanted[wrong[0]]!r}; {described.split_hint}"
        raise UserError(f"{listed} has {len(wrong)} class names of another data set, such as {told}")
    return names, splits


def missing_files(folder: Path, keys: Sequence[str]) -> list[str]:
    """Those that do not exist; each folder is listed once, much faster than asking per file."""
    present: set[str] = set()
    for parent in {os.path.dirname(key) for key in keys}:
        if (folder / parent).is_dir():
            present |= {
                os.path.join(parent, entry.name) for entry in os.scandir(folder / parent) if entry.is_file()
            }
    return [key for key in keys if key not in present]


def _read_train_val(described: PublishedSet, folder: Path) -> Found:
    """ImageNet: `train` and `val`, maybe in `images`; val is `test`, and one may be missing."""
    base = folder / "images" if (folder / "images").is_dir() else folder
    both = {"train": base / "train", "test": base / "val"}
    places = {split: place for split, place in both.items() if place.is_dir()}
    if not places:
        raise UserError(f"data set {described.key}: {base} has neither train nor val; {described.hint}")
    wnids = [set(_wnids(place)) for place in places.values()]
    if other := wnids[0] ^ wnids[-1]:
        raise UserError(f"{base / 'val'} and {base / 'train'} have different classes, such as {min(other)}")
    labels, names = named_classes(next(iter(places.values())), first_file([folder], "classnames.txt"))
    for split in both.keys() - places:
        log.warning("%s: %s has no %s split", base, described.key, split)
    return names, {
        split: class_items(place, labels, prefix=f"{place.name}/") for split, place in places.items()
    }


def _read_test(described: PublishedSet, folder: Path) -> Found:
    """Folders that are wnids (A and R number their own 200 from 0) or, V2's, numbers of classes."""
    if described.layout == "wnids":
        _wnids(folder)
    labels, names = named_classes(folder, first_file([folder, folder.parent], "classnames.txt") or "imagenet")
    if not labels:
        raise UserError(f"data set {described.key}: {folder} holds no class folders; {described.hint}")
    return names, {"test": class_items(folder, labels)}


def _wnids(folder: Path) -> list[str]:
    """Loose files (README.txt of A and R) are no classes, folders that are no wnids a mistake."""
    found = class_folder_names(folder)
    if wrong := [name for name in found if not WNID.fullmatch(name)]:
        raise UserError(f"class folder {folder / wrong[0]} is not a wnid such as n01440764; move it away")
    return found


def _read_domains(described: PublishedSet, folder: Path) -> Found:
    """`<domain>/<class>/*` with the published domains and classes."""
    found = read_domains(folder, described.key)
    own = f"load it as domains:{folder} if it is your own set"
    if found.domains != described.domains:
        has, wants = ", ".join(found.domains), ", ".join(described.domains)
        raise UserError(
            f"{folder} has the domains {has}, but {described.title} has {wants}; complete it, or {own}"
        )
    classes = [name.replace("_", " ") for name in described.classes]
    if classes and found.class_names != classes:
        other = sorted(set(found.class_names) ^ set(classes))
        told = f"has not the classes of {described.title}, see {', '.join(other[:3])}; {own}"
        raise UserError(f"{folder} {told}")
    return found.class_names, found.splits


_READERS = {
    "split": _read_split,
    "variants": _read_variants,
    "train_val": _read_train_val,
    "wnids": _read_test,
    "numbers": _read_test,
    "domains": _read_domains,
}
