"""Image folders with one subfolder per class: ImageNet's `val/<wnid>/*.JPEG` and its many relatives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmkd.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Lower-case endings of files that count as images."""
IMAGENET_HELP = (
    "ImageNet: get ILSVRC2012_img_val.tar from https://image-net.org/download (free registration), unpack it and move "
    "the images into one folder per wnid, {val}/n01440764/*.JPEG and so on"
)
_NAMED = 3  # offenders that an error line names


@dataclass(frozen=True)
class ClassFolders:
    """Images of a folder with one subfolder per class, classes in order, images sorted within their class."""

    root: str
    """The folder that holds the class folders."""
    classes: list[str]
    """Folder names: by number when all are numbers, else alphabetical, so that sorted wnids are ImageNet's order."""
    images: list[str]
    """Paths."""
    labels: list[int]
    """Index into `classes`, one per image."""


def list_class_folders(root: str, split: str = "val") -> ClassFolders:
    """List `root/<split>/<class>/...` if there is such a split, else `root/<class>/...`; subfolders are searched too.

    Raises:
        UserError: nothing there, images that lie outside class folders, or an empty class folder.
    """
    base = Path(root).expanduser()
    help_line = IMAGENET_HELP.format(val=base / split)
    if not base.is_dir():
        raise UserError(f"image folder {root} does not exist (looked from {os.getcwd()}); {help_line}")
    if (base / split).is_dir():
        base = base / split
    elif (base / "train").is_dir():
        raise UserError(
            f"{base} has a train folder but no {split} folder: {base / split} is missing; {help_line}"
        )
    folders = [item.name for item in os.scandir(base) if item.is_dir() and not item.name.startswith(".")]
    if not folders:
        loose = sum(is_image(name) for name in os.listdir(base))
        found = f"holds {loose} images but no class folders" if loose else "holds no class folders"
        raise UserError(f"{base} {found}; sort its images into one folder per class; {help_line}")
    numbered = all(name.isdecimal() for name in folders)
    folders.sort(key=(lambda name: (int(name), name)) if numbered else None)
    per_class = [list_images(base / name) for name in folders]
    empty = [str(base / name) for name, images in zip(folders, per_class, strict=True) if not images]
    if empty:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        raise UserError(f"class folder {', '.join(empty[:_NAMED])}{more} holds no image; fill or remove it")
    return ClassFolders(
        root=str(base),
        classes=folders,
        images=[path for images in per_class for path in images],
        labels=[label for label, images in enumerate(per_class) for _ in images],
    )


def class_folder_names(folder: Path) -> list[str]:
    """Names of the folders in `folder`, in ASCII order (`TV` before `Table`); hidden ones are left out."""
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
    )


def images_of_classes(
    folder: Path, classes: Sequence[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> list[list[str]]:
    """Paths relative to `folder` of each class's images, sorted inside the class and with `/` between folders.

    Raises:
        UserError: a class without images.
    """
    start = len(str(folder)) + 1  # string work: ImageNet has 1.3 million paths
    found = [
        [path[start:].replace(os.sep, "/") for path in list_images(folder / name, suffixes)]
        for name in classes
    ]
    empty = [str(folder / name) for name, images in zip(classes, found, strict=True) if not images]
    if empty:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        raise UserError(f"class folder {', '.join(empty[:_NAMED])}{more} holds no image; fill or remove it")
    return found


def data_set_folder(
    root: str, names: Sequence[str], marks: Sequence[str], data_set: str, source: str
) -> Path:
    """The first of `root/<name>` that is a folder, or `root` itself when it holds one of `marks`.

    Raises:
        UserError: no root, or the data set is not there; `source` says where it comes from.
    """
    where = root_folder(root, data_set, f"it is the folder that holds {names[0]}/")
    for name in names:
        if (where / name).is_dir():
            return where / name
    if any((where / mark).exists() for mark in marks):
        return where
    raise UserError(f"data set {data_set}: {where / names[0]} does not exist; {source}")


def root_folder(root: str, data_set: str, meaning: str) -> Path:
    """`root` as a path.

    Raises:
        UserError: it is empty or no folder.
    """
    if not root:
        raise UserError(f"data set {data_set} is read from disk: give its root; {meaning}")
    where = Path(root).expanduser()
    if not where.is_dir():
        raise UserError(
            f"data set {data_set}: root {root} does not exist (looked from {os.getcwd()}); {meaning}"
        )
    return where


def list_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Paths of all images in `folder` and below, sorted; hidden files and folders are left out."""
    found: list[str] = []
    for current, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(os.path.join(current, name) for name in files if is_image(name, suffixes))
    return sorted(found)


def is_image(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(suffixes) and not name.startswith(".")
