"""Results of many runs -> Markdown tables by a specification: pivoted by tags, mean ± standard deviation over the seeds.

A specification (`projects/<paper>/table.yaml`; its fields are those of `Spec`, `Table` and `Pick`) says which numbers
become which rows and columns. Texts in it may name tags in braces: those of the results (`{seed}`, ...), the named
groups of `runs`, and `{run}`, `{model}`, `{teacher}` (a model's name as a teacher), `{dataset}`, `{metric}`, `{label}`.
"""

from __future__ import annotations

import fnmatch
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from vlmkd.errors import UserError
from vlmkd.files import read_object, read_text, read_yaml
from vlmkd.results import (
    FILE,
    PARAMETERS,
    STUDENT,
    TEACHER,
    Number,
    latest,
    markdown,
    mean_and_spread,
    read_results,
    show,
)

T = TypeVar("T")
EXTRAS = ("parameters", "seeds", "steps", "average", "ratio", "passes")


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Which numbers of a run are taken. All other keys of its mapping are tags that they get."""

    model: str = "{exported}"
    """Name, or pattern with `*`; so are `dataset` and `but`. By default the student's exported weights."""
    dataset: str = ""
    """Empty: the first one that has the metric."""
    but: str = ""
    """A data set that is left out."""
    metric: str | list[str] = "*"
    evaluator: str = "*"
    history: str = ""
    """Take the evaluations of all steps, and call their ordinal number, from 1 on, by this tag."""
    log: str = ""
    """Instead of a result: a column of metrics.jsonl, reduced over the log lines."""
    reduce: str = "mean"
    """`mean` or `median`."""
    skip: int = 0
    """Log lines that are left out at the start."""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table; numbers of the same row, column and seed are averaged."""

    scores: list[Pick]
    rows: dict[str, str]
    """Titles of the first columns, and what stands in them."""
    columns: str
    title: str = ""
    """Different titles make different tables."""
    runs: str = ".*"
    """Regular expression of the names of runs (their path in the folder) and result files (without `.jsonl`)."""
    over: str = "seed"
    """Tag over which mean and standard deviation are taken; a run without it counts once."""
    before: list[str] = field(default_factory=list)
    """Of EXTRAS, columns before the numbers ..."""
    after: list[str] = field(default_factory=list)
    """... and after them: `average` over the columns, `ratio` to the last row, `passes` (see `baseline`)."""
    baseline: str = ""
    """The row whose final score in the first column the others are timed against."""
    order: list[str] = field(default_factory=list)
    """Rows (by their first cell) and columns that come first; the others follow as they are found."""
    labels: dict[str, str] = field(default_factory=dict)
    """How rows and columns are called in the table."""
    digits: int | None = None
    missing: str = "not run"
    optional: bool = False
    """Left out where no run has its numbers."""
    complete: bool = False
    """Every row of `order` must be there."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence below the tables, with `{value}`, the mean of its numbers, left out where there are none."""

    text: str
    scores: list[Pick] = field(default_factory=list)
    runs: str = ".*"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A file of tables."""

    tables: list[Table]
    script: str = "the script of the table"
    """What makes the runs, for messages."""
    notes: list[Note] = field(default_factory=list)


class Source:
    """A finished run, or a results file of an evaluation command."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.numbers = read_results(path / FILE if path.is_dir() else path)

    @cached_property
    def latest(self) -> list[Number]:
        """The last numbers of each model."""
        return latest(self.numbers)

    @cached_property
    def exported(self) -> str:
        """Name of the student's weights that were exported."""
        models = self.path / "eval" / "models.json"
        return str(read_object(models, "models of a run")["exported"]) if models.is_file() else STUDENT

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """Train lines of metrics.jsonl."""
        text = read_text(self.path / "metrics.jsonl", "metrics")
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]

    @cached_property
    def steps_before(self) -> int:
        """Steps of the runs that made this run's initial student: those whose export its `student.model` names."""
        return _steps_before(self.path)

    def size(self, model: str) -> float | None:
        """Millions of parameters of a model; other weights of the student have its size."""
        sizes = {one.model: one.value for one in self.latest if one.metric == PARAMETERS}
        return sizes.get(model, None if model.startswith(TEACHER) else sizes.get(STUDENT))


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number in its place."""

    title: str
    row: tuple[str, ...]
    column: str
    over: str
    number: Number
    source: Source


def read_spec(path: Path) -> Spec:
    """The specification in a YAML file.

    Raises:
        UserError: a field that is not there or unknown, or a value of another kind.
    """
    content = read_yaml(path, "table specification")
    spec = _filled(Spec, content, str(path))
    tables = [_filled(Table, one, f"{path}: tables", scores=_picks(one, path)) for one in spec.tables]
    notes = [_filled(Note, one, f"{path}: notes", scores=_picks(one, path)) for one in spec.notes]
    for table in tables:
        unknown = sorted({*table.before, *table.after} - set(EXTRAS))
        if unknown:
            raise UserError(f"{path}: extra column {unknown[0]} is none of {', '.join(EXTRAS)}")
    return Spec(tables=tables, script=spec.script, notes=notes)


def plain_spec() -> Spec:
    """What a folder of runs is shown by without a specification: a row a run's name without its seed, all metrics."""
    name = r"(?P<arm>.+?)(_s(?P<seed>\d+))?"
    picks = [Pick(dataset="*"), Pick(model=f"{TEACHER}*", dataset="*", tags={"arm": "{teacher}", "seed": ""})]
    rows = {"model": "{arm}"}
    table = Table(
        scores=picks,
        rows=rows,
        columns="{dataset} {label}",
        runs=name,
        before=["parameters", "seeds"],
        missing="-",
    )
    return Spec(tables=[table])


