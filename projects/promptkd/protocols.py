"""Which images each stage sees, and which it is judged by (docs/papers/promptkd.md#recipe)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from projects.promptkd.config import StudentConfig, TeacherConfig
from vlmkd.data.labelled import Item, LabelledSet, by_class
from vlmkd.datasets.labelled_sets import items_of
from vlmkd.datasets.splits import base_and_novel, coop_few_shot
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Evaluator
from vlmkd.evaluation.classify import Classification

log = logging.getLogger("vlmkd.promptkd")


@dataclass(frozen=True)
class Protocol:
    """What one run trains on and is evaluated on."""

    train: list[Item]
    """Training images; in stage 2 without labels."""
    classes: list[int]
    """Classes whose labels may be used, as numbers of the whole set; stage 1's labels count in this order."""
    test: Classification
    """All classes; base, novel and harmonic mean where the setting has them, from one pass."""
    validation: Classification | None
    """Images of these classes for select=val."""
    selection_metric: str
    """Metric of `test` by which the reference chooses its epoch."""

    @property
    def evaluators(self) -> list[Evaluator]:
        """The test set, and before it the validation images."""
        return [self.test] if self.validation is None else [self.validation, self.test]


def teacher_protocol(cfg: TeacherConfig, dataset: LabelledSet) -> Protocol:
    """Stage 1: `shots` labelled images a class, picked before the base half is taken."""
    whole = items_of(dataset, "train")
    val = dataset.splits.get("val", []) if cfg.select == "val" else []
    train, few_val = coop_few_shot(
        whole, val, cfg.shots, cfg.seed, fewer=cfg.fewer, class_names=dataset.class_names
    )
    halves = cfg.classes == "base"
    classes = base_and_novel(whole)[0] if halves else sorted(by_class(whole))
    judged = few_val if cfg.select == "val" else None
    return _protocol(dataset, only_classes(train, classes), classes, halves, judged)


def only_classes(items: Sequence[Item], classes: Sequence[int]) -> list[Item]:
    """The items of these classes, relabelled 0, 1, ... in the order of `classes`."""
    position = {label: index for index, label in enumerate(classes)}
    return [replace(item, label=position[item.label]) for item in items if item.label in position]


def student_protocol(cfg: StudentConfig, dataset: LabelledSet) -> Protocol:
    """Stage 2: all training images without their labels (transductive)."""
    everything = list(range(len(dataset.class_names)))
    train = student_images(cfg, dataset)
    if cfg.protocol == "domain_generalization":
        _, test = held_out(items_of(dataset, "test"), cfg.hold_out, cfg.seed)
        if not cfg.hold_out:
            log.warning(
                "hold_out=0: the %d images of %s are both the unlabelled training set and the test set, as in the "
                "reference; such a number is no measure of generalisation",
                len(test), dataset.name,
            )  # fmt: skip
        judged = Classification(test, dataset.class_names, dataset=dataset.name)
        return Protocol(train, everything, judged, None, "top1")
    halves = cfg.protocol == "base_to_novel"
    classes = base_and_novel(items_of(dataset, "train"))[0] if halves else everything
    val = dataset.splits.get("val", []) if cfg.select == "val" else None
    return _protocol(dataset, train, classes, halves, val)


def _protocol(
    dataset: LabelledSet, train: list[Item], classes: list[int], halves: bool, val: list[Item] | None
) -> Protocol:
    """`halves`: judge base and novel classes apart; `val`: candidates for validation, None without select=val."""
    base, novel = base_and_novel(items_of(dataset, "train")) if halves else ((), ())
    test = Classification.of(dataset, base=base, novel=novel)
    validation = None
    if val is not None:
        kept = [item for item in val if item.label in classes]
        if not kept:
            raise UserError(
                f"config field select is val, but {dataset.name} has no validation images; use select=last"
            )
        validation = Classification(kept, dataset.class_names, dataset=f"{dataset.name}_val")
    return Protocol(train, classes, test, validation, "base_top1" if halves else "top1")


def student_images(cfg: StudentConfig, dataset: LabelledSet) -> list[Item]:
    """The images of stage 2, without labels; those of the split `unlabelled` count unless `shots` are picked."""
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
