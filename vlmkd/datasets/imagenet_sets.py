"""ImageNet-1K and its variants V2, Sketch, A and R, in the layouts of CoOp's data folder and of the original archives.

Labels follow the sorted wnids. Class names are OpenAI's 1,000 (with the pairs `missile` and `sunglasses`), unless a
`classnames.txt` (`wnid name` a line) lies in the data set's folder.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmkd.class_names import imagenet_names, read_class_names, read_lines
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.facts import facts
from vlmkd.datasets.folders import class_folder_names, class_items, data_set_folder
from vlmkd.errors import UserError

log = logging.getLogger(__name__)

TEMPLATES = ["a photo of a {}."]
"""The one prompt of zero-shot baselines on ImageNet and its variants (PromptKD)."""
IMAGENET_SOURCE = (
    "ImageNet: get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org/download (free "
    "registration) and unpack them into one folder per wnid, {folder}/train/n01440764/*.JPEG and "
    "{folder}/val/n01440764/*.JPEG"
)
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Variant:
    """A test set with ImageNet's classes or some of them."""

    title: str
    folders: tuple[str, ...]
    """Where its class folders are, from the data root; the first is CoOp's place, others are the archives' own."""
    classes: int
    images: int
    licence: str
    source: str
    numbered: bool = False
    """Class folders are indices into the 1,000 class names instead of wnids."""


VARIANTS = facts("imagenet", Variant)


@dataclass(frozen=True)
class ClassFolders:
    """The class folders of a folder."""

    folders: list[str]
    """In the order of their labels."""
    labels: list[int]
    names: list[str]
    """Class names by label."""

    @classmethod
    def of(cls, folder: Path, source: str = "") -> ClassFolders:
        """Folders that are wnids, numbers (indices into the class names) or class names themselves.

        `source` is `imagenet`, or a file with one name a line, or with `wnid name`; without it wnids have OpenAI's names.

        Raises:
            UserError: no class folder, or names that do not fit.
        """
        found = class_folder_names(folder)
        listed = _listed(source)
        if found and all(map(_WNID.fullmatch, found)) and (listed or source in ("", "imagenet")):
            names = listed or imagenet_names()
            if unknown := [wnid for wnid in found if wnid not in names]:
                raise UserError(
                    f"class folder {folder / unknown[0]} is not a wnid of {source if listed else 'ImageNet-1K'}; add its "
                    "name, or move the folder away"
                )
            return cls(found, list(range(len(found))), [names[wnid] for wnid in found])
        numbers = bool(found) and all(name.isdecimal() for name in found)
        if not source:
            if numbers:
                raise UserError(
                    f"{folder} has numbered class folders; name class_names (`imagenet` or a file)"
                )
            return cls(found, list(range(len(found))), [name.replace("_", " ") for name in found])
        named = list(listed.values()) or read_class_names(source)
        if numbers:
            found.sort(key=int)
            if int(found[-1]) >= len(named):
                raise UserError(
                    f"class folder {folder / found[-1]} has no class name: {source} has {len(named)}"
                )
            return cls(found, [int(name) for name in found], named)
        if len(named) != len(found):
            raise UserError(
                f"{source} has {len(named)} class names, but {folder} has {len(found)} class folders; write one name per "
                "folder, in the folders' sorted order"
            )
        return cls(found, list(range(len(found))), named)

    def items(self, folder: Path, prefix: str = "") -> list[Item]:
        """Their images, keys relative to `folder` behind `prefix`."""
        return class_items(folder, self.folders, self.labels, prefix=prefix)


def class_names_file(folders: Sequence[Path]) -> str:
    """The first classnames.txt in these folders; empty without one."""
    return next((str(path) for folder in folders if (path := folder / "classnames.txt").is_file()), "")


