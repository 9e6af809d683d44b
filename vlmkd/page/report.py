"""Run folders -> one self-contained HTML page and one Markdown table, from files alone: no model is loaded.

Reads what every run writes: `results.jsonl`, `metrics.jsonl`, `eval/*.json`, `env.json`, `command.txt`, `data.json`.
The page is the template `report.html` beside this file.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmkd.datasets.emoji import LICENCES
from vlmkd.errors import UserError
from vlmkd.files import read_object, read_text, write_text
from vlmkd.page import plots
from vlmkd.page.gallery import GALLERY, MISTAKES, read_gallery, read_mistakes
from vlmkd.page.plots import NEUTRAL, Series
from vlmkd.results import FILE, PARAMETERS, STUDENT, TEACHER, Number, last_of, markdown, read_results, short
from vlmkd.results import title as title_of

MODELS, DETAILS = "models.json", "details.json"
_CONFUSED = 40
"""Classes of a confusion matrix; of a larger set those with most wrong images."""
Key = tuple[str, str]
"""Data set and metric."""


@dataclass(kw_only=True)
class Run:
    """What a run folder says about its run."""

    name: str
    folder: Path
    train: list[dict[str, Any]] = field(default_factory=list)
    """Train lines of metrics.jsonl, by step."""
    numbers: list[Number] = field(default_factory=list)
    """Lines of results.jsonl."""
    final: dict[str, dict[Key, Number]] = field(default_factory=dict)
    """Model name -> its last numbers."""
    gallery: dict[str, Any] | None = None
    exported: str = STUDENT
    """Which weights of the student are in the run's export: the last ones, or those of a selection."""
    selections: list[str] = field(default_factory=list)
    """Names of other weights of the student than the last ones."""
    classified: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data set -> details of the exported weights' classification of it."""
    mistakes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Data set -> its worst mistakes with their pictures."""
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    def parameters(self, model: str) -> float | None:
        """Millions of parameters, where known."""
        number = self.final.get(model, {}).get(("", PARAMETERS))
        return None if number is None else number.value


@dataclass(kw_only=True)
class Row:
    """One model of the results table."""

    label: str
    teacher: bool
    color: int
    """Series colour: NEUTRAL for teachers, else the number of the run."""
    scores: dict[Key, Number]
    parameters: float | None
    """In millions."""
    exported: bool = True
    """False for weights of a student that are not in its run's export."""


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: no metrics.jsonl there, a folder of an earlier version, or a line that is not JSON (the last one may
            be torn by a kill).
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} has no metrics.jsonl; give the folder of a run (run_dir=...) that has logged a step"
        )
    run = Run(name=folder.resolve().name, folder=folder)
    by_step = {int(line["step"]): line for line in _json_lines(path) if line.get("kind") == "train"}
    run.train = [by_step[step] for step in sorted(by_step)]
    evaluated = folder / "eval"
    if (folder / FILE).is_file() or (evaluated / "results.json").is_file():
        run.numbers = read_results(folder / FILE)
    run.final = last_of(run.numbers)
    models = _object(evaluated / MODELS)
    run.exported, run.selections = models.get("exported", STUDENT), models.get("selections", [])
    details = _object(evaluated / DETAILS).get(run.exported, {})
    run.classified = {name: one for name, one in details.items() if "confusion" in one}
    if (evaluated / GALLERY).is_file():
        run.gallery = read_gallery(evaluated / GALLERY)
    if (evaluated / MISTAKES).is_file():
        run.mistakes = read_mistakes(evaluated / MISTAKES)
    run.environment, run.data = _object(folder / "env.json"), _object(folder / "data.json")
    command = folder / "command.txt"
    run.command = read_text(command, "command").strip() if command.is_file() else ""
    return run


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Teachers first, each once; then the student of every run, in the order of `runs`."""
    rows: list[Row] = []
    for run in runs:
        for model in run.final:
            scores, parameters = _scores(run, model), run.parameters(model)
            if model in (STUDENT, *run.selections) or not scores:
                continue
            name = model.removeprefix(TEACHER)  # which its column says
            values = {key: number.value for key, number in scores.items()}
            same = [row for row in rows if row.label == name]
            if not any({key: number.value for key, number in row.scores.items()} == values for row in same):
                label = f"{name} ({run.name})" if same else name
                rows.append(
                    Row(label=label, teacher=True, color=NEUTRAL, scores=scores, parameters=parameters)
                )
    for index, run in enumerate(runs):
        own = [model for model in (STUDENT, *run.selections) if _scores(run, model)]
        for model in sorted(own, key=lambda model: model != run.exported):
            exported = model == run.exported
            row = Row(
                label=run.name if exported else f"{run.name}, {'last step' if model == STUDENT else model}",
                teacher=False, color=index, scores=_scores(run, model), parameters=run.parameters(STUDENT),
                exported=exported,
            )  # fmt: skip
            rows.append(row)
    return rows


def columns_of(rows: Sequence[Row]) -> list[Number]:
    """One number of each column of `rows`, data sets together, in the order in which they were written."""
    first: dict[Key, Number] = {}
    for row in rows:
        for key, number in row.scores.items():
            first.setdefault(key, number)
    datasets = list(dict.fromkeys(dataset for dataset, _ in first))
    return sorted(first.values(), key=lambda number: datasets.index(number.dataset))


def main_set(runs: Sequence[Run]) -> str:
    """The first data set with a confusion matrix, a validation split only if there is no other; empty: none."""
    return min(
        (name for run in runs for name in run.classified), key=lambda name: name.endswith("_val"), default=""
    )


def markdown_table(run_dirs: Sequence[Path]) -> str:
    """Models x test sets as a Markdown table; shares in per cent, `-` where a model was not evaluated."""
    rows = rows_of([read_run(folder) for folder in run_dirs])
    columns = columns_of(rows)
    lines = []
    for row in rows:
        cells = [row.label + (" (teacher)" if row.teacher else ""), millions(row.parameters)]
        lines.append(
            cells + [row.scores[one.key].shown() if one.key in row.scores else "-" for one in columns]
        )
    return markdown(["model", "parameters", *(f"{one.dataset} {title_of(one)}" for one in columns)], lines)


def build_report(run_dirs: Sequence[Path], out: Path, *, title: str, samples: Path | None = None) -> Path:
    """Write one HTML page about `run_dirs` to `out`; it loads nothing from outside. Returns `out`.

    Args:
        run_dirs: run folders; each is one line in the curves and one row of the table.
        title: heading of the page.
        samples: a gallery file instead of the runs' own `eval/gallery.json`.

    Raises:
        UserError: no run, a folder without metrics, or a gallery that is not one.
    """
    import jinja2  # here, because a run imports this module at its start

    if not run_dirs:
        raise UserError("no run folder was given; name at least one, e.g. runs/tinyclip_nano")
    runs = [read_run(folder) for folder in run_dirs]
    if samples is not None:
        runs[0].gallery = read_gallery(samples)
        for run in runs[1:]:
            run.gallery = None
    rows = rows_of(runs)
    columns = columns_of(rows)
    galleries = merge_galleries(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "millions": millions,
        "title_of": title_of,
        "short": short,
        "color": plots.color_of,
    }
    page = environment.get_template("report.html").render(
        title=title,
        headline=headline(rows, main_set(runs)),
        rows=rows,
        columns=columns,
        datasets=list(dict.fromkeys(one.dataset for one in columns)),
        best=_best(rows, columns),
        sizes=[(name, plots.svg(plot, name)) for name, plot in size_plots(rows, columns)],
        curves=[(name, plots.svg(plot, name)) for name, plot in curve_plots(runs, rows, columns)],
        runs=runs,
        answers=[(run, fitted_of(run), [_answers(run, name) for name in run.classified]) for run in runs],
        galleries=galleries,
        costs=[_costs(run) for run in runs],
        definitions=_definitions,
        attributions=_attributions(runs, galleries),
    )
    write_text(out, page, "--out")
    return out


def headline(rows: Sequence[Row], dataset: str) -> dict[str, Any] | None:
    """The best student beside the best teacher in the main metric of `dataset`, or of the first set that has one."""
    columns = [one for one in columns_of(rows) if one.main]
    chosen = [one for one in columns if one.dataset == dataset] or columns
    if not chosen:
        return None
    key = chosen[0].key
    students = [row for row in rows if row.exported and not row.teacher and key in row.scores]
    teachers = [row for row in rows if row.teacher and key in row.scores]
    if not students:
        return None
    sign = -1 if chosen[0].higher_is_better is False else 1
    student, teacher = (
        max(group, key=lambda row: sign * row.scores[key].value, default=None)
        for group in (students, teachers)
    )
    sized = student and teacher and student.parameters and teacher.parameters
    return {
        "key": key,
        "metric": chosen[0].label,
        "student": student,
        "teacher": teacher,
        "times": teacher.parameters / student.parameters if sized else None,  # type: ignore[union-attr, operator]
    }


def size_plots(rows: Sequence[Row], columns: Sequence[Number]) -> list[tuple[str, Any]]:
    """Main metrics against parameters, with captions."""
    found = []
    for one in columns:
        sized = [row for row in rows if one.main and row.parameters and one.key in row.scores]
        points = [
            Series(
                name=row.label, points=[(row.parameters or 0.0, _drawn(row.scores[one.key]))], color=row.color
            )
            for row in sized
        ]
        if points:
            plot = plots.scatter_plot(points, x_label="million parameters", y_label=_axis(one))
            found.append((f"{one.dataset}: {_axis(one)}", plot))
    return found


def curve_plots(runs: Sequence[Run], rows: Sequence[Row], columns: Sequence[Number]) -> list[tuple[str, Any]]:
    """Training loss, and main metrics that were seen more than once, with captions."""
    found = []
    losses = [
        Series(name=run.name, points=_points(run.train, "loss"), color=index)
        for index, run in enumerate(runs)
    ]
    if any(series.points for series in losses):
        found.append(("Training loss", plots.line_plot(losses, y_label="loss")))
    for one in columns:
        lines = [
            Series(name=row.label, points=[(0.0, _drawn(row.scores[one.key]))], color=NEUTRAL, level=True)
            for row in rows
            if row.teacher and one.key in row.scores
        ]
        for index, run in enumerate(runs):
            seen = {n.step: _drawn(n) for n in run.numbers if n.model == STUDENT and n.key == one.key}
            lines.append(Series(name=run.name, points=sorted(seen.items()), color=index))
        if one.main and any(len(line.points) > 1 for line in lines):
            found.append((f"{one.dataset}: {_axis(one)}", plots.line_plot(lines, y_label=_axis(one))))
    return found


def merge_galleries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One gallery for each set of texts and images, with the models of all runs that share it.

    A run's student takes the run's name; teachers stand once, before the students.
    """
    merged: list[dict[str, Any]] = []
    for run in runs:
        own = run.gallery
        if own is None:
            continue
        same = [one for one in merged if (one["texts"], one["images"]) == (own["texts"], own["images"])]
        if not same:
            same = [own | {"models": {}}]
            merged.append(same[0])
        for model, entry in own["models"].items():
            same[0]["models"].setdefault(run.name if model == STUDENT else model, entry)
    names = [run.name for run in runs]
    for one in merged:
        order = {name: names.index(name) if name in names else -1 for name in one["models"]}
        one["models"] = {name: one["models"][name] for name in sorted(order, key=lambda name: order[name])}
        for entry in one["models"].values():
            on_right = [
                sum(line[index] for index in right)
                for line, right in zip(entry["affinity"], one["targets"], strict=True)
            ]
            entry["right"] = statistics.fmean(on_right)
    return merged


