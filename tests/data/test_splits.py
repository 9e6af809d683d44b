"""Split rules against the picks of the code that published numbers come from (golden vectors of the papers' specs)."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data_tools import make_split
from projects.vl2v_adip import domain_split
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import UNLABELLED, Item, only_classes
from vlmkd.datasets import splits
from vlmkd.errors import UserError


def items(*sizes: int, labels: list[int] | None = None) -> list[Item]:
    """Items of classes of these sizes, class by class; keys are `class/number`."""
    labels = labels or list(range(len(sizes)))
    return [
        Item(f"{label}/{number}", ImageRef("x"), label)
        for label, size in zip(labels, sizes, strict=True)
        for number in range(size)
    ]


def numbers(found: list[Item]) -> list[int]:
    return [int(item.key.partition("/")[2]) for item in found]


def test_coop_picks_are_the_published_ones() -> None:
    train, val = splits.coop_few_shot(items(9, 9, labels=[5, 2]), [], 4, seed=1)
    assert numbers(train) == [2, 1, 8, 0, 7, 8, 3, 5] and val == []
    assert [item.label for item in train] == [5] * 4 + [2] * 4  # order of first appearance


def test_coop_val_goes_on_with_the_same_generator_and_stops_at_four() -> None:
    train, val = splits.coop_few_shot(items(20, 20), items(9, 3), 16, seed=3, fewer="keep")
    rng = random.Random(3)
    expected = [rng.sample(range(20), 16), rng.sample(range(20), 16), rng.sample(range(9), 4)]
    assert numbers(train) == expected[0] + expected[1]
    assert numbers(val) == expected[2] + [0, 1, 2]


def test_coop_keeps_a_small_class_as_it_is_and_zero_shots_is_everything() -> None:
    data = items(3, 9)
    train, _ = splits.coop_few_shot(data, [], 4, seed=1, fewer="keep")
    assert numbers(train[:3]) == [0, 1, 2]
    assert numbers(train[3:]) == [2, 1, 8, 0]  # a kept class draws nothing
    assert splits.coop_few_shot(data, data[:2], 0, seed=1) == (data, data[:2])


def test_tip_adapter_repeats_in_a_small_class() -> None:
    picked, _ = splits.coop_few_shot(items(9, 2), [], 4, seed=1, fewer="repeat")
    assert numbers(picked[:4]) == [2, 1, 8, 0]
    rng = random.Random(1)
    rng.sample(range(9), 4)
    assert numbers(picked[4:]) == rng.choices(range(2), k=4)


def test_more_shots_than_images_are_refused_with_class_and_counts() -> None:
    with pytest.raises(UserError, match=r"shots is 4, more than .*class 1 \(dog\) has 3; ask for at most 3"):
        splits.coop_few_shot(items(9, 3), [], 4, seed=1, class_names=["cat", "dog"])
    with pytest.raises(UserError, match="class 0 has 2"):
        splits.coop_few_shot(items(2, 5), [], 3, seed=1)
    with pytest.raises(UserError, match="shots is -1"):
        splits.coop_few_shot(items(2), [], -1, seed=1)
    with pytest.raises(UserError, match="no label"):
        splits.coop_few_shot([items(1)[0].unlabelled()], [], 1, seed=1)


def test_the_rest_is_everything_that_was_not_picked_without_labels() -> None:
    data = items(9, 2)
    picked, _ = splits.coop_few_shot(data, [], 4, seed=1, fewer="repeat")
    rest = splits.rest_of(data, picked)
    assert {item.key for item in rest} == {item.key for item in data} - {item.key for item in picked}
    assert {item.label for item in rest} == {UNLABELLED}


def test_base_and_novel_halves() -> None:
    data = items(1, 1, 1, 1, 1, labels=[7, 3, 9, 1, 4])
    base, novel = splits.base_and_novel(data)
    assert base == [1, 3, 4] and novel == [7, 9]
    assert [item.label for item in only_classes(data, novel)] == [0, 1]


def test_cascade_counts_of_imagenet() -> None:
    sizes = [1281] * 833 + [1282] * 167  # 1,281,167 images; the rule does not depend on the single sizes
    assert sum(sizes) == 1_281_167
    assert splits.cascade_counts(sizes, 1) == [13] * 1000
    assert splits.cascade_counts(sizes, 10) == [128] * 714 + [129] * 286
    assert splits.cascade_counts(sizes, 100) == sizes


@pytest.mark.parametrize(
    ("sizes", "percent", "per_class", "first"),
    [
        ([100] * 10, 1, 1, [37]),
        ([100] * 10, 10, 10, [37, 62, 83, 14, 43, 9]),
        ([30, 50, 70, 90, 110], 10, 7, [22, 15, 26, 1, 25, 8]),
        ([1300] * 5, 1, 13, [321, 1161, 200, 530, 561, 1114]),
    ],
)
def test_percent_picks(sizes: list[int], percent: float, per_class: int, first: list[int]) -> None:
    labels = [item.label for item in items(*sizes)]
    picks = splits.percent_picks(labels, percent)
    assert picks[: len(first)] == first
    assert [labels[pick] for pick in picks] == [c for c in range(len(sizes)) for _ in range(per_class)]
    assert len(set(picks)) == len(picks)


def test_one_per_cent_of_ten_classes() -> None:
    picks = splits.percent_picks([number // 100 for number in range(1000)], 1)
    assert [pick % 100 for pick in picks[:6]] == [37, 81, 59, 93, 56, 12]


def test_percent_picks_use_a_generator_of_their_own() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    splits.percent_picks([0] * 50 + [1] * 50, 10)
    assert (np.random.get_state()[1] == before).all()
    with pytest.raises(UserError, match="percent is 0"):
        splits.percent_picks([0, 1], 0)


def test_lists_are_written_once_and_their_kind_is_kept(tmp_path: Path) -> None:
    data = items(100, 100)
    made = splits.percent_list(data, 10)
    path = tmp_path / "lists" / "10.txt"
    make_split.write_list(path, made, 10)
    make_split.write_list(path, made, 10)
    assert splits.read_list(path, "cascade") == made
    labelled = splits.pick_listed(data, splits.read_list(path, "cascade"))
    rest = splits.rest_of(data, labelled)
    assert [item.key for item in labelled] == made.names and len(rest) == 200 - len(labelled)
    assert {item.label for item in labelled} == {0, 1} and {item.label for item in rest} == {UNLABELLED}
    with pytest.raises(UserError, match="lists other images"):
        make_split.write_list(path, splits.percent_list(data, 20), 20)
    with pytest.raises(UserError, match="kind cascade, not simclr"):
        splits.read_list(path, "simclr")
    path.write_text(path.read_text().replace(made.names[0], "0/none"))
    with pytest.raises(UserError, match="changed after it was written"):
        splits.read_list(path, "cascade")


def test_simclr_lists_have_bare_names(tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("n01_2.JPEG\nn02_7.JPEG\n")
    data = [
        Item(f"train/{name[:3]}/{name}", ImageRef("x"), 0)
        for name in ("n01_1.JPEG", "n01_2.JPEG", "n02_7.JPEG")
    ]
    labelled = splits.pick_listed(data, splits.read_list(path, "simclr"))
    rest = splits.rest_of(data, labelled)
    assert [item.key[-10:] for item in labelled] == ["n01_2.JPEG", "n02_7.JPEG"] and len(rest) == 1
    with pytest.raises(UserError, match="no cascade list"):
        splits.read_list(path, "cascade")
    with pytest.raises(
        UserError, match="1 of 2 listed images are not in the training split, first n02_7.JPEG"
    ):
        splits.pick_listed(data[:2], splits.read_list(path, "simclr"))
    path.write_text("a\na\n")
    with pytest.raises(UserError, match="twice"):
        splits.read_list(path, "simclr")


SEEDS = [
    [894182419, 1514274641, 1325548499, 1796103049, 1773288162, 1833038383],
    [785910682, 1442673865, 1981683110, 1739848239, 582996474, 65219121],
    [472130416, 181139023, 248334461, 1709828778, 402558190, 941488192],
]


def test_domain_seeds() -> None:
    assert [[domain_split.domain_seed(trial, e) for e in range(6)] for trial in range(3)] == SEEDS


def test_domain_splits_of_pacs() -> None:
    inside, out = domain_split.holdout_positions(2048, 0, 0)
    assert out[:6] == [548, 677, 1997, 977, 1553, 1123] and inside[:5] == [895, 510, 1575, 933, 362]
    assert domain_split.holdout_positions(2344, 1, 0)[1][:6] == [1488, 562, 461, 570, 2092, 1124]
    sizes = {
        "PACS": (2048, 2344, 1670, 3929),
        "VLCS": (1415, 2656, 3282, 3376),
        "TI": (4879, 9767, 4020, 6122),
    }
    outs = {
        name: [len(domain_split.holdout_positions(n, 0, 0)[1]) for n in counts]
        for name, counts in sizes.items()
    }
    assert outs == {"PACS": [409, 468, 334, 785], "VLCS": [283, 531, 656, 675], "TI": [975, 1953, 804, 1224]}


def test_held_out_sizes_and_clean_queries_of_the_published_sets() -> None:
    """VL2V spec (e) and (i).1: images of the 20 % of each domain, and how many a clean teacher is asked for in training."""
    outs = {
        "OfficeHome": ((2427, 4365, 4439, 4357), [485, 873, 887, 871], 12_472),
        "DomainNet": (
            (48129, 51605, 72266, 172500, 172947, 69128),
            [9625, 10321, 14453, 34500, 34589, 13825],
            469_262,
        ),
        "PACS": ((2048, 2344, 1670, 3929), [409, 468, 334, 785], 7_995),
        "VLCS": ((1415, 2656, 3282, 3376), [283, 531, 656, 675], 8_584),
        "TI": ((4879, 9767, 4020, 6122), [975, 1953, 804, 1224], 19_832),
        "TI, later": ((4741, 9736, 3970, 5883), [948, 1947, 794, 1176], 19_465),
    }
    for name, (counts, expected, queries) in outs.items():
        parts = [domain_split.holdout_positions(n, e, 1) for e, n in enumerate(counts)]
        assert [len(out) for _, out in parts] == expected, name
        assert sum(len(inside) for inside, _ in parts) == queries, name
        for n, (inside, out) in zip(counts, parts, strict=True):
            assert sorted([*inside, *out]) == list(range(n)), name


def test_split_domains_takes_the_items_in_their_order() -> None:
    data = [Item(f"{domain}/{n}", ImageRef("x"), 0, domain) for n in range(10) for domain in (1, 0)]
    found = domain_split.split_domains(data, trial_seed=2)
    assert list(found) == [0, 1]
    for domain, split in found.items():
        inside, out = domain_split.holdout_positions(10, domain, 2)
        assert (numbers(split.inside), numbers(split.out)) == (inside, out)
        assert {item.domain for item in split.inside + split.out} == {domain}
