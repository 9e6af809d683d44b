"""Whether the data sets and zoo models that a config names are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmkd import zoo
from vlmkd.datasets import emoji, labelled_sets
from vlmkd.errors import UserError


def check_names(config: Mapping[str, Any]) -> None:
    """Refuse names in a config's plain tree that its run would refuse.

    `set` is a labelled data set; `zoo:` and `emoji:` begin names wherever they stand. Not files, which an earlier run may
    have to write first, and not architectures, whose libraries a dry run does not import.
    """
    for field, key, value in _fields(config, ""):
        try:
            if key == "set" and value:
                labelled_sets.require_known(value)
            elif str(value).startswith("zoo:"):
                zoo.entry(value)
            elif str(value).startswith("emoji:"):
                emoji.split_of(value)
        except UserError as error:
            raise UserError(f"config field {field}: {error}") from None


def _fields(node: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Of every leaf: its name with dots, its key and its value."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node)
    for key, value in pairs:
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping | list | tuple):
            yield from _fields(value, name)
        else:
            yield name, key, value
