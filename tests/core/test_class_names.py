"""Class names and templates, built in and from files; names that are one class."""

from __future__ import annotations

import pytest
from open_clip import OPENAI_IMAGENET_TEMPLATES

from vlmkd.class_names import check_class_names, fill, read_class_names, read_templates
from vlmkd.errors import UserError


def test_built_in_lists_equal_open_clip():
    names = read_class_names("imagenet")
    assert len(names) == 1000 and names[0] == "tench"
    templates = read_templates("openai")
    assert [fill(text, "hot dog") for text in templates] == [
        make("hot dog") for make in OPENAI_IMAGENET_TEMPLATES
    ]
    assert len(templates) == 80 and len(read_templates("simple")) == 7


def test_files_and_both_places_for_the_class(tmp_path):
    (tmp_path / "names.txt").write_text("red fox\n\n café \n")
    (tmp_path / "templates.txt").write_text("a photo of {c}.\nart: {}, the {c}\n")
    assert read_class_names(str(tmp_path / "names.txt")) == ["red fox", "café"]
    templates = read_templates(str(tmp_path / "templates.txt"))
    assert [fill(text, "a {c}at{}") for text in templates] == [
        "a photo of a {c}at{}.",
        "art: a {c}at{}, the a {c}at{}",
    ]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_class_names, None, "does not exist; name `imagenet` or"),
        (read_class_names, "\n", "the file is empty"),
        (read_templates, "a {}\na photo\n", "'a photo' has no {} or {c}"),
        (read_templates, None, "does not exist; name `openai` or `simple`"),
    ],
)
def test_mistakes_are_named(read, content, message, tmp_path):
    if content is not None:
        (tmp_path / "f.txt").write_text(content)
    with pytest.raises(UserError, match=message.replace("{", "\\{").replace("}", "\\}")):
        read(str(tmp_path / "f.txt"))


def test_colliding_class_names():
    with pytest.raises(UserError, match=r"classes 0 \('Hot dog'\) and 2 \('hot__dog '\)"):
        check_class_names(["Hot dog", "cat", "hot__dog "])
    with pytest.raises(UserError, match="class 1 has the name"):
        check_class_names(["a", "_ "])
    with pytest.raises(UserError, match="same prompt"):
        check_class_names(read_class_names("imagenet"))
    check_class_names(read_class_names("imagenet"), allow_duplicates=True)
