"""Labelled image sets: a finite list of images with labels, whatever it was read from (`vlmkd.datasets`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vlmkd.data.images import ImageRef
from vlmkd.errors import UserError

UNLABELLED = -1
"""Label of an image whose class is not given to the method."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a labelled set."""

    key: str
    """Name inside the data set, by which views are drawn and outputs stored: relative path or shard key."""
    image: ImageRef
    label: int
    """Index into the set's class names, or UNLABELLED."""
    domain: int = 0
    """Index into the set's domains."""

    def unlabelled(self) -> Item:
        return replace(self, label=UNLABELLED)

    def read(self) -> bytes:
        """The encoded image."""
        try:
            return self.image.read()
        except OSError as error:
            raise UserError(
                f"image {self.image} of {self.key} cannot be read ({error.strerror}); mend the data set's folder"
            ) from None

    def members(self) -> dict[str, bytes]:
        return {"image": self.read()}


@dataclass(frozen=True)
class LabelledSet:
    """A data set for classification, with its fixed splits."""

    name: str
    class_names: list[str]
    """As prompts use them (no underscores)."""
    templates: list[str]
    """Prompts with `{}` or `{c}` for the class name; the first is the training prompt."""
    splits: dict[str, list[Item]]
    """`train`, `val`, `test` as far as the set has them."""
    domains: list[str] = field(default_factory=list)
    """Names of the domains; empty when the set has one."""


def by_class(items: Sequence[Item]) -> dict[int, list[Item]]:
    """Items of each label, in the order of first appearance."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups
