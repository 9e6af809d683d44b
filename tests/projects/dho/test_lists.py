"""Lists of labelled images against the picks of the released code (golden vectors of the paper's spec)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools import make_split
from projects.dho import labels, lists
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import UNLABELLED, Item
from vlmkd.datasets import splits
from vlmkd.errors import UserError


def items(*sizes: int) -> list[Item]:
    """Items of classes of these sizes, class by class; keys are `class/number`."""
    return [
        Item(f"{label}/{number}", ImageRef("x"), label)
        for label, size in enumerate(sizes)
        for number in range(size)
    ]


def test_the_rest_is_everything_that_was_not_picked_without_labels() -> None:
    data = items(9, 2)
    picked, _ = splits.coop_few_shot(data, [], 4, seed=1, fewer="repeat")
    rest = labels.rest_of(data, picked)
    assert {item.key for item in rest} == {item.key for item in data} - {item.key for item in picked}
    assert {item.label for item in rest} == {UNLABELLED}


def test_cascade_counts_of_imagenet() -> None:
    sizes = [1281] * 833 + [1282] * 167  # 1,281,167 images; the rule does not depend on the single sizes
    assert sum(sizes) == 1_281_167
    assert lists.cascade_counts(sizes, 1) == [13] * 1000
    assert lists.cascade_counts(sizes, 10) == [128] * 714 + [129] * 286
    assert lists.cascade_counts(sizes, 100) == sizes


@pytest.mark.parametrize(
    ("sizes", "percent", "per_class", "first"),
    [
        ([100] * 10, 1, 1, [37, 81, 59, 93, 56, 12]),
        ([100] * 10, 10, 10, [37, 62, 83, 14, 43, 9]),
        ([30, 50, 70, 90, 110], 10, 7, [22, 15, 26, 1, 25, 8]),
        ([1300] * 5, 1, 13, [321, 1161, 200, 530, 561, 1114]),
    ],
)
def test_percent_list(sizes: list[int], percent: float, per_class: int, first: list[int]) -> None:
    picks = [tuple(map(int, key.split("/"))) for key in lists.percent_list(items(*sizes), percent)]
    assert [number for _, number in picks[: len(first)]] == first
    assert [label for label, _ in picks] == [c for c in range(len(sizes)) for _ in range(per_class)]
    assert len(set(picks)) == len(picks)


def test_percent_picks_use_a_generator_of_their_own() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    lists.percent_list(items(50, 50), 10)
    assert (np.random.get_state()[1] == before).all()
    with pytest.raises(UserError, match="percent is 0"):
        lists.percent_list(items(1, 1), 0)
    assert lists.percent_list(items(1, 1)[::-1], 100) == ["1/0", "0/0"]


def test_lists_are_written_once_and_their_kind_is_kept(tmp_path: Path) -> None:
    data = items(100, 100)
    made = lists.percent_list(data, 10)
    path = tmp_path / "lists" / "10.txt"
    make_split.write_list(path, made, 10)
    make_split.write_list(path, made, 10)
    assert lists.read_list(path, "cascade") == made
    labelled = lists.pick_listed(data, lists.read_list(path, "cascade"), "cascade")
    rest = labels.rest_of(data, labelled)
    assert [item.key for item in labelled] == made and len(rest) == 200 - len(labelled)
    assert {item.label for item in labelled} == {0, 1} and {item.label for item in rest} == {UNLABELLED}
    with pytest.raises(UserError, match="lists other images"):
        make_split.write_list(path, lists.percent_list(data, 20), 20)
    with pytest.raises(UserError, match="kind cascade, not simclr"):
        lists.read_list(path, "simclr")
    path.write_text(path.read_text().replace(made[0], "0/none"))
    with pytest.raises(UserError, match="changed after it was written"):
        lists.read_list(path, "cascade")


def test_simclr_lists_have_bare_names(tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("n01_2.JPEG\nn02_7.JPEG\n")
    data = [
        Item(f"train/{name[:3]}/{name}", ImageRef("x"), 0)
        for name in ("n01_1.JPEG", "n01_2.JPEG", "n02_7.JPEG")
    ]
    labelled = lists.pick_listed(data, lists.read_list(path, "simclr"), "simclr")
    rest = labels.rest_of(data, labelled)
    assert [item.key[-10:] for item in labelled] == ["n01_2.JPEG", "n02_7.JPEG"] and len(rest) == 1
    with pytest.raises(UserError, match="kind simclr, not cascade"):
        lists.read_list(path, "cascade")
    with pytest.raises(
        UserError, match="1 of 2 listed images are not in the training split, first n02_7.JPEG"
    ):
        lists.pick_listed(data[:2], lists.read_list(path, "simclr"), "simclr")
    path.write_text("a\na\n")
    with pytest.raises(UserError, match="twice"):
        lists.read_list(path, "simclr")
