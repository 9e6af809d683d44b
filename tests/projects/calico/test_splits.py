"""Splits and label fractions: sizes, nesting, apart from val, the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from projects.calico.splits import FRACTIONS, digest, fraction, nuscenes_scenes, read_scenes
from vlmkd.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/nuscenes_devkit.json").read_text())


def test_splits_have_the_official_scenes() -> None:
    for split in ("train", "val", "test", "mini_train", "mini_val"):
        scenes = nuscenes_scenes(split)
        assert len(scenes) == len(set(scenes)) == GOLDEN["splits"][split]["count"]
        assert digest(scenes) == GOLDEN["splits"][split]["digest"]
    assert not set(nuscenes_scenes("train")) & {*nuscenes_scenes("val"), *nuscenes_scenes("test")}
    assert set(nuscenes_scenes("mini_val")) < set(nuscenes_scenes("val"))


def test_fractions_nest() -> None:
    train, val = nuscenes_scenes("train"), set(nuscenes_scenes("val"))
    part = {percent: fraction(train, percent) for percent in FRACTIONS}
    assert [len(part[percent]) for percent in FRACTIONS] == [35, 70, 140, 350, 700]
    sets = {percent: set(scenes) for percent, scenes in part.items()}
    assert sets[5] < sets[10] < sets[20] and sets[10] < sets[50] and not sets[20] <= sets[50]
    assert part[5][:3] == (train[0], train[20], train[40]) and not sets[100] & val
    # The same on every machine: run names hold these.
    assert {percent: digest(scenes) for percent, scenes in part.items()} == DIGESTS


DIGESTS = {5: "ac7f6b11", 10: "19ac7d81", 20: "4139a905", 50: "4129fa95", 100: "182d90e5"}


def test_lists_of_ones_own_and_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scenes.txt"
    file.write_text("# ours\nscene-0002\n\nscene-0001\n")
    assert read_scenes(file) == ("scene-0002", "scene-0001")
    for text, told in (("# none\n", "lists no scene"), ("a\na\n", "names a scene twice")):
        file.write_text(text)
        with pytest.raises(UserError, match=told):
            read_scenes(file)
    with pytest.raises(UserError, match="data.fraction is 15; it is one of 5, 10, 20, 50, 100"):
        fraction(["a"], 15)
    with pytest.raises(UserError, match="no split 'trian'; did you mean train"):
        nuscenes_scenes("trian")