def sources_in(folder: Path) -> list[Source]:
    """Finished runs below `folder` and results files in it, by name (numbers in it by value).

    Raises:
        UserError: none is there.
    """
    found = {str(path.parent.relative_to(folder)): path.parent for path in folder.glob("**/done.json")}
    found |= {path.stem: path for path in folder.glob("*.jsonl") if path.name not in (FILE, "metrics.jsonl")}
    if not found:
        raise UserError(
            f"{folder} has no finished run and no results file; name the folder of the run folders"
        )
    return [Source(name, found[name]) for name in sorted(found, key=_natural)]


def scores_of(table: Table, sources: Iterable[Source]) -> list[Score]:
    """The numbers of a table in their places."""
    found = []
    named = [(source, re.fullmatch(table.runs, source.name)) for source in sources]
    for pick in table.scores:
        for source, match in named:
            for number, extra in _picked(pick, source, match.groupdict("") if match else {}) if match else []:
                row = tuple(_fill(text, extra) for text in table.rows.values())
                score = Score(
                    title=_fill(table.title, extra), row=row, column=_fill(table.columns, extra),
                    over=extra.get(table.over, ""), number=number, source=source,
                )  # fmt: skip
                found.append(score)
    return found


def write_tables(spec: Spec, sources: Sequence[Source]) -> tuple[str, list[dict[str, Any]]]:
    """All tables as Markdown, and their numbers as plain data.

    Raises:
        UserError: a table without numbers, or without a row that it must have.
    """
    parts, data, seeds = [], [], set()
    for table in spec.tables:
        scores = scores_of(table, sources)
        if not scores and not table.optional:
            raise UserError(
                f"no finished run has the numbers of table {table.runs!r}; run {spec.script} first"
            )
        for row in table.order if table.complete else []:
            if row not in {score.row[0] for score in scores}:
                raise UserError(f"{row} is missing; run {spec.script} first")
        for title in dict.fromkeys(score.title for score in scores):
            own = [score for score in scores if score.title == title]
            pivot = Pivot(table, own)
            seeds |= {len(overs) for overs in pivot.cells.values()} if table is spec.tables[0] else set()
            parts.append((f"### {title}\n\n" if title else "") + pivot.markdown())
            data += [_plain(score) for score in own]
    notes = []
    for note in spec.notes:
        picked = Table(scores=note.scores, rows={}, columns="", runs=note.runs)
        values = [score.number for score in scores_of(picked, sources)]
        shown = show(statistics.mean(one.value for one in values), values[0].unit) if values else ""
        if values or not note.scores:
            notes.append(
                _fill(note.text, {"value": shown, "seeds": ", ".join(map(str, sorted(seeds)))}) + "\n"
            )
    return "\n".join([*parts, *notes]), data


