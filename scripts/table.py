"""A folder of runs and results files -> Markdown tables: pivoted by tags, mean ± standard deviation over the seeds.

python scripts/table.py runs/dho_nano --spec projects/dho/table.yaml [--markdown table.md] [--json numbers.json]

Only finished runs count. Without --spec (table.yaml beside this file) there is one row for runs of the same name but for
their seed (NAME_s0, NAME_s1, ...), and one column for each data set and metric.

A specification (`projects/<paper>/table.yaml`; its fields are those of `Spec`, `Table`, `Pick` and `Note`) says which
numbers become which rows and columns. Every number has tags: those of its result (`seed`, ...), the named groups of
`runs`, those that its pick gives it, and `run`, `exported` (the student's exported weights), `model`, `teacher` (the
model's name as a teacher), `evaluator`, `dataset`, `metric`, `label`. Texts may name tags in braces.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that was not installed

from vlmkd import config, results
from vlmkd.errors import UserError, run_tool
from vlmkd.files import read_object, read_yaml, write_json, write_text
from vlmkd.page.runs import Run
from vlmkd.results import STUDENT, TEACHER, Number

PLAIN = Path(__file__).with_suffix(".yaml")
"""The specification for those who give none."""
Row = tuple[str, ...]
Extra = Literal["parameters", "seeds", "steps", "average", "ratio", "passes"]


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Which numbers of a run are taken."""

    where: dict[str, str] = field(default_factory=dict)
    """Tags and their regular expressions; without `model` the exported weights, without `dataset` the first set."""
    history: str = ""
    """Take the evaluations of all steps, and call their ordinal number, from 1 on, by this tag."""
    log: str = ""
    """Instead of results: a column of metrics.jsonl, reduced over the log lines."""
    reduce: Literal["mean", "median"] = "mean"
    skip: int = 0
    """Log lines that are left out at the start."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags that the numbers get."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table; numbers of the same row, column and seed are averaged."""

    scores: list[Pick] = field(default_factory=list)
    rows: dict[str, str]
    """Titles of the first columns, and what stands in them."""
    columns: str
    title: str = ""
    """Different titles make different tables."""
    runs: str = ".*"
    """Regular expression of the names of runs (their path in the folder) and result files (without `.jsonl`)."""
    over: str = "seed"
    """Tag over which mean and standard deviation are taken; a run without it counts once."""
    before: list[Extra] = field(default_factory=list)
    """Columns before the numbers ..."""
    after: list[Extra] = field(default_factory=list)
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

    tables: list[Table] = field(default_factory=list)
    script: str = "the script of the table"
    """What makes the runs, for messages."""
    notes: list[Note] = field(default_factory=list)


