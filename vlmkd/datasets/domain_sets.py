"""Sets of several domains with the same classes, `<domain>/<class>/*`: DomainBed's five and a user's own.

Splits follow from the order of the images, so that the order is part of the format: domains sorted, classes sorted by
ASCII, paths sorted inside the class (docs/papers/vl2v_adip.md). Every set has the one split `all`;
`splits.split_domains` cuts it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.facts import facts
from vlmkd.datasets.folders import class_folder_names, class_items, data_set_folder
from vlmkd.errors import UserError

log = logging.getLogger(__name__)

ALL = "all"
"""The split that holds every image."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Lower-case endings of files that count, torchvision's list: another one would move the splits."""
TEMPLATES = ["a photo of a {}"]
"""VL2V-ADiP's prompt, without a full stop."""


@dataclass(frozen=True)
class DomainSet:
    """Where a set lies below the data root, and what is known of it."""

    title: str
    folder: str
    domains: tuple[str, ...]
    """In index order."""
    builds: Mapping[str, tuple[int, ...]]
    """Images of each domain, by the name of the build; published numbers belong to one of them."""
    num_classes: int
    licence: str
    source: str
    classes: tuple[str, ...] = ()
    """Class folders in index order; empty where the list is too long to state."""


SETS = facts("domains", DomainSet)


def load(key: str, root: str) -> LabelledSet:
    """One of `SETS`; other image counts than the published ones are logged.

    `root` is the folder that holds the sets' folders, or the set's own.

    Raises:
        UserError: the set is not there, or it has other domains or classes than the published one.
    """
    described = SETS[key]
    source = f"get it with {described.source}"
    folder = data_set_folder(root, [described.folder], described.domains, key, source)
    found = read_domains(folder, name=key)
    own = f"load it as domains:{folder} if it is your own set"
    if found.domains != list(described.domains):
        raise UserError(
            f"{folder} has the domains {', '.join(found.domains)}, but {described.title} has "
            f"{', '.join(described.domains)}: complete it, or move other folders away; {own}"
        )
    classes = [name.replace("_", " ") for name in described.classes]
    if classes and found.class_names != classes:
        other = sorted(set(found.class_names) ^ set(classes))
        raise UserError(
            f"{folder} has not the classes of {described.title}, see {', '.join(other[:3])}; {own}"
        )
    if len(found.class_names) != described.num_classes:
        log.warning(
            "%s has %d classes; %s has %d: numbers do not compare",
            folder, len(found.class_names), described.title, described.num_classes,
        )  # fmt: skip
    if build := build_of(key, found):
        log.info("%s: the build of %s", described.title, build)
    else:
        log.warning(
            "%s has %s images a domain; the published builds are %s: splits and numbers do not compare",
            folder, _counts(found), "; ".join(f"{name} {counts}" for name, counts in described.builds.items()),
        )  # fmt: skip
    return found


def build_of(key: str, labelled: LabelledSet) -> str:
    """Name of the published build that has these image counts (TerraIncognita has two), or an empty string."""
    counts = _counts(labelled)
    return next((name for name, build in SETS[key].builds.items() if build == counts), "")


def _counts(labelled: LabelledSet) -> tuple[int, ...]:
    images = Counter(item.domain for item in labelled.splits[ALL])
    return tuple(images[domain] for domain in range(len(labelled.domains)))


def read_domains(folder: Path, *, name: str) -> LabelledSet:
    """Any tree `<domain>/<class>/*`; class names are the folders' with spaces for underscores.

    Raises:
        UserError: fewer than two domains, domains with different classes, or an empty class.
    """
    domains = class_folder_names(folder)
    if len(domains) < 2:
        raise UserError(
            f"{folder} has {len(domains)} domain folders; it needs two or more, each with one folder per class"
        )
    classes = class_folder_names(folder / domains[0])
    if len(classes) < 2:
        raise UserError(
            f"{folder / domains[0]} holds {len(classes)} class folders; a domain needs at least two"
        )
    items: list[Item] = []
    for index, domain in enumerate(domains):
        place = folder / domain
        if differing := sorted(set(classes) ^ set(class_folder_names(place))):
            raise UserError(
                f"domains {domains[0]} and {domain} of {folder} have different classes, such as {differing[0]!r}; "
                "every domain needs the same class folders"
            )
        items += class_items(place, classes, prefix=f"{domain}/", domain=index, suffixes=SUFFIXES)
    names = [label.replace("_", " ") for label in classes]
    return LabelledSet(name, names, list(TEMPLATES), {ALL: items}, domains)