class Pivot:
    """The scores of one table by row, column and seed."""

    def __init__(self, table: Table, scores: Sequence[Score]) -> None:
        self.table = table
        self.rows = _ordered(dict.fromkeys(score.row for score in scores), table.order)
        self.columns = [
            name for (name,) in _ordered(dict.fromkeys((score.column,) for score in scores), table.order)
        ]
        gathered: dict[tuple[tuple[str, ...], str], dict[str, list[float]]] = {}
        for score in scores:
            cell = gathered.setdefault((score.row, score.column), {})
            cell.setdefault(score.over, []).append(score.number.value)
        self.cells = {
            place: {over: statistics.mean(values) for over, values in cell.items()}
            for place, cell in gathered.items()
        }
        self.first = {score.column: score.number for score in reversed(scores)}
        self.of_row = {row: [score for score in scores if score.row == row] for row in self.rows}

    def markdown(self) -> str:
        """The table."""
        table = self.table

        def label(name: str) -> str:
            return table.labels.get(name, name)

        head = [
            *table.rows,
            *map(self._title, table.before),
            *map(label, self.columns),
            *map(self._title, table.after),
        ]
        lines = []
        for row in self.rows:
            cells = [
                self._cell(list(self.cells.get((row, column), {}).values()), column)
                for column in self.columns
            ]
            before, after = (
                [self._extra(name, row) for name in names] for names in (table.before, table.after)
            )
            lines.append([*map(label, row), *before, *cells, *after])
        return markdown(head, lines, left=len(table.rows))

    def _cell(self, values: Sequence[float], column: str) -> str:
        shown = partial(show, unit=self.first[column].unit, digits=self.table.digits)
        return mean_and_spread(values, shown) if values else self.table.missing

    def _title(self, extra: str) -> str:
        if extra == "passes":
            return f"steps to {self.table.baseline}'s {self.columns[0]}"
        return {"parameters": "params (M)"}.get(extra, extra)

    def _extra(self, name: str, row: tuple[str, ...]) -> str:
        scores = self.of_row[row]
        seeds = sorted({score.over for score in scores} - {""})
        if name == "parameters":
            sizes = [score.source.size(score.number.model) for score in scores]
            known = [f"{size:.2f}" for size in sorted(size for size in sizes if size is not None)]
            return "-".join(dict.fromkeys([known[0], known[-1]])) if known else "-"
        if name == "average":
            return self._cell(self._averages(row), self.columns[0])
        if name == "ratio":
            ratio = self._mean(row) / self._mean(self.rows[-1])
            return f"{ratio:.2f}"
        if not seeds:  # a teacher, which was not trained here
            return ""
        if name == "seeds":
            return str(len(seeds))
        if name == "steps":
            return "-".join(map(str, sorted({_all_steps(score) for score in scores})))
        return self._passes(row)

    def _averages(self, row: tuple[str, ...]) -> list[float]:
        """Mean over the columns of each seed that has them all."""
        cells = [self.cells.get((row, column), {}) for column in self.columns]
        return [
            statistics.mean(cell[over] for cell in cells)
            for over in cells[0]
            if all(over in cell for cell in cells)
        ]

    def _mean(self, row: tuple[str, ...]) -> float:
        return statistics.mean(self.cells[row, self.columns[0]].values())

    def _passes(self, row: tuple[str, ...]) -> str:
        """After how many steps a row's runs pass the baseline's final score, and how much sooner that is."""
        baseline = [one for one in self.rows if one[0] == self.table.baseline]
        if not baseline:
            rows = ", ".join(one[0] for one in self.rows)
            raise UserError(f"the baseline {self.table.baseline} is none of the rows {rows}")
        goal = self._mean(baseline[0])
        whole = statistics.mean(score.number.step for score in self._in_first_column(baseline[0]))
        passes = [_first_pass(score, goal) for score in self._in_first_column(row)]
        reached = [steps for steps in passes if steps is not None]
        if len(reached) < len(passes):
            return f"reached by {len(reached)} of {len(passes)}" if reached else "not reached"
        mean = statistics.mean(reached)
        return f"{mean:.0f} ({whole / mean:.1f} times fewer)" if mean < whole else f"{mean:.0f}"

    def _in_first_column(self, row: tuple[str, ...]) -> list[Score]:
        return [score for score in self.of_row[row] if score.column == self.columns[0]]


