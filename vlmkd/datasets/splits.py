"""Splits of labelled sets: few shots, base and novel classes, and percent lists.

Each rule reproduces the picks of the code that published numbers come from, bit for bit, with a generator of its own.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vlmkd.data.labelled import UNLABELLED, Item, by_class
from vlmkd.errors import UserError
from vlmkd.files import read_text

log = logging.getLogger(__name__)

Fewer = Literal["keep", "repeat", "refuse"]
"""What happens to a class with fewer images than shots: keep them all, repeat at random, or refuse."""
ListKind = Literal["cascade", "simclr"]
"""Percent lists of ImageNet: `cascade` is DHO's rule (`percent_list`), `simclr` the lists of the SimCLR project."""

_MAX_VAL_SHOTS = 4  # CoOp's rule keeps the validation shots at four (PromptKD e.4)
_CASCADE_SEED = 13
LIST_MARK = "# vlmkd image list"
"""How the first line of a list begins that `data_tools/make_split.py` wrote."""


def coop_few_shot(
    train: Sequence[Item],
    val: Sequence[Item],
    shots: int,
    seed: int,
    *,
    fewer: Fewer = "refuse",
    class_names: Sequence[str] = (),
) -> tuple[list[Item], list[Item]]:
    """Few-shot train and val items by CoOp's rule, which PromptSRC, PromptKD, Tip-Adapter and DHO use; 0 shots are all.

    Classes come in the order of first appearance and one generator serves train and then val, which gets at most four
    a class. Give all classes: the base and novel halves are taken from the result.
    """
    if shots == 0:
        return list(train), list(val)
    rng = random.Random(seed)
    picked = _pick(train, shots, rng, fewer, class_names)
    # The val split may have no image of a rare class whatever the shots are, so that nothing is refused there.
    val_fewer: Fewer = "keep" if fewer == "refuse" else fewer
    return picked, _pick(val, min(shots, _MAX_VAL_SHOTS), rng, val_fewer, class_names)


def rest_of(items: Sequence[Item], picked: Sequence[Item]) -> list[Item]:
    """The items whose key is not among `picked`, without their labels: DHO's unlabelled images."""
    taken = {item.key for item in picked}
    return [item.unlabelled() for item in items if item.key not in taken]


def _pick(
    items: Sequence[Item], shots: int, rng: random.Random, fewer: Fewer, class_names: Sequence[str]
) -> list[Item]:
    if shots < 1:
        raise UserError(f"shots is {shots}; give a number of images a class from 1 on")
    groups = by_class(items)
    if UNLABELLED in groups:
        raise UserError("few shots are picked from labelled images; one here has no label")
    if small := {label: len(group) for label, group in groups.items() if len(group) < shots}:
        label, fewest = min(small.items(), key=lambda pair: pair[1])
        name = f" ({class_names[label]})" if label < len(class_names) else ""
        told = f"{len(small)} classes have fewer images, class {label}{name} has {fewest}"
        if fewer == "refuse":
            raise UserError(
                f"shots is {shots}, more than there are: {told}; ask for at most {fewest} shots, or set the field fewer "
                "beside shots to keep or repeat"
            )
        log.warning("shots is %d: %s; fewer is %s", shots, told, fewer)
    picked: list[Item] = []
    for group in groups.values():
        if len(group) >= shots:
            picked += rng.sample(group, shots)
        else:
            picked += group if fewer == "keep" else rng.choices(group, k=shots)
    return picked


def base_and_novel(train: Sequence[Item]) -> tuple[list[int], list[int]]:
    """Labels of the base classes and of the novel ones: halves of the sorted labels of the *whole* train split.

    The base half is the larger one (PromptKD e.3). `labelled.only_classes` takes either half and relabels it from 0.
    """
    labels = sorted({item.label for item in train} - {UNLABELLED})
    half = math.ceil(len(labels) / 2)
    return labels[:half], labels[half:]


