"""Which scenes a run may learn from: official splits, label fractions, and lists of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from vlmkd.errors import UserError, did_you_mean
from vlmkd.files import read_text, read_yaml

FRACTIONS = (5, 10, 20, 50, 100)
"""In per cent. 5 lies within 10 within 20, and 10 within 50; 20 does not lie within 50."""


@cache
def nuscenes_scenes(split: str) -> tuple[str, ...]:
    """Names of the scenes of `train`, `val`, `test`, `mini_train` or `mini_val`, in the official order."""
    splits = read_yaml(Path(__file__).with_name("readers") / "nuscenes_splits.yaml", "list of splits")
    if split not in splits:
        raise UserError(f"nuScenes has no split {split!r}; {did_you_mean(split, splits, ', '.join(splits))}")
    numbers: list[int] = []
    for part in str(splits[split]).split():
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(f"scene-{number:04d}" for number in numbers)


def fraction(scenes: Sequence[str], percent: int) -> tuple[str, ...]:
    """Every k-th scene, k = round(100 / percent): whole drives, because frames of one drive share their objects."""
    if percent not in FRACTIONS:
        known = ", ".join(map(str, FRACTIONS))
        raise UserError(f"config field data.fraction is {percent}; it is one of {known}")
    return tuple(scenes[:: round(100 / percent)])


def read_scenes(path: Path) -> tuple[str, ...]:
    """A list of one's own, a scene a line; lines that begin with # are comments."""
    field = "config field data.split_file:"
    lines = [line.strip() for line in read_text(path, field).splitlines()]
    scenes = [line for line in lines if line and line[0] != "#"]
    if not scenes or len(set(scenes)) < len(scenes):
        raise UserError(f"{field} {path} {'names a scene twice' if scenes else 'lists no scene'}")
    return tuple(scenes)


def digest(scenes: Sequence[str]) -> str:
    """Eight digits that name a list of scenes, for run names and for what was built from these scenes alone."""
    return hashlib.sha256("\n".join(scenes).encode()).hexdigest()[:8]
