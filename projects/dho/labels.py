"""Which images of a data set a run sees with a label, without one, for validation, and for the final test."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path

from projects.dho.config import SplitConfig
from projects.dho.lists import digest_of, percent_list, pick_listed, read_list
from vlmkd.config import LabelledDataConfig
from vlmkd.data.labelled import Item, LabelledSet, by_class
from vlmkd.datasets.labelled_sets import configured_set, items_of
from vlmkd.datasets.splits import coop_few_shot
from vlmkd.errors import UserError

log = logging.getLogger("vlmkd.dho")


@dataclass(frozen=True)
class Images:
    """The images of one run by role; unlabelled ones may include labelled ones."""

    dataset: LabelledSet
    labelled: list[Item]
    unlabelled: list[Item]
    validation: list[Item]
    test: list[Item]


def choose(data: LabelledDataConfig, split: SplitConfig) -> Images:
    """Load the set of `data` and give its images their roles."""
    dataset = configured_set(data)
    train = pool(items_of(dataset, "train"), split.pool_per_class)
    labelled = _labelled(train, split, dataset.class_names) if split.given else []
    held = _held_out(train, labelled, split) if split.validation == "train" else []
    unlabelled = rest_of(train, held if split.unlabelled_includes_labelled else [*labelled, *held])
    unlabelled += dataset.splits.get("unlabelled", [])
    if not unlabelled:
        raise UserError(
            f"{dataset.name}: no training image is left without a label; ask for fewer labels, or set "
            "split.unlabelled_includes_labelled=true"
        )
    validation = dataset.splits.get("val", []) if split.validation == "val" else held
    if split.validation != "none" and not validation:
        lacking, other = (
            ("it has no split val", "train")
            if split.validation == "val"
            else ("no class has two images beside its labelled ones", "val")
        )
        raise UserError(
            f"{dataset.name}: {lacking}; set split.validation={other}, or none with mixing.mode=fixed and selection=last"
        )
    test = items_of(dataset, "test")
    log.info(
        "%s: %d labelled, %d unlabelled, %d validation, %d test images, %d classes",
        dataset.name, len(labelled), len(unlabelled), len(validation), len(test), len(dataset.class_names),
    )  # fmt: skip
    return Images(dataset, labelled, unlabelled, validation, test)


def pool(train: list[Item], per_class: int) -> list[Item]:
    """At most `per_class` images of every class, the same for every seed, in the order of `train`; 0: all."""
    if not per_class:
        return train
    kept: set[str] = set()
    for label, group in by_class(train).items():
        chosen = random.Random(f"pool/{label}").sample(group, min(per_class, len(group)))
        kept.update(item.key for item in chosen)
    return [item for item in train if item.key in kept]


def _labelled(train: list[Item], split: SplitConfig, class_names: list[str]) -> list[Item]:
    if split.shots:
        return coop_few_shot(  # Tip-Adapter's picks are CoOp's
            train, [], split.shots, split.seed, fewer=split.fewer, class_names=class_names
        )[0]
    if split.list_file:
        names = read_list(Path(split.list_file), split.list_kind)
    else:
        names = percent_list(train, split.percent)
    if len(names) < len(train):  # a draw, which others may want to have again
        log.info("labels: list %s, %d images, sha256 %s", split.list_kind, len(names), digest_of(names))
    return pick_listed(train, names, split.list_kind)


def rest_of(items: list[Item], picked: list[Item]) -> list[Item]:
    """The items whose key is not among `picked`, without their labels."""
    taken = {item.key for item in picked}
    return [item.unlabelled() for item in items if item.key not in taken]


def _held_out(train: list[Item], labelled: list[Item], split: SplitConfig) -> list[Item]:
    """At most `validation_per_class` of every class's other images, and half of them."""
    taken = {item.key for item in labelled}
    rng = random.Random(f"{split.seed}/validation")
    held: list[Item] = []
    for group in by_class([item for item in train if item.key not in taken]).values():
        held += rng.sample(group, min(split.validation_per_class, len(group) // 2))
    return held