def fitted_of(run: Run) -> dict[str, list[Number]]:
    """Data set -> what was fitted on it for the exported weights and scores nothing."""
    found: dict[str, list[Number]] = {}
    for number in run.final.get(run.exported, {}).values():
        if number.fitted:
            found.setdefault(number.dataset, []).append(number)
    return found


def confusion(details: dict[str, Any]) -> tuple[list[list[float]], list[int]]:
    """Shares of each shown class's images by answer, and the classes: all, or those with most wrong images."""
    wrong = [seen - right for right, seen in details["per_class"]]
    shown = sorted(sorted(range(len(wrong)), key=lambda index: -wrong[index])[:_CONFUSED])
    place = {label: row for row, label in enumerate(shown)}
    rows = [[0.0] * len(shown) for _ in shown]
    for label, predicted, images in details["confusion"]:
        if label in place and predicted in place:
            rows[place[label]][place[predicted]] = images / details["per_class"][label][1]
    return rows, shown


def millions(parameters: float | None) -> str:
    """Millions of parameters as tables show them."""
    return "-" if parameters is None else f"{parameters:.2f} M"


def _scores(run: Run, model: str) -> dict[Key, Number]:
    """The numbers of data sets that compare models."""
    return {key: one for key, one in run.final.get(model, {}).items() if one.dataset and not one.fitted}


