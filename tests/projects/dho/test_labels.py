"""Which images have labels: roles do not overlap, counts follow the settings, and the test set is nobody's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from projects.dho import labels
from projects.dho.config import SplitConfig
from vlmkd.config import LabelledDataConfig
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import UNLABELLED, Item, LabelledSet
from vlmkd.errors import UserError

SIZES = {"cat": 12, "dog": 7, "toad": 3}


def items(split: str, sizes: dict[str, int]) -> list[Item]:
    """`sizes` images of every class, classes taking turns."""
    rows = [(n, label, name) for label, (name, size) in enumerate(sizes.items()) for n in range(size)]
    return [Item(f"{split}/{name}/{n}", ImageRef("x"), label, 0) for n, label, name in sorted(rows)]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The roles in a set of 12, 7 and 3 training images."""
    parts = {"train": items("train", SIZES), "val": items("val", dict.fromkeys(SIZES, 2))}
    parts["test"] = items("test", dict.fromkeys(SIZES, 4))
    dataset = LabelledSet("tiny", list(SIZES), ["a {}."], parts, [])
    monkeypatch.setattr(labels, "configured_set", lambda data: dataset)
    return lambda **split: labels.choose(LabelledDataConfig(set="tiny"), SplitConfig(**split))


def keys(part: list[Item]) -> set[str]:
    return {item.key for item in part}


def per_class(part: list[Item]) -> dict[str, int]:
    return dict(sorted(Counter(item.key.split("/")[1] for item in part).items()))


def test_every_training_image_has_one_role_and_no_label_reaches_the_unlabelled(choose: Any) -> None:
    found = choose(shots=2, validation_per_class=3)
    assert per_class(found.labelled) == {"cat": 2, "dog": 2, "toad": 2}
    # at most three, and at most half of what the labelled ones leave: 10, 5 and 1 images
    assert per_class(found.validation) == {"cat": 3, "dog": 2}
    assert per_class(found.unlabelled) == {"cat": 7, "dog": 3, "toad": 1}
    roles = [keys(found.labelled), keys(found.validation), keys(found.unlabelled)]
    assert sum(map(len, roles)) == len(set.union(*roles)) == 22
    assert {item.label for item in found.unlabelled} == {UNLABELLED}
    assert all(item.label == list(SIZES).index(item.key.split("/")[1]) for item in found.labelled)
    assert len(found.test) == 12 and not keys(found.test) & set.union(*roles)


def test_unlabelled_images_may_include_the_labelled_as_in_the_paper(choose: Any) -> None:
    found = choose(shots=2, validation_per_class=3, unlabelled_includes_labelled=True)
    assert keys(found.labelled) < keys(found.unlabelled)
    assert len(found.unlabelled) == 22 - len(found.validation)
    assert {item.label for item in found.unlabelled} == {UNLABELLED}


def test_validation_by_the_sets_own_split_or_none(choose: Any) -> None:
    own = choose(shots=2, validation="val")
    assert keys(own.validation) == {f"val/{name}/{n}" for name in SIZES for n in range(2)}
    assert len(own.unlabelled) == 22 - 6 and choose(shots=2, validation="none").validation == []


def test_draws_depend_on_the_seed_and_the_pool_does_not(choose: Any) -> None:
    one, again, other = choose(shots=2, seed=1), choose(shots=2, seed=1), choose(shots=2, seed=2)
    assert [item.key for item in one.labelled] == [item.key for item in again.labelled]
    assert keys(one.labelled) != keys(other.labelled)
    pools = [choose(shots=1, seed=seed, pool_per_class=4, validation="none") for seed in (1, 2)]
    assert keys(pools[0].labelled + pools[0].unlabelled) == keys(pools[1].labelled + pools[1].unlabelled)
    assert per_class(pools[0].labelled + pools[0].unlabelled) == {"cat": 4, "dog": 4, "toad": 3}


def test_a_small_class_repeats_its_images_and_keeps_the_rest_unlabelled(choose: Any) -> None:
    found = choose(shots=5, fewer="repeat", validation="none")
    assert per_class(found.labelled) == {"cat": 5, "dog": 5, "toad": 5}
    assert len({key for key in keys(found.labelled) if "toad" in key}) <= 3
    assert keys(found.labelled) | keys(found.unlabelled) == {
        f"train/{n}/{i}" for n in SIZES for i in range(SIZES[n])
    }
    assert not keys(found.labelled) & keys(found.unlabelled)


def test_without_labels_every_training_image_is_unlabelled(choose: Any) -> None:
    found = choose(validation="val")
    assert found.labelled == [] and len(found.unlabelled) == 22 and len(found.validation) == 6


def test_settings_that_leave_a_role_empty_are_refused(choose: Any) -> None:
    with pytest.raises(UserError, match="no training image is left without a label"):
        choose(shots=12, fewer="keep", validation="none")
    with pytest.raises(UserError, match="no class has two images beside its labelled ones"):
        choose(shots=11, fewer="keep")
