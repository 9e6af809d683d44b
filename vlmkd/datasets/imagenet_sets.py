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

from vlmkd.class_names import imagenet_names
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.folders import class_folder_names, data_set_folder, images_of_classes
from vlmkd.errors import UserError
from vlmkd.files import read_text

log = logging.getLogger(__name__)

TEMPLATES = ["a photo of a {}."]
"""The one prompt of zero-shot baselines on ImageNet and its variants (PromptKD e.6)."""
IMAGENET_SOURCE = (
    "get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org/download (free registration) "
    "and unpack them into one folder per wnid, {folder}/train/n01440764/*.JPEG and {folder}/val/n01440764/*.JPEG"
)
_WNID = re.compile(r"n\d{8}")
_NUM_CLASSES = 1000


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


_HUB = "the Hugging Face repository zhengli97/prompt_learning_dataset"
VARIANTS = {
    "imagenetv2": Variant(
        "ImageNetV2, matched frequency",
        (
            "imagenetv2/imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2",
        ),
        1000,
        10_000,
        "MIT",
        f"get imagenetv2-matched-frequency.tar.gz from the Hugging Face data set vaishaal/ImageNetV2 (or {_HUB})",
        numbered=True,
    ),
    "imagenet-sketch": Variant(
        "ImageNet-Sketch",
        ("imagenet-sketch/images", "imagenet-sketch", "sketch"),
        1000,
        50_889,
        "none stated",
        f"get it from https://github.com/HaohanWang/ImageNet-Sketch (or {_HUB})",
    ),
    "imagenet-a": Variant(
        "ImageNet-A",
        ("imagenet-adversarial/imagenet-a", "imagenet-a"),
        200,
        7_500,
        "MIT (its repository)",
        f"get imagenet-a.tar from https://github.com/hendrycks/natural-adv-examples (or {_HUB})",
    ),
    "imagenet-r": Variant(
        "ImageNet-R",
        ("imagenet-rendition/imagenet-r", "imagenet-r"),
        200,
        30_000,
        "MIT (its repository)",
        f"get imagenet-r.tar from https://github.com/hendrycks/imagenet-r (or {_HUB})",
    ),
}


def load_imagenet(root: str, *, name: str = "imagenet") -> LabelledSet:
    """ImageNet-1K: `images/train` and `images/val`, or `train` and `val`, each with wnid folders; val is `test`.

    A folder with only one of the two gives only that split. Item keys are `train/<wnid>/<file>` in either layout.

    Raises:
        UserError: neither is there, a folder that is no wnid, an empty class, or splits with different classes.
    """
    marks = ("images/train", "images/val", "train", "val")
    help_line = IMAGENET_SOURCE.format(folder="imagenet/images")
    folder = data_set_folder(root, ["imagenet"], marks, name, help_line)
    base = folder / "images" if (folder / "images").is_dir() else folder
    splits, wnids, first = {}, [""], ""
    for split, place in (("train", "train"), ("test", "val")):
        if not (base / place).is_dir():
            log.warning("%s does not exist: %s has no %s split", base / place, name, split)
            continue
        found = _wnid_folders(base / place)
        if first and found != wnids:
            other = sorted(set(found) ^ set(wnids))[0]
            raise UserError(f"{base / place} and {base / first} have different classes, such as {other}")
        wnids, first = found, place
        splits[split] = [
            Item(f"{place}/{path}", ImageRef(str(base / place / path)), label)
            for label, images in enumerate(images_of_classes(base / place, found))
            for path in images
        ]
    if not splits:
        raise UserError(f"data set {name}: {base} has neither train nor val; {help_line}")
    if len(wnids) < _NUM_CLASSES:
        log.warning("%s has %d of ImageNet's 1000 classes; accuracy is over these only", base, len(wnids))
    return LabelledSet(name, _names_of(wnids, [folder]), list(TEMPLATES), splits)


def load_variant(key: str, root: str) -> LabelledSet:
    """One of `VARIANTS`, as the one split `test`; A and R number their own 200 sorted wnids from 0.

    Raises:
        UserError: the set is not there, a folder without a class, or an empty class.
    """
    variant = VARIANTS[key]
    marks = ["0"] if variant.numbered else list(imagenet_names())
    folder = data_set_folder(root, variant.folders, marks, key, variant.source)
    beside = [folder, folder.parent]
    if variant.numbered:
        classes = sorted(class_folder_names(folder), key=_number)
        names = [name for _, name in _listed(beside)] or list(imagenet_names().values())
        labels = [_number(found) for found in classes]
        if max(labels, default=0) >= len(names):
            raise UserError(f"class folder {folder / classes[-1]} has no class name: there are {len(names)}")
    else:
        classes = _wnid_folders(folder)
        names, labels = _names_of(classes, beside), list(range(len(classes)))
    if not classes:
        raise UserError(f"data set {key}: {folder} holds no class folders; {variant.source}")
    items = [
        Item(path, ImageRef(str(folder / path)), label)
        for label, images in zip(labels, images_of_classes(folder, classes), strict=True)
        for path in images
    ]
    if (len(classes), len(items)) != (variant.classes, variant.images):
        log.warning(
            "%s has %d images of %d classes; the published set has %d of %d",
            folder,
            len(items),
            len(classes),
            variant.images,
            variant.classes,
        )
    return LabelledSet(key, names, list(TEMPLATES), {"test": items})


def _wnid_folders(folder: Path) -> list[str]:
    """Sorted wnid folders; loose files (README.txt of A and R) are no classes."""
    found = class_folder_names(folder)
    if wrong := [name for name in found if not _WNID.fullmatch(name)]:
        raise UserError(
            f"class folder {folder / wrong[0]} is not a wnid such as n01440764; move it out of {folder}"
        )
    return found


def _number(folder_name: str) -> int:
    if not folder_name.isdecimal():
        raise UserError(
            f"class folder {folder_name} of imagenetv2 is not a number from 0 to 999; move it away"
        )
    return int(folder_name)


def _names_of(wnids: Sequence[str], folders: Sequence[Path]) -> list[str]:
    names = dict(_listed(folders)) or imagenet_names()
    if unknown := [wnid for wnid in wnids if wnid not in names]:
        where = _class_file(folders) or "ImageNet-1K"
        raise UserError(
            f"wnid {unknown[0]} of {folders[0]} has no class name in {where}; add it, or move its folder away"
        )
    return [names[wnid] for wnid in wnids]


def _class_file(folders: Sequence[Path]) -> Path | None:
    return next((path for folder in folders if (path := folder / "classnames.txt").is_file()), None)


def _listed(folders: Sequence[Path]) -> list[tuple[str, str]]:
    """(wnid, name) of each line of the first classnames.txt in these folders, in its order; empty without one."""
    path = _class_file(folders)
    if path is None:
        return []
    pairs = []
    for number, line in enumerate(read_text(path, "class names").splitlines(), start=1):
        wnid, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if not _WNID.fullmatch(wnid) or not name.strip():
            raise UserError(f"{path}: line {number} is not `wnid name`: {line[:60]!r}")
        pairs.append((wnid, name.strip()))
    return pairs
