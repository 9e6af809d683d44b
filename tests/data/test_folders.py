"""Listing of class folders, on small trees in the layouts that people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmkd.datasets.folders import list_class_folders
from vlmkd.errors import UserError


def _touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_imagenet_layout(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        "val/n02/b.JPEG",
        "val/n01/z.JPEG",
        "val/n01/a.JPEG",
        "val/n01/notes.txt",
        "val/.cache/x.jpg",
    )
    found = list_class_folders(str(tmp_path))
    assert found.root == str(tmp_path / "val") and found.classes == ["n01", "n02"]
    assert [Path(path).name for path in found.images] == ["a.JPEG", "z.JPEG", "b.JPEG"]
    assert found.labels == [0, 0, 1]
    assert list_class_folders(str(tmp_path / "val")) == found


def test_numbered_folders_are_ordered_by_number(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"{number}/x.jpg" for number in (0, 1, 2, 10)))
    assert list_class_folders(str(tmp_path)).classes == ["0", "1", "2", "10"]


def test_images_in_subfolders_count(tmp_path: Path) -> None:
    _touch(tmp_path, "n01/images/a.JPEG", "n01/images/.hidden.JPEG")
    assert len(list_class_folders(str(tmp_path)).images) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no class folders.*image-net.org"),
        (["val/a.JPEG", "val/b.JPEG"], "val holds 2 images but no class folders"),
        (["train/n01/a.JPEG"], "no val folder: .*/val is missing.*image-net.org"),
        (["val/n01/a.JPEG", "val/n02/readme.txt"], "class folder .*/val/n02 holds no image"),
        ([f"{letter}/x.txt" for letter in "abcde"], "/a, .*/b, .*/c and 2 more holds no image"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, files: list[str], message: str) -> None:
    _touch(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        list_class_folders(str(tmp_path))


def test_missing_root() -> None:
    with pytest.raises(UserError, match="nowhere does not exist.*nowhere/val/n01440764"):
        list_class_folders("nowhere")
