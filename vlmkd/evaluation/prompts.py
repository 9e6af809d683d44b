"""Class names and prompt templates: open_clip's lists, a data set's own files, or the user's."""

from __future__ import annotations

from pathlib import Path

from vlmkd.errors import UserError
from vlmkd.files import read_text

TEMPLATE_FILES = ("templates.txt", "zeroshot_classification_templates.txt")
"""Names of the template file beside shards; the second is CLIP-benchmark's."""
DEFAULT_TEMPLATES = "openai"


def imagenet_class_names() -> list[str]:
    """The 1,000 names in wnid order that OpenAI chose for zero-shot ImageNet."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def imagenet_wnids() -> list[str]:
    """The 1,000 wnids of ImageNet-1K, sorted."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_label_name(index) for index in range(info.num_classes())]


def read_lines(path: Path, what: str) -> list[str]:
    """Lines of a text file without the empty ones.

    Raises:
        UserError: no such file, not UTF-8, or nothing in it.
    """
    lines = [line.strip() for line in read_text(path, f"{what} file").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{what} file {path} is empty; write one entry per line")
    return lines


def class_names(source: str) -> list[str]:
    """`imagenet`, or a text file with one class per line."""
    return imagenet_class_names() if source == "imagenet" else read_lines(Path(source), "class name")


def templates(source: str) -> list[str]:
    """`openai` (80 prompts), `simple` (7), or a text file, one template per line with `{}` or `{c}` for the class.

    Raises:
        UserError: no such file, or a line without a place for the class.
    """
    if source in ("openai", "simple"):
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        chosen = OPENAI_IMAGENET_TEMPLATES if source == "openai" else SIMPLE_IMAGENET_TEMPLATES
        return [template("{}") for template in chosen]
    lines = read_lines(Path(source), "template (neither `openai` nor `simple`)")
    for line in lines:
        if "{}" not in line and "{c}" not in line:
            raise UserError(
                f"template file {source}: {line!r} has no {{}} or {{c}} for the class name; add it"
            )
    return lines


def fill(template: str, class_name: str) -> str:
    """The prompt of one class; braces in the class name stay as they are."""
    return class_name.join(template.replace("{c}", "{}").split("{}"))