def _picked(pick: Pick, source: Source, groups: dict[str, str]) -> list[tuple[Number, dict[str, str]]]:
    """The numbers that a pick takes of a source, each with all its tags."""
    found = []
    if pick.log:
        values = [line[pick.log] for line in source.log[pick.skip :] if line.get(pick.log) is not None]
        reduce = {"mean": statistics.mean, "median": statistics.median}[pick.reduce]
        reduced = [reduce(values)] if values else []
        numbers = [Number(run=source.name, model=STUDENT, metric=pick.log, value=value) for value in reduced]
    else:
        numbers = list(source.numbers if pick.history else source.latest)
    steps: dict[tuple[str, str], list[int]] = {}
    metrics = [pick.metric] if isinstance(pick.metric, str) else pick.metric
    chosen = ""
    for one in numbers:
        tags = {key: str(value) for key, value in one.tags.items()} | groups
        tags |= {
            "exported": source.exported,
            "run": source.name,
            "model": one.model,
            "teacher": one.model.removeprefix(TEACHER),
        }
        tags |= {"dataset": one.dataset, "metric": one.metric, "label": one.label}
        if not pick.log:
            fits = one.dataset and not one.fitted and fnmatch.fnmatchcase(one.model, _fill(pick.model, tags))
            fits = fits and fnmatch.fnmatchcase(one.evaluator, pick.evaluator)
            fits = fits and any(fnmatch.fnmatchcase(one.metric, metric) for metric in metrics)
            fits = fits and fnmatch.fnmatchcase(one.dataset, _fill(pick.dataset or "*", tags))
            if not fits or (pick.but and fnmatch.fnmatchcase(one.dataset, _fill(pick.but, tags))):
                continue
            chosen = chosen or one.dataset
            if not pick.dataset and one.dataset != chosen:
                continue
        if pick.history:
            seen = steps.setdefault(one.key, [])
            seen += [one.step] * (one.step not in seen)
            tags[pick.history] = str(seen.index(one.step) + 1)
        found.append((one, tags | {name: _fill(text, tags) for name, text in pick.tags.items()}))
    return found


def _fill(text: str, tags: Mapping[str, str]) -> str:
    """`text` with tags in the place of their names in braces.

    Raises:
        UserError: no such tag.
    """
    missing = [name for name in re.findall(r"\{(\w+)\}", text) if name not in tags]
    if missing:
        raise UserError(f"a table names the tag {{{missing[0]}}}; its numbers have {', '.join(sorted(tags))}")
    return re.sub(r"\{(\w+)\}", lambda found: tags[found[1]], text)


def _steps_before(run: Path) -> int:
    config = read_yaml(run / "config.yaml", "config of a run")
    export = re.fullmatch(
        r"local-dir:(?:.*/)?([^/]+)/export/?", str(config.get("student", {}).get("model", ""))
    )
    if not export:
        return 0
    stage = run.resolve().parent / export[1]
    if not (stage / "config.yaml").is_file():
        raise UserError(f"{run} starts from the run {stage}, which is gone: its steps can not be counted")
    done = json.loads(read_text(stage / "done.json", "end of a run"))
    return int(done["step"]) + _steps_before(stage)


def _all_steps(score: Score) -> int:
    return score.source.steps_before + max(one.step for one in score.source.numbers)


def _first_pass(score: Score, goal: float) -> int | None:
    """Steps after which the score's model first reached `goal`, stages before included; None: never."""
    model, key = score.number.model, score.number.key
    reached = [
        one.step
        for one in score.source.numbers
        if one.model == model and one.key == key and one.value >= goal
    ]
    return score.source.steps_before + min(reached) if reached else None


def _ordered(names: Iterable[tuple[str, ...]], order: Sequence[str]) -> list[tuple[str, ...]]:
    """Those whose first part is in `order` first; then as they are found, those with the same first part together."""
    found = list(names)
    firsts = [*order, *(name[0] for name in found)]
    return sorted(found, key=lambda name: firsts.index(name[0]))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `a_2` before `a_10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _plain(score: Score) -> dict[str, Any]:
    number = score.number
    kept = {"dataset": number.dataset, "metric": number.metric, "value": number.value, "unit": number.unit}
    place = {"table": score.title, "row": list(score.row), "column": score.column, "over": score.over}
    return {**place, **kept, "model": number.model, "tags": number.tags, "run": str(score.source.path)}


def _picks(content: Any, path: Path) -> list[Pick]:
    known = {item.name for item in fields(Pick)}
    found = []
    for one in content.get("scores", []):
        tags = {name: str(value) for name, value in one.items() if name not in known}
        found.append(
            _filled(Pick, {name: one[name] for name in one if name in known}, f"{path}: scores", tags=tags)
        )
    return found


def _filled(kind: type[T], content: Any, where: str, **given: Any) -> T:
    """A dataclass from a mapping of YAML."""
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a mapping; it is {content!r}")
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in content if name not in known]
    if unknown:
        raise UserError(f"{where}: there is no field {unknown[0]}; there are {', '.join(known)}")
    try:
        return kind(**(content | given))
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None
