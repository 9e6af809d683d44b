"""Lists of labelled images: DHO's draw of a per cent, bit for bit as the released code's, and SimCLR's lists."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vlmkd.data.labelled import Item, by_class
from vlmkd.errors import UserError
from vlmkd.files import read_text

ListKind = Literal["cascade", "simclr"]
"""Of item keys by DHO's rule, and of files without their folder."""
LIST_MARK = "# vlmkd image list, kind cascade"
"""How the first line of a `cascade` list begins."""
_SEED = 13


def cascade_counts(class_sizes: Sequence[int], percent: float) -> list[int]:
    """Labelled images of each of C classes: 13 for 1 % of ImageNet, 128 or 129 for 10 %.

    The running sum decides which way a class's share is rounded; shares grow by 1/C until the total is reached.
    """
    if not percent > 0:
        raise UserError(f"percent is {percent}; give a share of the images above 0, such as 1 or 10")
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


def percent_list(items: Sequence[Item], percent: float) -> list[str]:
    """The `cascade` list of a set's training items in their order (of ImageNet: sorted wnid, then sorted file name)."""
    if percent >= 100:
        return [item.key for item in items]
    groups = [group for _, group in sorted(by_class(items).items())]
    counts = cascade_counts([len(group) for group in groups], percent)
    generator = np.random.RandomState(_SEED)
    names: list[str] = []
    for group, count in zip(groups, counts, strict=True):
        names += [group[place].key for place in generator.choice(len(group), count, replace=False)]
    return names


def digest_of(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def read_list(path: Path, kind: ListKind) -> list[str]:
    """The names of a list: one of `make_split.py --percent`, or SimCLR's plain file (`n01440764_10074.JPEG` a line)."""
    lines = read_text(path, "image list", "write it, or correct the path").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    ours = bool(lines) and lines[0].startswith(LIST_MARK)
    if ours != (kind == "cascade"):
        told = f"of kind {'cascade' if ours else 'simclr'}, not {kind}; the two are never mixed"
        raise UserError(f"image list {path} is {told}")
    if ours and lines[1:2] != [f"# sha256 {digest_of(names)}"]:
        raise UserError(f"{path} was changed after it was written (its digest differs); write it again")
    if not names or len(set(names)) < len(names):
        told = "names an image twice" if names else "names no image"
        raise UserError(f"image list {path} {told}; write it again")
    return names


def pick_listed(items: Sequence[Item], names: Sequence[str], kind: ListKind) -> list[Item]:
    """The items that a list names, in its order."""
    by_name = {item.key.rpartition("/")[2] if kind == "simclr" else item.key: item for item in items}
    if missing := [name for name in names if name not in by_name]:
        raise UserError(
            f"{len(missing)} of {len(names)} listed images are not in the training split, first {missing[0]}; "
            "use the list of this data set, or complete the images"
        )
    return [by_name[name] for name in names]