def cascade_counts(class_sizes: Sequence[int], percent: float) -> list[int]:
    """Labelled images of each of C classes for `percent` of all images, by DHO's cascade rounding.

    The running sum decides which way each class's share is rounded; shares grow by 1/C until the total reaches the
    percentage. 1 % of ImageNet gives 13 a class, 10 % gives 128 or 129.
    """
    if not percent > 0:
        raise UserError(f"percent is {percent}; give a share of the images above 0, such as 1 or 10")
    if not class_sizes or min(class_sizes) < 1:
        raise UserError("a class without images cannot give labelled ones; leave it out")
    if percent >= 100:
        return list(class_sizes)
    sizes = np.asarray(class_sizes, dtype=np.float64)
    goal = sizes.sum() * (percent / 100)
    shares = np.clip(goal / len(sizes) - 1, 1, sizes)
    while True:
        running = np.cumsum(shares)
        counts = np.where(running - np.floor(running) > 0.5, np.ceil(shares), np.floor(shares))
        counts = np.minimum(counts, sizes)
        if counts.sum() >= goal:
            return [int(count) for count in counts]
        shares = np.minimum(shares + 1 / len(sizes), sizes)


def percent_picks(labels: Sequence[int], percent: float) -> list[int]:
    """Positions of the labelled images, class by class, by DHO's rule; from 100 per cent on, every image in its own order.

    `labels` in the data set's own order (for ImageNet sorted wnid, then sorted file name).
    """
    if percent >= 100:
        return list(range(len(labels)))
    every = np.asarray(labels)
    of_class = [np.flatnonzero(every == label) for label in sorted(set(labels))]
    counts = cascade_counts([len(positions) for positions in of_class], percent)
    generator = np.random.RandomState(_CASCADE_SEED)
    picks: list[int] = []
    for positions, count in zip(of_class, counts, strict=True):
        picks += generator.choice(positions, count, replace=False).tolist()
    return picks


@dataclass(frozen=True)
class ImageList:
    """Which images of a set are labelled, by name."""

    kind: ListKind
    names: list[str]
    """Item keys, or (SimCLR) file names without their folder."""

    @property
    def sha256(self) -> str:
        """Digest of the names in their order, one a line."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()


def percent_list(items: Sequence[Item], percent: float) -> ImageList:
    """The `cascade` list of a set's training items, in the order of the draws."""
    picks = percent_picks([item.label for item in items], percent)
    return ImageList("cascade", [items[position].key for position in picks])


def read_list(path: Path, kind: ListKind) -> ImageList:
    """Read a list of this kind: one of `make_split.py --percent`, or SimCLR's plain file of names (`n01440764_10074.JPEG` a line)."""
    lines = read_text(path, "image list", "write it, or correct the path").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = ImageList(kind, names)
    if lines and lines[0].startswith(LIST_MARK):
        head = re.match(rf"{LIST_MARK}, kind (\S+), percent \d", lines[0])
        if head is None:
            raise UserError(f"{path} has a damaged first line; write it again")
        if head[1] != kind:
            raise UserError(f"{path} is a list of kind {head[1]}, not {kind}; the two are never mixed")
        if lines[1:2] != [f"# sha256 {found.sha256}"]:
            raise UserError(f"{path} was changed after it was written (its digest differs); write it again")
    elif kind != "simclr":
        raise UserError(
            f"{path} does not say which rule made it, so it is no {kind} list; plain lists are read as kind simclr"
        )
    if not names:
        raise UserError(f"image list {path} names no image; write it again")
    if len(set(names)) < len(names):
        raise UserError(f"image list {path} names an image twice; write it again")
    return found


def pick_listed(items: Sequence[Item], images: ImageList) -> list[Item]:
    """The items that a list names, in its order."""
    bare = images.kind == "simclr"
    by_name = {item.key.rpartition("/")[2] if bare else item.key: item for item in items}
    if missing := [name for name in images.names if name not in by_name]:
        raise UserError(
            f"{len(missing)} of {len(images.names)} listed images are not in the training split, first {missing[0]}; "
            "use the list of this data set, or complete the images"
        )
    return [by_name[name] for name in images.names]