def _listed(source: str) -> dict[str, str]:
    """wnid -> name of a file of `wnid name` lines; empty for another source."""
    if source in ("", "imagenet"):
        return {}
    pairs = [line.partition(" ")[::2] for line in read_lines(source, "class names")]
    if not _WNID.fullmatch(pairs[0][0]):
        return {}
    for wnid, name in pairs:
        if not _WNID.fullmatch(wnid) or not name.strip():
            raise UserError(f"class names {source}: {f'{wnid} {name}'[:60]!r} is not `wnid name`; correct it")
    return {wnid: name.strip() for wnid, name in pairs}


def load_imagenet(root: str, *, name: str = "imagenet") -> LabelledSet:
    """ImageNet-1K: `images/train` and `images/val`, or `train` and `val`, each with wnid folders; val is `test`.

    A folder with only one of the two gives only that split. Item keys are `train/<wnid>/<file>` in either layout.

    Raises:
        UserError: neither is there, a folder that is no wnid, an empty class, or splits with different classes.
    """
    marks = ("images/train", "images/val", "train", "val")
    hint = IMAGENET_SOURCE.format(folder="imagenet/images")
    folder = data_set_folder(root, ["imagenet"], marks, name, hint)
    base = folder / "images" if (folder / "images").is_dir() else folder
    wnids = {place: _wnid_folders(base / place) for place in ("train", "val") if (base / place).is_dir()}
    if not wnids:
        raise UserError(f"data set {name}: {base} has neither train nor val; {hint}")
    if other := set.symmetric_difference(*map(set, wnids.values())) if len(wnids) == 2 else set():
        raise UserError(f"{base / 'val'} and {base / 'train'} have different classes, such as {min(other)}")
    classes = ClassFolders.of(base / next(iter(wnids)), class_names_file([folder]))
    splits = {}
    for split, place in (("train", "train"), ("test", "val")):
        if place in wnids:
            splits[split] = classes.items(base / place, f"{place}/")
        else:
            log.warning("%s does not exist: %s has no %s split", base / place, name, split)
    warn_of_missing_classes(base, classes)
    return LabelledSet(name, classes.names, list(TEMPLATES), splits)


def warn_of_missing_classes(folder: Path, classes: ClassFolders) -> None:
    """Say where wnid folders are not all 1,000 of ImageNet."""
    if _WNID.fullmatch(classes.folders[0]) and len(classes.folders) < len(imagenet_names()):
        log.warning(
            "%s has %d of ImageNet's 1000 classes; accuracy is over these only", folder, len(classes.folders)
        )


def load_variant(key: str, root: str) -> LabelledSet:
    """One of `VARIANTS`, as the one split `test`; A and R number their own 200 sorted wnids from 0.

    Raises:
        UserError: the set is not there, a folder without a class, or an empty class.
    """
    variant = VARIANTS[key]
    marks = ["0"] if variant.numbered else list(imagenet_names())
    folder = data_set_folder(root, variant.folders, marks, key, variant.source)
    if not variant.numbered:
        _wnid_folders(folder)
    classes = ClassFolders.of(folder, class_names_file([folder, folder.parent]) or "imagenet")
    if not classes.folders:
        raise UserError(f"data set {key}: {folder} holds no class folders; {variant.source}")
    items = classes.items(folder)
    if (len(classes.folders), len(items)) != (variant.classes, variant.images):
        log.warning(
            "%s has %d images of %d classes; the published set has %d of %d",
            folder, len(items), len(classes.folders), variant.images, variant.classes,
        )  # fmt: skip
    return LabelledSet(key, classes.names, list(TEMPLATES), {"test": items})


def _wnid_folders(folder: Path) -> list[str]:
    """Sorted wnid folders; loose files (README.txt of A and R) are no classes, other folders a mistake."""
    found = class_folder_names(folder)
    if wrong := [name for name in found if not _WNID.fullmatch(name)]:
        raise UserError(
            f"class folder {folder / wrong[0]} is not a wnid such as n01440764; move it out of {folder}"
        )
    return found
