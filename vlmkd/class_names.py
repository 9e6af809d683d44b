"""Class names: how prompts spell them, and which of them are the same class."""

from __future__ import annotations

from collections.abc import Sequence

from vlmkd.errors import UserError


def prompt_name(class_name: str) -> str:
    """A class name as prompts have it: underscores and runs of white space are one space."""
    return " ".join(class_name.replace("_", " ").split())


def class_key(class_name: str) -> str:
    """Equal for names that are the same class: underscores, white space and case do not count."""
    return prompt_name(class_name).casefold()


def check_class_names(class_names: Sequence[str], *, allow_duplicates: bool = False) -> None:
    """Refuse an empty list, an empty name, and classes whose prompts are equal but for case.

    `allow_duplicates` is for ImageNet, whose published names have `missile` and `sunglasses` twice.

    Raises:
        UserError: names the classes.
    """
    if not class_names:
        raise UserError("the list of class names is empty; name at least one class")
    first: dict[str, int] = {}
    for index, name in enumerate(class_names):
        key = class_key(name)
        if not key:
            raise UserError(f"class {index} has the name {name!r}; give it a word")
        if key in first and not allow_duplicates:
            other = first[key]
            raise UserError(
                f"classes {other} ({class_names[other]!r}) and {index} ({name!r}) have the same prompt; rename one"
            )
        first.setdefault(key, index)