def _best(rows: Sequence[Row], columns: Sequence[Number]) -> dict[Key, float]:
    """The best value among students of each metric that has a better and a worse."""
    found = {}
    for one in columns:
        values = [row.scores[one.key].value for row in rows if not row.teacher and one.key in row.scores]
        if values and one.higher_is_better is not None:
            found[one.key] = max(values) if one.higher_is_better else min(values)
    return found


def _answers(run: Run, dataset: str) -> dict[str, Any]:
    details = run.classified[dataset]
    values, shown = confusion(details)
    names = [details["classes"][index] for index in shown]
    return {
        "dataset": dataset,
        "values": values,
        "names": names,
        "classes": len(details["classes"]),
        "mistakes": run.mistakes.get(dataset, []),
    }


def _costs(run: Run) -> dict[str, Any] | None:
    """What training took."""
    if not run.train:
        return None
    first, last = run.train[0], run.train[-1]
    rates = [line["samples_per_s"] for line in run.train if _is_number(line.get("samples_per_s"))]
    memory = [line["peak_memory_mb"] for line in run.train if _is_number(line.get("peak_memory_mb"))]
    skipped = [value for name, value in last.items() if name.startswith("skipped/") and _is_number(value)]
    return {
        "steps": last["step"],
        "minutes": f"{(last.get('time', 0) - first.get('time', 0)) / 60:.1f}",
        "rate": f"{statistics.median_high(rates):.0f}" if rates else "-",
        "memory": f"{max(memory):,.0f}" if memory else "-",
        "skipped": f"{sum(skipped):.0f}",
    }


def _attributions(runs: Sequence[Run], galleries: Sequence[dict[str, Any]]) -> list[str]:
    sources = (*(run.data for run in runs), *galleries)
    found = [str(line) for source in sources for line in source.get("attributions", [])]
    for run in runs:
        config = run.folder / "config.yaml"
        if config.is_file() and "emoji:" in config.read_text(encoding="utf-8"):
            found += LICENCES.values()
    return list(dict.fromkeys(found))


def _definitions(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as flat pairs."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _definitions(value, f"{prefix}{name} / ")
        else:
            found.append((f"{prefix}{name}", str(value)))
    return found


def _axis(number: Number) -> str:
    return f"{number.label}, %" if number.unit == "share" else title_of(number)


def _drawn(number: Number) -> float:
    return 100 * number.value if number.unit == "share" else number.value


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[name])) for line in lines if _is_number(line.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    return read_object(path, "result file") if path.is_file() else {}


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    lines = read_text(path, "metrics").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path} line {number} is not valid JSON; remove that line") from None
            return
        yield value
