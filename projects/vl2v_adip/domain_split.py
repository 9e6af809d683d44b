"""DomainBed's 80/20 split of each domain, bit for bit, with a generator of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmkd.data.labelled import Item

_HOLDOUT_SHARE = 0.2  # of each domain, for model selection


@dataclass(frozen=True)
class DomainSplit:
    """One domain in two parts, named as in DomainBed's tables."""

    inside: list[Item]
    """80 %: training of a source domain, and what is reported of the held-out one."""
    out: list[Item]
    """20 %: model selection."""


def domain_seed(trial_seed: int, domain: int) -> int:
    """DomainBed's seed for the split of domain number `domain`."""
    text = str((trial_seed, domain)).encode("ascii")
    return int(hashlib.md5(text, usedforsecurity=False).hexdigest(), 16) % 2**31


def holdout_positions(count: int, domain: int, trial_seed: int) -> tuple[list[int], list[int]]:
    """Positions (in, out) of `count` images of a domain: shuffled once, the first fifth is out (VL2V-ADiP e)."""
    positions = list(range(count))
    np.random.RandomState(domain_seed(trial_seed, domain)).shuffle(positions)
    held_out = int(count * _HOLDOUT_SHARE)
    return positions[held_out:], positions[:held_out]


def split_domains(items: Sequence[Item], trial_seed: int) -> dict[int, DomainSplit]:
    """DomainBed's 80/20 split of every domain, by domain index; another order of the items gives another split."""
    splits = {}
    for domain in sorted({item.domain for item in items}):
        images = [item for item in items if item.domain == domain]
        parts = holdout_positions(len(images), domain, trial_seed)
        splits[domain] = DomainSplit(*([images[position] for position in part] for part in parts))
    return splits