class Source(Run):
    """A finished run, or a results file of an evaluation command."""

    @cached_property
    def _before(self) -> int:
        """Steps of the runs that made this run's initial student: those whose export its `student.model` names."""
        run, steps = self.path.resolve(), 0
        while export := re.fullmatch(r"local-dir:(?:.*/)?([^/]+)/export/?", _student(run)):
            stage = run.parent / export[1]
            if not (stage / "config.yaml").is_file():
                raise UserError(
                    f"{run} starts from the run {stage}, which is gone: its steps can not be counted"
                )
            steps += int(read_object(stage / "done.json", "end of a run")["step"])
            run = stage
        return steps

    @property
    def steps(self) -> int:
        """Steps until the run's end; here and in `steps_to` with those of stages before.

        Raises:
            UserError: such a stage is gone.
        """
        return self._before + max(one.step for one in self.numbers)

    def steps_to(self, goal: float, number: Number) -> int | None:
        """Steps after which the model and metric of `number` first reached `goal`; None: never."""
        seen = [one for one in self.numbers if (one.model, one.key) == (number.model, number.key)]
        return min((self._before + one.step for one in seen if one.value >= goal), default=None)

    def picked(self, pick: Pick, groups: dict[str, str]) -> list[tuple[Number, dict[str, str]]]:
        """The numbers that `pick` takes, each with all its tags; `groups` are the run's."""
        where = {} if pick.log else {"model": "{exported}"} | pick.where
        seen = self._logged(pick) if pick.log else self.numbers if pick.history else self.latest
        tagged = [
            (one, self._tags(one) | groups) for one in seen if not one.fitted and (one.dataset or pick.log)
        ]
        found = [(one, tags) for one, tags in tagged if _matches(where, tags)]
        steps: dict[tuple[str, str], list[int]] = {}
        for one, tags in found:
            if pick.history:
                own = steps.setdefault(one.key, [])
                own += [one.step] * (one.step not in own)
                tags[pick.history] = str(own.index(one.step) + 1)
            tags |= {name: _fill(text, tags) for name, text in pick.tags.items()}
        return [
            (one, tags) for one, tags in found if "dataset" in where or one.dataset == found[0][0].dataset
        ]

    def _logged(self, pick: Pick) -> list[Number]:
        column = (line.get(pick.log) for line in self.train[pick.skip :])
        values = [value for value in column if value is not None]
        reduce = mean if pick.reduce == "mean" else statistics.median
        return [Number(run=self.name, model=STUDENT, metric=pick.log, value=reduce(values))] if values else []

    def _tags(self, one: Number) -> dict[str, str]:
        own = {name: getattr(one, name) for name in ("model", "evaluator", "dataset", "metric", "label")}
        own |= {"teacher": one.model.removeprefix(TEACHER), "run": self.name, "exported": self.exported}
        return {name: str(value) for name, value in one.tags.items()} | own


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number in its place."""

    title: str
    row: Row
    column: str
    over: str
    number: Number
    source: Source


def read_spec(path: Path) -> Spec:
    """The specification in a YAML file; errors as `config.load`."""
    return config.load(Spec, [str(path)])


def sources_in(folder: Path) -> list[Source]:
    """Finished runs below `folder` and results files in it, by name (numbers in it by value).

    Raises:
        UserError: none is there.
    """
    found = {str(path.parent.relative_to(folder)): path.parent for path in folder.glob("**/done.json")}
    others = (results.FILE, "metrics.jsonl")
    found |= {path.stem: path for path in folder.glob("*.jsonl") if path.name not in others}
    if not found:
        raise UserError(
            f"{folder} has no finished run and no results file; name the folder of the run folders"
        )

    def natural(name: str) -> list[Any]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    return [Source(found[name], name) for name in sorted(found, key=natural)]


def scores_of(table: Table, sources: Iterable[Source]) -> list[Score]:
    """The numbers of a table in their places."""
    named = [(source, re.fullmatch(table.runs, source.name)) for source in sources]
    return [
        Score(
            title=_fill(table.title, tags), row=tuple(_fill(text, tags) for text in table.rows.values()),
            column=_fill(table.columns, tags), over=tags.get(table.over, ""), number=number, source=source,
        )
        for pick in table.scores
        for source, match in named
        if match
        for number, tags in source.picked(pick, match.groupdict(""))
    ]  # fmt: skip


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
            pivot = Pivot(table, [score for score in scores if score.title == title])
            seeds |= {len(cell) for cell in pivot.cells.values()} if table is spec.tables[0] else set()
            parts.append((f"### {title}\n\n" if title else "") + pivot.markdown())
            data += [
                {"table": title, "row": list(score.row), "column": score.column, "over": score.over}
                | asdict(score.number)
                | {"run": str(score.source.path)}
                for score in pivot.scores
            ]
    for note in spec.notes:
        picked = scores_of(Table(scores=note.scores, rows={}, columns="", runs=note.runs), sources)
        told = {"seeds": ", ".join(map(str, sorted(seeds)))}
        if picked:
            told["value"] = results.show(mean(one.number.value for one in picked), picked[0].number.unit)
        if picked or not note.scores:
            parts.append(_fill(note.text, told) + "\n")
    return "\n".join(parts), data


class Pivot:
    """The scores of one table by row, column and seed."""

    def __init__(self, table: Table, scores: Sequence[Score]) -> None:
        self.table, self.scores = table, scores
        rows, columns = dict.fromkeys(one.row for one in scores), dict.fromkeys(one.column for one in scores)
        firsts = [*table.order, *(row[0] for row in rows)]
        self.rows = sorted(rows, key=lambda row: firsts.index(row[0]))
        self.columns = sorted(columns, key=[*table.order, *columns].index)
        values: dict[tuple[Row, str], dict[str, list[float]]] = {}
        for one in scores:
            values.setdefault((one.row, one.column), {}).setdefault(one.over, []).append(one.number.value)
        self.cells = {at: {seed: mean(cell[seed]) for seed in cell} for at, cell in values.items()}
        self.units = {score.column: score.number.unit for score in reversed(scores)}

    def markdown(self) -> str:
        """The table."""
        table, passes = self.table, f"steps to {self.table.baseline}'s {self.columns[0]}"
        labels = {"parameters": "params (M)", "passes": passes} | table.labels
        head = [labels.get(name, name) for name in (*table.before, *self.columns, *table.after)]
        lines = []
        for row in self.rows:
            line = [labels.get(name, name) for name in row]
            line += [self._extra(name, row) for name in table.before]
            line += [self._cell(self._seeds(row, column).values(), column) for column in self.columns]
            lines.append(line + [self._extra(name, row) for name in table.after])
        return results.markdown([*table.rows, *head], lines, left=len(table.rows))

    def _seeds(self, row: Row, column: str) -> dict[str, float]:
        return self.cells.get((row, column), {})

    def _cell(self, seeds: Iterable[float], column: str) -> str:
        """`mean ± standard deviation` of one value a seed; a single value alone."""
        values = list(seeds)
        figures = [mean(values)] if values else []
        figures += [statistics.stdev(values)] if len(values) > 1 else []
        shown = [results.show(figure, self.units[column], self.table.digits) for figure in figures]
        return " ± ".join(shown) or self.table.missing

    def _first(self, row: Row) -> float:
        """The mean in the first column."""
        return mean(self._seeds(row, self.columns[0]).values())

    def _extra(self, name: Extra, row: Row) -> str:
        scores = [score for score in self.scores if score.row == row]
        seeds = {score.over for score in scores} - {""}
        if name == "parameters":
            sizes = sorted(filter(None, (score.source.parameters(score.number.model) for score in scores)))
            return "-".join(dict.fromkeys(f"{size:.2f}" for size in sizes[:1] + sizes[-1:])) or "-"
        if name == "average":  # over the columns of each seed that has them all
            cells = [self._seeds(row, column) for column in self.columns]
            whole = [seed for seed in cells[0] if all(seed in cell for cell in cells)]
            return self._cell((mean(cell[seed] for cell in cells) for seed in whole), self.columns[0])
        if name == "ratio":
            return f"{self._first(row) / self._first(self.rows[-1]):.2f}"
        if not seeds:  # a teacher, which was not trained here
            return ""
        if name == "seeds":
            return str(len(seeds))
        if name == "steps":
            return "-".join(map(str, sorted({score.source.steps for score in scores})))
        return self._passes(row)

    def _passes(self, row: Row) -> str:
        """After how many steps a row's runs reach the baseline's final score, and how much sooner that is."""
        first = [score for score in self.scores if score.column == self.columns[0]]
        baseline = [score for score in first if score.row[0] == self.table.baseline]
        if not baseline:
            rows = ", ".join(one[0] for one in self.rows)
            raise UserError(f"the baseline {self.table.baseline} is none of the rows {rows}")
        goal = self._first(baseline[0].row)
        runs = [score for score in first if score.row == row]
        steps = [step for score in runs if (step := score.source.steps_to(goal, score.number)) is not None]
        if len(steps) < len(runs):
            return f"reached by {len(steps)} of {len(runs)}" if steps else "not reached"
        sooner = mean(score.number.step for score in baseline) / mean(steps)
        return f"{mean(steps):.0f}" + (f" ({sooner:.1f} times fewer)" if sooner > 1 else "")


def _matches(where: Mapping[str, str], tags: Mapping[str, str]) -> bool:
    escaped = {name: re.escape(value) for name, value in tags.items()}
    return all(re.fullmatch(_fill(text, escaped), tags.get(name, "")) for name, text in where.items())


def _student(run: Path) -> str:
    """What the run's student began as."""
    return str(read_yaml(run / "config.yaml", "config of a run").get("student", {}).get("model", ""))


def _fill(text: str, tags: Mapping[str, str]) -> str:
    """`text` with tags in the place of their names in braces.

    Raises:
        UserError: no such tag.
    """
    try:
        return re.sub(r"\{(\w+)\}", lambda found: tags[found[1]], text)
    except KeyError as error:
        raise UserError(
            f"a table names the tag {{{error.args[0]}}}; its numbers have {', '.join(sorted(tags))}"
        ) from None


def main(argv: list[str]) -> int:
    """Parse arguments and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the run folders")
    parser.add_argument("--spec", type=Path, default=PLAIN, help="specification of the tables (YAML)")
    parser.add_argument(
        "--markdown", type=Path, help="write the tables to this file instead of printing them"
    )
    parser.add_argument("--json", type=Path, help="write every number with its place and run to this file")
    args = parser.parse_args(argv)
    text, data = write_tables(read_spec(args.spec), sources_in(args.folder))
    if args.json:
        write_json(args.json, data, "--json")
    if args.markdown:
        write_text(args.markdown, text, "--markdown")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    run_tool(main)
