"""Class names and prompt templates by name or from a file."""

from __future__ import annotations

from vlmkd.errors import UserError
from vlmkd.files import read_text


def class_names(source: str) -> list[str]:
    """`imagenet` (the 1,000 names that OpenAI curated, from open_clip), or a text file with one class a line.

    Raises:
        UserError: no such file, or one without classes or with one twice.
    """
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    names = _lines(source, "class names", "`imagenet` or a text file with one a line")
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise UserError(f"class names {source}: {twice!r} comes twice; give each class a name of its own")
    return names


def class_lines(source: str) -> list[tuple[str, str]]:
    """(folder, name) of each line of a text file: `FOLDER<tab>NAME`, or one word for both.

    Raises:
        UserError: no such file, an empty one, or a line with more than one tab.
    """
    pairs = []
    for line in _lines(source, "class names", "a text file with NAME or FOLDER<tab>NAME a line"):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) > 2 or not all(parts):
            raise UserError(
                f"class names {source}: {line!r} is not NAME or FOLDER<tab>NAME; write one class a line"
            )
        pairs.append((parts[0], parts[-1]))
    return pairs


def prompt_templates(source: str) -> list[str]:
    """`openai` (80 templates), `simple` (7), or a text file with one template a line; `{}` or `{c}` is the class.

    Raises:
        UserError: no such file, an empty one, or a line without a place for the class.
    """
    if source in ("openai", "simple"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        functions = OPENAI_IMAGENET_TEMPLATES if source == "openai" else SIMPLE_IMAGENET_TEMPLATES
        return [function("{}") for function in functions]
    templates = _lines(source, "templates", "`openai` or `simple`, or a text file with one a line")
    for template in templates:
        if "{}" not in template and "{c}" not in template:
            raise UserError(f"templates {source}: {template!r} has no {{}} or {{c}} for the class name")
    return templates


def fill_template(template: str, name: str) -> str:
    """`template` with `name` in place of `{}` or `{c}`."""
    return template.replace("{c}", name).replace("{}", name)


def _lines(source: str, what: str, mend: str) -> list[str]:
    lines = [line.strip() for line in read_text(source, what, f"name {mend}").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{what} {source}: the file is empty")
    return lines
