"""What models answered to questions about pictures: a run's details beside the pictures that it kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmkd.page.plots import NEUTRAL
from vlmkd.page.runs import DETAILS, Run
from vlmkd.results import STUDENT, TEACHER

Asked = tuple[str, str, str, str]
"""Data set, key, question and truth: runs whose questions agree in all stand side by side."""
Pictures = Mapping[str, Mapping[str, list[str]]]


@dataclass(kw_only=True)
class Speaker:
    label: str
    teacher: bool
    color: int
    answers: dict[Asked, dict[str, Any]]


def speakers(runs: Sequence[Run], pictures: Sequence[Pictures]) -> list[Speaker]:
    """Teachers first, one that says the same in several runs once; then the exported student of every run."""
    teachers: list[Speaker] = []
    students: list[Speaker] = []
    for number, (run, shown) in enumerate(zip(runs, pictures, strict=True)):
        for model, sets in run.json(f"eval/{DETAILS}").items():
            answers = {asked: one for name, own in sets.items() for asked, one in _answers(name, own, shown)}
            if answers and model == run.exported:
                students.append(Speaker(label=run.name, teacher=False, color=number, answers=answers))
            elif answers and model not in (STUDENT, *run.selections):
                _add(teachers, model.removeprefix(TEACHER), answers, run.name)
    return teachers + students


def questions(speakers: Iterable[Speaker]) -> dict[str, dict[Asked, dict[str, Any]]]:
    """Data set -> what was asked, with its images."""
    found: dict[str, dict[Asked, dict[str, Any]]] = {}
    for speaker in speakers:
        for asked, one in speaker.answers.items():
            found.setdefault(asked[0], {}).setdefault(asked, one)
    return found


def _answers(
    dataset: str, details: Mapping[str, Any], pictures: Pictures
) -> Iterable[tuple[Asked, dict[str, Any]]]:
    by_key = {one["key"]: one for one in details.get("answers", ())}
    for key, images in pictures.get(dataset, {}).items():
        if key in by_key:
            one = by_key[key]
            pieces = _pieces(one["said"], one.get("false", ()))
            yield (dataset, key, one["question"], one["truth"]), one | {"images": images, "pieces": pieces}


def _pieces(said: str, false: Iterable[Sequence[int]]) -> list[tuple[str, bool]]:
    """The text in order, with whether each piece names what is not there."""
    pieces, done = [], 0
    for begin, end in false:
        pieces += [(said[done:begin], False), (said[begin:end], True)]
        done = end
    return [*pieces, (said[done:], False)]


def _add(teachers: list[Speaker], name: str, answers: dict[Asked, dict[str, Any]], run: str) -> None:
    named = [one for one in teachers if one.label == name or one.label.startswith(f"{name} (")]
    for one in named:
        if all(one.answers.get(asked, own)["said"] == own["said"] for asked, own in answers.items()):
            one.answers = answers | one.answers
            return
    label = f"{name} ({run})" if named else name
    teachers.append(Speaker(label=label, teacher=True, color=NEUTRAL, answers=answers))
