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
    """Name inside the data set: relative path or shard key; views and caches are keyed by it."""
    image: ImageRef
    label: int
    """Index into the set's class names, or UNLABELLED."""
    domain: int = 0
    """Index into the set's domains."""

    def unlabelled(self) -> Item:
        """The same image without its label."""
        return replace(self, label=UNLABELLED)

    def read(self) -> bytes:
        """The encoded image; refuses a file that is missing or cannot be read."""
        try:
            return self.image.read()
        except OSError as error:
            raise UserError(
                f"image {self.image} of {self.key} cannot be read ({error.strerror}); mend the data set's folder"
            ) from None

    def members(self) -> dict[str, bytes]:
        """The image as a raw sample has it."""
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
    """Items of each label, labels in the order of first appearance, items in their own order."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def only_classes(items: Sequence[Item], classes: Sequence[int]) -> list[Item]:
    """The items of these classes, relabelled 0, 1, ... in the order of `classes`."""
    position = {label: index for index, label in enumerate(classes)}
    return [replace(item, label=position[item.label]) for item in items if item.label in position]
