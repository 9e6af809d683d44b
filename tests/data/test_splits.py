"""Split rules against the picks of the code that published numbers come from (golden vectors of the papers' specs)."""

from __future__ import annotations

import random

import pytest

from projects.vl2v_adip import domain_split
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
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
    with pytest.raises(UserError, match=r"shots is 4: .*class 1 \(dog\) has 3; ask for at most 3"):
        splits.coop_few_shot(items(9, 3), [], 4, seed=1, class_names=["cat", "dog"])
    with pytest.raises(UserError, match="class 0 has 2"):
        splits.coop_few_shot(items(2, 5), [], 3, seed=1)
    with pytest.raises(UserError, match="shots is -1"):
        splits.coop_few_shot(items(2), [], -1, seed=1)
    with pytest.raises(UserError, match="no label"):
        splits.coop_few_shot([items(1)[0].unlabelled()], [], 1, seed=1)


def test_base_and_novel_halves() -> None:
    data = items(1, 1, 1, 1, 1, labels=[7, 3, 9, 1, 4])
    base, novel = splits.base_and_novel(data)
    assert base == [1, 3, 4] and novel == [7, 9]


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
