"""Whether the data sets and zoo models that a config names are known."""

from __future__ import annotations

from typing import Any

from vlmkd import zoo
from vlmkd.datasets import emoji, labelled_sets
from vlmkd.errors import UserError


def check_names(config: dict[str, Any]) -> None:
    """Refuse names in a config's plain tree that its run would refuse.

    `set` is a labelled data set; `zoo:` and `emoji:` begin names wherever they stand. Not files, which an earlier run may
    have to write first, and not architectures, whose libraries a dry run does not import.
    """
    for field, value in leaves(config, elements=True).items():
        try:
            if value and field.rpartition(".")[2] == "set":
                labelled_sets.require_known(value)
            elif str(value).startswith("zoo:"):
                zoo.entry(value)
            elif str(value).startswith("emoji:"):
                emoji.split_of(value)
        except UserError as error:
            raise UserError(f"config field {field}: {error}") from None


def leaves(tree: Any, path: str = "", *, elements: bool = False) -> dict[str, Any]:
    """Values of a config's plain tree by their names with dots; `elements`: of lists each one."""
    inner = dict(enumerate(tree)) if elements and isinstance(tree, list | tuple) else tree
    if not isinstance(inner, dict) or not inner:
        return {path: tree}
    parts = (leaves(part, f"{path}.{key}".lstrip("."), elements=elements) for key, part in inner.items())
    return {name: value for part in parts for name, value in part.items()}
