"""Class names and prompts: lists by name or from a file, how prompts spell a name, and which names are one class."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from vlmkd.errors import UserError
from vlmkd.files import read_text


def prompt_name(class_name: str) -> str:
    """Underscores and runs of white space are one space."""
    return " ".join(class_name.replace("_", " ").split())


def class_key(class_name: str) -> str:
    """Equal for names of the same class: `prompt_name` without case."""
    return prompt_name(class_name).casefold()


def check_class_names(class_names: Sequence[str], *, allow_duplicates: bool = False) -> None:
    """Refuse no names, an empty one, and, but in ImageNet (`missile` is there twice), two with one `class_key`."""
    if not class_names:
        raise UserError("the list of class names is empty; name at least one class")
    first: dict[str, int] = {}
    for index, name in enumerate(class_names):
        if not class_key(name):
            raise UserError(f"class {index} has the name {name!r}; give it a word")
        other = first.setdefault(class_key(name), index)
        if other != index and not allow_duplicates:
            pair = f"{other} ({class_names[other]!r}) and {index} ({name!r})"
            raise UserError(f"classes {pair} have the same prompt; rename one")


def require_same_classes(found: Sequence[str], wanted: Sequence[str], what: str) -> None:
    """Refuse lists that differ in a name, the order or the number; `what` has the classes `found`."""
    hint = "use the class list it was made with"
    if len(found) != len(wanted):
        raise UserError(f"{what} has {len(found)} classes, but {len(wanted)} are asked for; {hint}")
    for index, (name, other) in enumerate(zip(found, wanted, strict=True)):
        if class_key(name) != class_key(other):
            raise UserError(f"{what}: class {index} is {name!r}, but {other!r} is asked for; {hint}")


@functools.lru_cache(maxsize=1)
def imagenet_names() -> dict[str, str]:
    """The name that OpenAI chose for each of ImageNet's 1,000 wnids, in wnid order (open_clip's list)."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnids = map(info.index_to_label_name, range(info.num_classes()))
    return dict(zip(wnids, IMAGENET_CLASSNAMES, strict=True))


def read_class_names(source: str) -> list[str]:
    """`imagenet` (OpenAI's 1,000 names), or a text file with one class a line."""
    if source == "imagenet":
        return list(imagenet_names().values())
    return read_lines(source, "class names", "name `imagenet` or a text file with one a line")


def read_folder_names(source: str) -> list[tuple[str, str]]:
    """(folder, name) of each line of a text file: `FOLDER<tab>NAME`, or one word for both."""
    pairs = []
    for line in read_lines(source, "class names", "name a text file with NAME or FOLDER<tab>NAME a line"):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) > 2 or not all(parts):
            raise UserError(f"class names {source}: {line!r} is not NAME or FOLDER<tab>NAME; write that")
        pairs.append((parts[0], parts[-1]))
    return pairs


def read_templates(source: str) -> list[str]:
    """`openai` (80 prompts), `simple` (the 7 of OpenAI's notebook), or a text file with one a line."""
    if source in ("openai", "simple"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        prompts = OPENAI_IMAGENET_TEMPLATES if source == "openai" else SIMPLE_IMAGENET_TEMPLATES
        return [prompt("{}") for prompt in prompts]
    templates = read_lines(source, "templates", "name `openai` or `simple`, or a text file with one a line")
    check_templates(templates, f"templates {source}: ")
    return templates


def check_templates(templates: Sequence[str], where: str = "prompt template ") -> None:
    """Refuse an empty list, and a template without a place for the class name."""
    if not templates:
        raise UserError("the list of prompt templates is empty; give at least `a photo of a {}.`")
    for template in templates:
        if "{}" not in template and "{c}" not in template:
            raise UserError(f"{where}{template!r} has no {{}} or {{c}} for the class name; add it")


def fill(template: str, class_name: str) -> str:
    """The prompt of a class, whose name may hold braces."""
    return class_name.join(template.replace("{c}", "{}").split("{}"))


def read_lines(path: str | Path, what: str, hint: str = "") -> list[str]:
    """Lines of a text file without the empty ones."""
    lines = [line.strip() for line in read_text(path, what, hint).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{what} {path}: the file is empty; write one entry a line")
    return lines
