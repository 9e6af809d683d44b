"""Image folders with one subfolder per class, `<class>/*`, and where data sets lie below a root."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Lower-case endings of files that count as images."""
_NAMED = 3  # offenders that an error line names


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


def class_items(
    folder: Path,
    classes: Sequence[str],
    labels: Sequence[int] = (),
    *,
    prefix: str = "",
    domain: int = 0,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
) -> list[Item]:
    """The images of class folders, class by class, with `labels` (default: 0, 1, ...) and `prefix` before their keys.

    Raises:
        UserError: a class without images.
    """
    found = images_of_classes(folder, classes, suffixes)
    return [
        Item(prefix + path, ImageRef(str(folder / path)), label, domain)
        for label, images in zip(labels or range(len(classes)), found, strict=True)
        for path in images
    ]


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
