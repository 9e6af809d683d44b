"""Questions about pictures on the page: who said what, marked by the rule that scores it, for several runs together."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chat_parts import picture
from tests.core.test_report import Page, write_run
from vlmkd.chat_config import QuestionsConfig
from vlmkd.chat_runs import questions
from vlmkd.data.chats import ATTRIBUTIONS
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import SHOWN, Answers
from vlmkd.evaluation.base import Context, OfQuestions
from vlmkd.page.gallery import write_pictures
from vlmkd.page.report import build_report
from vlmkd.results import details_of

ASKED = [
    ("exists", "Is there a <cat>?", "Yes."),
    ("count", "How many?", "Two."),
    ("caption", "What is in the picture?", "A cat and a ring."),
]
TEACHER = ["Yes.", "Two.", "A cat and a ring."]


class Parrot:
    """Says what it was given, by question."""

    def __init__(self, said: Sequence[str]) -> None:
        self.said = {question: text for (_, question, _), text in zip(ASKED, said, strict=True)}

    def answer(self, asked: Sequence[Any], **options: Any) -> list[str]:
        return [self.said[text.partition("\n")[2]] for _, _, text in asked]


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    (tmp_path / "a.png").write_bytes(picture(1))
    records: list[dict[str, Any]] = []
    for kind, question, truth in ASKED:
        talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": truth}]
        records.append({"id": kind, "image": "a.png", "conversations": talk, "kind": kind})
    records[2]["things"] = ["cat", "ring"]
    (tmp_path / "scenes.json").write_text(json.dumps(records))
    (tmp_path / "names.json").write_text('["cat", "ring", "bus"]')
    (tmp_path / ATTRIBUTIONS).write_text('["Pictures by A & B"]')
    found = questions(
        QuestionsConfig(data=str(tmp_path / "scenes.json"), vocabulary=str(tmp_path / "names.json"))
    )
    assert isinstance(found, OfQuestions)
    return found


def chatted(folder: Path, answers: Answers, **models: list[str]) -> Path:
    """A run folder with what each model said."""
    results = {name: answers.run(Parrot(said), Context(progress=False)) for name, said in models.items()}  # type: ignore[arg-type]
    write_run(folder, {"top1": 0.5})
    (folder / "eval/details.json").write_text(json.dumps(details_of(results)))
    write_pictures(folder / "eval/pictures.json", {answers.dataset: answers.pictures()}, answers.attributions)
    return folder


def cards(text: str) -> dict[str, str]:
    """Kind of question -> its card without its pictures."""
    found = re.findall(r'<figure class="card chat">(.*?)</figure>', text, flags=re.S)
    return {next(kind for kind, asked, _ in ASKED if asked[:6] in card): card for card in found}


def test_wrong_answers_and_names_are_marked(answers: Answers, tmp_path: Path) -> None:
    said = ["It is not there.", "Two", "A Bus and two cats."]
    runs = [
        chatted(tmp_path / "sft", answers, student=TEACHER, teacher=TEACHER),
        chatted(tmp_path / "prefer", answers, student=said, teacher=TEACHER),
    ]
    text = build_report(runs, tmp_path / "page.html", title="Chats").read_text()
    found = cards(text)
    assert found.keys() == {"exists", "count", "caption"} and "Pictures by A &amp; B" in text
    page = Page(text)
    assert page.loads and all(load.startswith(("data:image/jpeg;base64,", "#")) for load in page.loads)
    marks = {kind: re.findall(r'<dd class="(right|wrong)">', card) for kind, card in found.items()}
    assert marks["exists"] == marks["caption"] == ["right", "right", "wrong"]
    assert marks["count"] == ["right"] * 3
    for card in found.values():  # the teacher once, then the runs in their order
        labels = [re.sub("<.*?>", "", label) for label in re.findall("<dt>(.*?)</dt>", card)]
        assert labels == ["truth", "teacher teacher", "sft", "prefer"]
    assert "Is there a &lt;cat&gt;?" in found["exists"] and "It is not there." in found["exists"]
    assert "A <mark>Bus</mark> and two cats. <small>missing: ring</small>" in found["caption"]


def test_teachers_that_differ_stand_apart(answers: Answers, tmp_path: Path) -> None:
    other = ["No.", *TEACHER[1:]]
    runs = [
        chatted(tmp_path / "one", answers, student=TEACHER, teacher=TEACHER),
        chatted(tmp_path / "two", answers, student=TEACHER, teacher=other),
    ]
    (runs[1] / "eval/models.json").write_text('{"exported": "mean", "selections": ["mean"]}')  # another's
    card = cards(build_report(runs, tmp_path / "page.html", title="Chats").read_text())["exists"]
    labels = [re.sub("<.*?>", "", label) for label in re.findall("<dt>(.*?)</dt>", card)]
    assert labels == ["truth", "teacher teacher", "teacher (two) teacher", "one"]


def test_shown_questions_are_bounded_and_of_every_kind(answers: Answers, tmp_path: Path) -> None:
    items = []
    for number in range(400):
        one = answers.questions[number % 3].item
        items.append(type(one)(f"{one.key}{number}", one.record, one.folder))
    shown = Answers(items, "many").pictures()
    assert len(shown) == SHOWN
    kinds = [next(kind for kind, _, _ in ASKED if key.startswith(kind)) for key in shown]
    assert sorted(kinds[:3]) == sorted(kind for kind, _, _ in ASKED) and kinds.count("count") == SHOWN // 3
    write_pictures(tmp_path / "pictures.json", {"many": shown}, [])
    assert (tmp_path / "pictures.json").stat().st_size < SHOWN * 20_000
    assert list(json.loads((tmp_path / "pictures.json").read_text())["pictures"]["many"]) == list(shown)


def test_a_picture_from_outside_is_refused(answers: Answers, tmp_path: Path) -> None:
    run = chatted(tmp_path / "run", answers, student=TEACHER)
    path = run / "eval/pictures.json"
    content = json.loads(path.read_text())
    content["pictures"]["scenes"]["count"] = ["https://example.org/x.png"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a data:image/ URI"):
        build_report([run], tmp_path / "page.html", title="Chats")
