"""Class names and templates, built in and from files."""

from __future__ import annotations

import pytest
from open_clip import OPENAI_IMAGENET_TEMPLATES

from vlmkd.datasets.text import class_names, fill_template, prompt_templates
from vlmkd.errors import UserError


def test_built_in_lists_equal_open_clip():
    assert len(class_names("imagenet")) == 1000 and class_names("imagenet")[0] == "tench"
    templates = prompt_templates("openai")
    assert [fill_template(text, "dog") for text in templates] == [
        make("dog") for make in OPENAI_IMAGENET_TEMPLATES
    ]
    assert len(templates) == 80 and len(prompt_templates("simple")) == 7


def test_files_and_both_places_for_the_class(tmp_path):
    (tmp_path / "names.txt").write_text("red fox\n\n café \n")
    (tmp_path / "templates.txt").write_text("a photo of {c}.\nart: {}\n")
    assert class_names(str(tmp_path / "names.txt")) == ["red fox", "café"]
    templates = prompt_templates(str(tmp_path / "templates.txt"))
    assert [fill_template(text, "a {c}at") for text in templates] == ["a photo of a {c}at.", "art: a {c}at"]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (class_names, None, "does not exist; name `imagenet` or"),
        (class_names, "a\nb\na\n", "'a' comes twice"),
        (class_names, "\n", "the file is empty"),
        (prompt_templates, "a photo\n", "'a photo' has no {} or {c}"),
        (prompt_templates, None, "does not exist; name `openai` or `simple`"),
    ],
)
def test_mistakes_are_named(read, content, message, tmp_path):
    if content is not None:
        (tmp_path / "f.txt").write_text(content)
    with pytest.raises(UserError, match=message.replace("{", "\\{").replace("}", "\\}")):
        read(str(tmp_path / "f.txt"))
