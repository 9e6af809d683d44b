"""Which images each stage sees, and which it is judged by (docs/papers/promptkd.md#recipe)."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

from projects.promptkd.config import StudentConfig, TeacherConfig
from vlmkd.data.labelled import Item, LabelledSet, by_class, only_classes
from vlmkd.datasets.labelled_sets import items_of
from vlmkd.datasets.splits import base_and_novel, coop_few_shot
from vlmkd.errors import UserError
from vlmkd.evaluation.classify import Classification

log = logging.getLogger("vlmkd.promptkd")


@dataclass(frozen=True)
class Protocol:
    """What one run trains on and is evaluated on."""

    train: list[Item]
    """Training images; in stage 2 without labels."""
    train_classes: list[int]
    """Classes of the training labels, as numbers of the whole set; labels count from 0 in this order."""
    test: Classification
    """All classes; base, novel and harmonic mean where the setting has them, from one pass."""
    validation: Classification | None
    """Images for select=val: of the classes whose labels the setting allows."""
    selection_metric: str
    """Metric of `test` by which the reference chooses its epoch."""


def teacher_protocol(cfg: TeacherConfig, dataset: LabelledSet) -> Protocol:
    """Stage 1: `shots` labelled images a class, picked over all classes before the base half is taken.

    Raises:
        UserError: a set without a train split, or select=val without a val split.
    """
    whole = items_of(dataset, "train")
    val = dataset.splits.get("val", []) if cfg.select == "val" else []
    train, few_val = coop_few_shot(
        whole, val, cfg.shots, cfg.seed, fewer=cfg.fewer, class_names=dataset.class_names
    )
    base, novel = base_and_novel(whole)
    classes = base if cfg.classes == "base" else sorted(by_class(whole))
    if cfg.classes == "base":
        test, metric = Classification.of(dataset, base=base, novel=novel), "base_top1"
    else:
        test, metric = Classification.of(dataset), "top1"
    validation = _validation(dataset, few_val, classes) if cfg.select == "val" else None
    return Protocol(only_classes(train, classes), classes, test, validation, metric)


def student_protocol(cfg: StudentConfig, dataset: LabelledSet) -> Protocol:
    """Stage 2: all training images of the target set without their labels (transductive).

    Raises:
        UserError: a set without the splits that the protocol needs.
    """
    everything = list(range(len(dataset.class_names)))
    unlabelled = student_images(cfg, dataset)
    if cfg.protocol == "domain_generalization":
        _, test = held_out(items_of(dataset, "test"), cfg.hold_out, cfg.seed)
        if not cfg.hold_out:
            log.warning(
                "hold_out=0: the %d images of %s are both the unlabelled training set and the test set, as in the "
                "reference; such a number is no measure of generalisation",
                len(test), dataset.name,
            )  # fmt: skip
        judged = Classification(test, dataset.class_names, dataset=dataset.name)
        return Protocol(unlabelled, everything, judged, None, "top1")
    val = dataset.splits.get("val", [])
    if cfg.protocol == "cross_dataset":
        validation = _validation(dataset, val, everything) if cfg.select == "val" else None
        return Protocol(unlabelled, everything, Classification.of(dataset), validation, "top1")
    base, novel = base_and_novel(items_of(dataset, "train"))
    validation = _validation(dataset, val, base) if cfg.select == "val" else None
    return Protocol(
        unlabelled, everything, Classification.of(dataset, base=base, novel=novel), validation, "base_top1"
    )


def student_images(cfg: StudentConfig, dataset: LabelledSet) -> list[Item]:
    """The images of stage 2, without labels; those of the split `unlabelled` count unless `shots` are picked.

    Raises:
        UserError: a set without such images.
    """
    if cfg.protocol == "domain_generalization":
        train, _ = held_out(items_of(dataset, "test"), cfg.hold_out, cfg.seed)
        return [item.unlabelled() for item in train]
    more = [] if cfg.shots else dataset.splits.get("unlabelled", [])
    labelled = dataset.splits.get("train", []) if more else items_of(dataset, "train")
    train, _ = coop_few_shot(
        labelled, [], cfg.shots, cfg.seed, fewer=cfg.fewer, class_names=dataset.class_names
    )
    return [item.unlabelled() for item in train] + more


def held_out(items: list[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(training, test) images of a set with one split: of each class a random `share` is test; 0: all are both.

    A class keeps at least one image on either side where it has two.

    Raises:
        UserError: a side without images.
    """
    if share == 0:
        return items, items
    train: list[Item] = []
    test: list[Item] = []
    for label, group in sorted(by_class(items).items()):
        shuffled = random.Random(f"{seed}/hold_out/{label}").sample(group, len(group))
        count = min(max(round(share * len(group)), 1), max(len(group) - 1, 0))
        test += shuffled[:count]
        train += shuffled[count:]
    if not train or not test:
        raise UserError(f"config field hold_out is {share}; of {len(items)} images one side has none")
    return train, test


def _validation(dataset: LabelledSet, items: list[Item], classes: list[int]) -> Classification:
    allowed = set(classes)
    kept = [item for item in items if item.label in allowed]
    if not kept:
        raise UserError(
            f"config field select is val, but {dataset.name} has no validation images; use select=last"
        )
    return Classification(kept, dataset.class_names, dataset=f"{dataset.name}_val")
