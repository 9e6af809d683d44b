"""Roles of a user's own images: labels of all of them, of some, and images without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.dho.config import SplitConfig
from projects.dho.labels import choose
from vlmkd.config import LabelledDataConfig
from vlmkd.data.labelled import UNLABELLED
from vlmkd.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> LabelledDataConfig:
    """Two classes of 20 training and 2 test images each, and 7 images without a class."""
    for place, count in (("train/a", 20), ("train/b", 20), ("test/a", 2), ("test/b", 2), ("unlabelled", 7)):
        (tmp_path / place).mkdir(parents=True)
        for number in range(count):
            (tmp_path / place / f"{number}.png").write_bytes(b"x")
    return LabelledDataConfig(set=f"folder:{tmp_path}")


def test_all_labels_and_the_images_without_one(data: LabelledDataConfig) -> None:
    split = SplitConfig(percent=100, validation="val", unlabelled_includes_labelled=True)
    images = choose(data, split)
    held_out = len(images.validation)
    assert held_out >= 2 and len(images.labelled) == 40 - held_out and len(images.test) == 4
    assert {item.label for item in images.labelled} == {0, 1}
    assert len(images.unlabelled) == len(images.labelled) + 7
    assert {item.label for item in images.unlabelled} == {UNLABELLED}
    rest = choose(data, SplitConfig(percent=100, validation="val")).unlabelled
    assert {item.key.partition("/")[0] for item in rest} == {"unlabelled"} and len(rest) == 7


def test_nothing_left_without_a_label_is_an_error(data: LabelledDataConfig, tmp_path: Path) -> None:
    few = choose(data, SplitConfig(shots=2, validation="val"))
    assert len(few.labelled) == 4 and len(few.unlabelled) == 40 - len(few.validation) - 4 + 7
    (tmp_path / "unlabelled").rename(tmp_path.with_name(f"{tmp_path.name}_away"))
    with pytest.raises(UserError, match="split.unlabelled_includes_labelled=true"):
        choose(data, SplitConfig(percent=100, validation="val"))
