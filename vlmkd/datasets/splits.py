"""Splits of labelled sets as published code draws them, bit for bit: few shots, and base and novel classes."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import Literal

from vlmkd.data.labelled import UNLABELLED, Item, by_class
from vlmkd.errors import UserError

log = logging.getLogger(__name__)

Fewer = Literal["keep", "repeat", "refuse"]
"""What happens to a class with fewer images than shots: keep them all, repeat at random, or refuse."""
_MAX_VAL_SHOTS = 4  # CoOp's rule keeps the validation shots at four (PromptKD e.4)


def coop_few_shot(
    train: Sequence[Item],
    val: Sequence[Item],
    shots: int,
    seed: int,
    *,
    fewer: Fewer = "refuse",
    class_names: Sequence[str] = (),
) -> tuple[list[Item], list[Item]]:
    """Train and val items by CoOp's rule, which PromptSRC, PromptKD, Tip-Adapter and DHO use; 0 shots are all.

    Classes come in the order of first appearance; one generator serves train and then val, which gets at most four
    a class. Give all classes: base and novel halves are taken from the result.
    """
    if shots == 0:
        return list(train), list(val)
    rng = random.Random(seed)
    picked = _pick(train, shots, rng, fewer, class_names)
    # The val split may have no image of a rare class, whatever the shots.
    val_fewer: Fewer = "keep" if fewer == "refuse" else fewer
    return picked, _pick(val, min(shots, _MAX_VAL_SHOTS), rng, val_fewer, class_names)


def _pick(
    items: Sequence[Item], shots: int, rng: random.Random, fewer: Fewer, class_names: Sequence[str]
) -> list[Item]:
    if shots < 1:
        raise UserError(f"shots is {shots}; give 1 or more images a class")
    groups = by_class(items)
    if UNLABELLED in groups:
        raise UserError("few shots are picked from labelled images; one here has no label")
    if small := {label: len(group) for label, group in groups.items() if len(group) < shots}:
        label, fewest = min(small.items(), key=lambda pair: pair[1])
        name = f" ({class_names[label]})" if label < len(class_names) else ""
        told = f"{len(small)} classes have fewer images, class {label}{name} has {fewest}"
        if fewer == "refuse":
            mend = f"ask for at most {fewest}, or set the field fewer beside it to keep or repeat"
            raise UserError(f"shots is {shots}: {told}; {mend}")
        log.warning("shots is %d: %s; fewer is %s", shots, told, fewer)
    picked: list[Item] = []
    for group in groups.values():
        if len(group) >= shots:
            picked += rng.sample(group, shots)
        else:
            picked += group if fewer == "keep" else rng.choices(group, k=shots)
    return picked


def base_and_novel(train: Sequence[Item]) -> tuple[list[int], list[int]]:
    """Base and novel classes: halves of the sorted labels of the *whole* train split, base the larger (PromptKD e.3)."""
    labels = sorted({item.label for item in train} - {UNLABELLED})
    half = math.ceil(len(labels) / 2)
    return labels[:half], labels[half:]
