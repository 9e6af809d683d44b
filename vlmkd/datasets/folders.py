"""Image folders with one subfolder per class, `<class>/*`, with domains or without."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlmkd.class_names import imagenet_names, read_class_names, read_lines
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Lower-case endings of files that count as images."""
DOMAIN_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of sets with domains, torchvision's list: another one would move the splits."""
ALL = "all"
"""The split of a set with domains, which holds every image."""
WNID = re.compile(r"n\d{8}")


def root_folder(root: str, data_set: str, meaning: str) -> Path:
    """`root` as a path; refuses an empty one and what is no folder."""
    if not root:
        raise UserError(f"data set {data_set} is read from disk: give its root; {meaning}")
    where = Path(root).expanduser()
    if not where.is_dir():
        raise UserError(f"data set {data_set}: root {where.absolute()} does not exist; {meaning}")
    return where


def is_image(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(suffixes) and not name.startswith(".")


def class_folder_names(folder: Path) -> list[str]:
    """In ASCII order (`TV` before `Table`), without hidden ones."""
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
    )


def images_of_classes(
    folder: Path, classes: Iterable[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> dict[str, list[str]]:
    """Each class's images at any depth, sorted: paths relative to `folder`, with `/` between; refuses a class without."""
    start = len(str(folder)) + 1  # string work: ImageNet has 1.3 million paths
    found = {}
    for name in classes:
        paths: list[str] = []
        for current, folders, files in os.walk(folder / name, followlinks=True):
            folders[:] = [inner for inner in folders if not inner.startswith(".")]
            paths += [os.path.join(current, file) for file in files if is_image(file, suffixes)]
        found[name] = [path[start:].replace(os.sep, "/") for path in sorted(paths)]
    if empty := [str(folder / name) for name, images in found.items() if not images]:
        raise UserError(
            f"class folder {empty[0]} ({len(empty)} of {len(found)}) holds no image; fill or remove it"
        )
    return found


def class_items(
    folder: Path,
    labels: Mapping[str, int],
    *,
    prefix: str = "",
    domain: int = 0,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
) -> list[Item]:
    """Of the class folders that have `labels`, with `prefix` before the keys."""
    return [
        Item(prefix + path, ImageRef(str(folder / path)), labels[name], domain)
        for name, images in images_of_classes(folder, labels, suffixes).items()
        for path in images
    ]


def numbered(names: Sequence[str]) -> dict[str, int]:
    """0, 1, ... as the labels of `names`."""
    return {name: label for label, name in enumerate(names)}


def named_classes(folder: Path, source: str = "") -> tuple[dict[str, int], list[str]]:
    """Label of each folder, and class names by label: folders are wnids, numbers of classes, or class names.

    `source` is `imagenet`, or a file with one name a line, or with `wnid name`; without it wnids have OpenAI's names.
    """
    found = class_folder_names(folder)
    wnids = bool(found) and all(map(WNID.fullmatch, found))
    of_wnid = _names_of_wnids(source) if source or wnids else {}
    if wnids and of_wnid:
        if unknown := [wnid for wnid in found if wnid not in of_wnid]:
            owner = "ImageNet-1K" if source in ("", "imagenet") else source
            raise UserError(f"class folder {folder / unknown[0]} is not a wnid of {owner}; move it away")
        return numbered(found), [of_wnid[wnid] for wnid in found]
    numbers = bool(found) and all(name.isdecimal() for name in found)
    if not source:
        if numbers:
            raise UserError(f"{folder} has numbered class folders; name class_names (`imagenet` or a file)")
        return numbered(found), [name.replace("_", " ") for name in found]
    names = list(of_wnid.values()) or read_class_names(source)
    if numbers:
        found.sort(key=int)
        if int(found[-1]) >= len(names):
            raise UserError(f"class folder {folder / found[-1]} has no class name: {source} has {len(names)}")
        return {name: int(name) for name in found}, names
    if len(names) != len(found):
        told = f"has {len(names)} class names for the {len(found)} class folders of {folder}"
        raise UserError(f"{source} {told}; write one a folder, in sorted order")
    return numbered(found), names


def first_file(folders: Sequence[Path], *names: str) -> str:
    """Empty without one."""
    paths = (folder / name for folder in folders for name in names)
    return next((str(path) for path in paths if path.is_file()), "")


def _names_of_wnids(source: str) -> dict[str, str]:
    """wnid -> name, OpenAI's or of a file of `wnid name` lines; empty for a file of names."""
    if source in ("", "imagenet"):
        return imagenet_names()
    pairs = [line.partition(" ")[::2] for line in read_lines(source, "class names")]
    if not WNID.fullmatch(pairs[0][0]):
        return {}
    for wnid, name in pairs:
        if not WNID.fullmatch(wnid) or not name.strip():
            raise UserError(f"class names {source}: {f'{wnid} {name}'[:60]!r} is not `wnid name`; correct it")
    return {wnid: name.strip() for wnid, name in pairs}


def read_domains(folder: Path, name: str) -> LabelledSet:
    """Any tree `<domain>/<class>/*` as the one split `all`; class names are the folders' with spaces for underscores.

    The order of the images, by which splits are cut, is part of the format: domains, classes and paths inside a class in
    ASCII order (docs/papers/vl2v_adip.md).
    """
    domains = class_folder_names(folder)
    if len(domains) < 2:
        raise UserError(
            f"{folder} has {len(domains)} domain folders; it needs two, with one folder per class each"
        )
    classes = class_folder_names(folder / domains[0])
    if len(classes) < 2:
        raise UserError(
            f"{folder / domains[0]} holds {len(classes)} class folders; a domain needs at least two"
        )
    items: list[Item] = []
    for index, domain in enumerate(domains):
        place = folder / domain
        if differing := sorted(set(classes) ^ set(class_folder_names(place))):
            told = f"have different classes, such as {differing[0]!r}; every domain needs the same folders"
            raise UserError(f"domains {domains[0]} and {domain} of {folder} {told}")
        labels, prefix = numbered(classes), f"{domain}/"
        items += class_items(place, labels, prefix=prefix, domain=index, suffixes=DOMAIN_SUFFIXES)
    names = [label.replace("_", " ") for label in classes]
    # VL2V-ADiP's prompt has no full stop.
    return LabelledSet(name, names, ["a photo of a {}"], {ALL: items}, domains)
