"""Results are data: one line a number in `results.jsonl`, from runs and from every evaluation command alike.

Tables (`scripts/table.py`) and the page read them. What is too long for a line (confusion, mistakes) lies beside as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from vlmkd.errors import UserError
from vlmkd.files import read_text, write_json, write_text

if TYPE_CHECKING:
    from vlmkd.evaluation.base import Result

FILE = "results.jsonl"
STUDENT, TEACHER = "student", "teacher "
"""The trained model's name in a run, and how the names of its teachers begin."""
PARAMETERS = "parameters"
"""Metric of no data set: the size of a model, in millions."""
Tags = dict[str, str | int | float]


@dataclass(frozen=True)
class Meaning:
    """What a metric is, told where it is computed."""

    label: str = ""
    """How tables call it; empty: its name, with spaces."""
    unit: str = ""
    """`share` (0 to 1, shown in per cent), `count`, `nats`, `ms`, `M`, ...; empty: a bare number."""
    higher_is_better: bool | None = None
    """None: nothing is won by more or less of it."""
    main: bool = False
    """Charts and the page's first sentence show it."""


def share(label: str = "", *, main: bool = False) -> Meaning:
    return Meaning(label, "share", higher_is_better=True, main=main)


UNREADABLE = Meaning(unit="count", higher_is_better=False)


@dataclass(frozen=True, kw_only=True)
class Number:
    """A line of results.jsonl. Label, unit and so on are those of its `Meaning`."""

    run: str
    """The run folder, or what an evaluation command evaluated."""
    model: str
    """`student`, other weights of it by name, `teacher NAME`; or the model of a command."""
    metric: str
    value: float
    tags: Tags = field(default_factory=dict)
    """What tables pivot by: seed, method, held-out domain, ..."""
    evaluator: str = ""
    dataset: str = ""
    """Empty for what needs no data."""
    label: str = ""
    unit: str = ""
    higher_is_better: bool | None = None
    main: bool = False
    fitted: bool = False
    """It was fitted on the data set and scores nothing."""
    count: int = 0
    """Of images, texts, ..."""
    step: int = 0
    """Optimiser steps before the evaluation."""

    @property
    def key(self) -> tuple[str, str]:
        return self.dataset, self.metric

    def shown(self, digits: int | None = None) -> str:
        return show(self.value, self.unit, digits)


_KINDS: dict[str, Any] = get_type_hints(Number) | {"value": (int, float), "tags": dict}


def numbers_of(
    results: Iterable[Result], *, run: str, model: str, tags: Mapping[str, Any] | None = None, step: int = 0
) -> list[Number]:
    """Metrics, then what was fitted, of one model; a value that is not finite is left out."""
    found = []
    for result in results:
        for fitted, values in ((False, result.metrics), (True, result.chosen)):
            for name, value in values.items():
                meaning = asdict(result.meanings.get(name, Meaning()))
                meaning["label"] = meaning["label"] or name.replace("_", " ")
                number = Number(
                    run=run, model=model, tags=dict(tags or {}), evaluator=result.name, dataset=result.dataset,
                    metric=name, value=float(value), fitted=fitted, count=result.count, step=step, **meaning,
                )  # fmt: skip
                found += [number] * math.isfinite(number.value)
    return found


def parameters(count: int, *, run: str, model: str, tags: Mapping[str, Any] | None = None) -> Number:
    return Number(
        run=run, model=model, tags=dict(tags or {}), metric=PARAMETERS, value=count / 1e6, label=PARAMETERS, unit="M",
        higher_is_better=False,
    )  # fmt: skip


def details_of(results: Mapping[str, Iterable[Result]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> data set -> what is too long for a line."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model, own in results.items():
        for result in own:
            found.setdefault(model, {}).setdefault(result.dataset, {}).update(result.details)
    return found


def lines(numbers: Iterable[Number]) -> str:
    return "".join(json.dumps(asdict(number), ensure_ascii=False) + "\n" for number in numbers)


def write_results(
    path: Path, numbers: Iterable[Number], details: Any = None, what: str = "results file"
) -> None:
    """With `details` beside them (`NAME.details.json`)."""
    write_text(path, lines(numbers), what)
    if details is not None:
        write_json(path.with_suffix(".details.json"), details, what)


def json_lines(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line; a last one that a kill has torn off is left out."""
    text = read_text(path, what).rstrip("\n").split("\n")  # a text in JSON may hold other ends of lines
    for number, line in enumerate(text, start=1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            yield number, content
        elif number < len(text):
            raise UserError(f"{path} line {number} is not valid JSON; remove that line")


def read_results(path: Path) -> list[Number]:
    """The lines of a results file, as `json_lines`; a run of an earlier version is refused."""
    if not path.is_file() and (path.parent / "eval" / "results.json").is_file():
        raise UserError(f"{path.parent} is of an earlier version; read it with that one, or run it again")
    found = []
    for line, content in json_lines(path, "results file"):
        try:
            number = Number(**content)
            fits = all(isinstance(getattr(number, name), kind) for name, kind in _KINDS.items())
            fits = fits and all(isinstance(value, (str, int, float)) for value in number.tags.values())
            fits = fits and math.isfinite(number.value)
        except (TypeError, OverflowError):
            fits = False
        if not fits:
            raise UserError(f"{path} line {line} is no result of this version; remove it")
        found.append(number)
    return found


def latest(numbers: Iterable[Number]) -> list[Number]:
    """Those of each model's last step, or without data; of one written twice the second."""
    numbers = list(numbers)
    last = {one.model: one.step for one in sorted(numbers, key=lambda one: one.step)}
    found = {
        (one.model, one.key, *sorted(one.tags.items())): one
        for one in numbers
        if one.step == last[one.model] or not one.dataset
    }
    return list(found.values())


def last_of(numbers: Iterable[Number]) -> dict[str, dict[tuple[str, str], Number]]:
    """Model -> (data set, metric) -> its latest number."""
    found: dict[str, dict[tuple[str, str], Number]] = {}
    for one in latest(numbers):
        found.setdefault(one.model, {})[one.key] = one
    return found


def show(value: float, unit: str, digits: int | None = None) -> str:
    """Shares in per cent with one decimal, counts whole, others with four digits; or `digits` decimals."""
    digits = {"share": 1, "count": 0, "M": 2}.get(unit) if digits is None else digits
    value = 100 * value if unit == "share" else value
    return short(value) if digits is None else f"{value:.{digits}f}"


def short(value: float) -> str:
    """A value of no known unit, in a few digits."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4g}"


def title_of(number: Number) -> str:
    """With its unit where the numbers do not show it."""
    return number.label + (f" ({number.unit})" if number.unit not in ("", "share", "count", "nats") else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text, the others numbers."""
    written = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    ruler = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join([written[0], ruler, *written[1:]]) + "\n"
