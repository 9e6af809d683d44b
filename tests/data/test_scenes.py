"""Composed scenes: what is asked does not depend on how many things there are, and every record is true."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from data_tools import build_scenes
from vlmkd.errors import UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("scenes")
    assert build_scenes.main([str(folder), "--concepts", "20", "--scenes", "80", "--test-scenes", "64"]) == 0
    return {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*.json")}


def test_a_folder_goes_on_with_its_own_concepts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other concepts make other scenes, whose pictures would not be drawn where there are some."""
    call = [str(tmp_path), "--scenes", "2", "--test-scenes", "8", "--concepts"]
    assert build_scenes.main([*call, "20"]) == 0
    first = (tmp_path / "train.json").read_text()
    with pytest.raises(
        UserError, match="has pictures of other concepts; give its own --concepts, or another"
    ):
        build_scenes.main([*call, "21"])
    (tmp_path / "train" / "000001.jpg").unlink()
    assert build_scenes.main([*call, "20"]) == 0
    assert (tmp_path / "train" / "000001.jpg").is_file() and (tmp_path / "train.json").read_text() == first
    (tmp_path / "new").mkdir()
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(build_scenes.World, "scene", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build_scenes.main([str(tmp_path / "new"), *call[1:], "21"])
    with pytest.raises(UserError, match="has pictures of other concepts"):
        build_scenes.main([str(tmp_path / "new"), *call[1:], "20"])


def test_any_kind_is_asked_about_any_number_of_things(scenes) -> None:
    found = Counter((record["kind"], len(record["things"])) for record in scenes["test"])
    kinds = ("count", "category", "where", "relation")
    expected = {(kind, number) for kind in kinds for number in range(1, 5)} - {("relation", 1)}
    assert set(found) == expected
    assert {record["conversations"][1]["value"] for record in scenes["test"] if record["kind"] == "count"} == {
        "One.", "Two.", "Three.", "Four.",
    }  # fmt: skip


def test_a_conversation_may_begin_with_any_question_and_names_the_image_there(scenes) -> None:
    firsts = Counter(record["conversations"][0]["value"].split()[1] for record in scenes["train"])
    assert set(firsts) == {"What", "Is", "How", "Which", "Where"}
    for record in scenes["train"]:
        said = [turn["value"] for turn in record["conversations"]]
        assert said[0].startswith("<image>\n") and not any("<image>" in text for text in said[1:])


def test_as_much_is_asked_about_what_is_there_as_about_what_is_not(scenes) -> None:
    answers = Counter()
    for record in scenes["exists"]:
        said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            there = any(f" {name} in the picture?" in question for name in record["things"])
            assert question.startswith("Is there a") and there == (answer == "Yes."), question
            answers[answer] += 1
    assert sum(answers.values()) / 2 * 0.9 < answers["Yes."] <= sum(answers.values()) * 0.6


def test_no_answer_is_given_away_by_what_was_said_before(scenes) -> None:
    order = ["Is there", "How many", "Where", "Is the", "Which", "What is"]
    for record in scenes["train"]:
        said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        kinds = [
            next(place for place, start in enumerate(order) if question.startswith(f"{start} "))
            for question in said[::2]
        ]
        assert kinds == sorted(kinds), said
        asked = [question for question, kind in zip(said[::2], kinds, strict=True) if kind == 0]
        assert len(set(asked)) == len(asked)
        for question, answer in zip(said[::2], said[1::2], strict=True):
            if question in asked:
                there = any(f" {name} in the" in question for name in record["things"])
                assert there == (answer == "Yes."), question


def test_what_is_where_agrees_with_the_captions_and_with_where_each_thing_is(scenes) -> None:
    wheres = 0
    for record, captions, talk in zip(scenes["places"], scenes["names"], scenes["train"], strict=True):
        placed = record["conversations"][1]["value"].lower()
        assert (
            re.sub(r" at the (top|bottom) (left|right)", "", placed)
            == captions["conversations"][1]["value"].lower()
        )
        assert placed.count(" at the ") == len(record["things"])
        said = [turn["value"].removeprefix("<image>\n") for turn in talk["conversations"]]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            if question.startswith("Where is the "):
                name = question.removeprefix("Where is the ").removesuffix("?")
                assert f"{name} {answer.lower().removesuffix('.')}" in placed
                wheres += 1
    assert wheres


def test_captions_name_what_is_there_and_rejected_ones_something_else(scenes) -> None:
    names = scenes["concepts"]
    for captions, pair in zip(scenes["names"], scenes["preferences"], strict=True):
        there = set(captions["things"])
        right, chosen, rejected = (
            talk[1]["value"].lower() for talk in (captions["conversations"], pair["chosen"], pair["rejected"])
        )
        assert right == chosen != rejected
        assert {name for name in names if name in right} >= there
        assert any(name in rejected and name not in right for name in names)


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_half_of_the_questions_whether_something_is_there_are_true(scenes, kind: str) -> None:
    asked = scenes[f"pope_{kind}"]
    for record in asked:
        (question, answer) = (turn["value"] for turn in record["conversations"])
        named = (
            question.removeprefix("<image>\nIs there a")
            .removeprefix("n")
            .strip()
            .removesuffix(" in the picture?")
        )
        assert (named in record["things"]) == (answer == "Yes."), record
    yes = Counter((len(record["things"]), record["conversations"][1]["value"]) for record in asked)
    assert set(yes.values()) == {8}
