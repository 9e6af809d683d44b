"""Run folders -> one self-contained HTML page (`report.html`), from files alone: no model is loaded."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmkd.datasets.emoji import LICENCES
from vlmkd.errors import UserError
from vlmkd.files import read_object, write_text
from vlmkd.page import chats, plots
from vlmkd.page.gallery import GALLERY, MISTAKES, PICTURES
from vlmkd.page.runs import Key, Run
from vlmkd.results import STUDENT, TEACHER, Number, short, title_of

_CONFUSED = 40
"""Classes of a confusion matrix; of a larger set those with most wrong images."""


@dataclass(kw_only=True)
class Row:
    label: str
    teacher: bool
    color: int
    """NEUTRAL for teachers, else the number of the run."""
    scores: dict[Key, Number]
    parameters: float | None
    """In millions."""
    exported: bool = True
    """False for weights of a student that are not in its run's export."""


def read_run(folder: Path) -> Run:
    """The run in a folder."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} has no metrics.jsonl; give the folder of a run that has logged a step")
    run = Run(folder)
    assert isinstance(run.train, list)  # read now, so that a mistake in it is told first
    return run


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Teachers first, each once; then the student of every run."""
    teachers: list[Row] = []
    students: list[Row] = []
    for index, run in enumerate(runs):
        own = []
        for model, scores in run.scores.items():
            facts: dict[str, Any] = {"scores": scores, "parameters": run.parameters(model)}
            if model in (STUDENT, *run.selections):
                exported, other = model == run.exported, "last step" if model == STUDENT else model
                label = run.name if exported else f"{run.name}, {other}"
                own.append(Row(label=label, teacher=False, color=index, exported=exported, **facts))
                continue
            name = model.removeprefix(TEACHER)  # which its column says
            same = [_values(row.scores) for row in teachers if row.label == name]
            if _values(scores) not in same:
                label = f"{name} ({run.name})" if same else name
                teachers.append(Row(label=label, teacher=True, color=plots.NEUTRAL, **facts))
        students += sorted(own, key=lambda row: not row.exported)
    return teachers + students


def columns_of(rows: Sequence[Row]) -> list[Number]:
    """A number of each column, data sets together, in the order of writing."""
    first: dict[Key, Number] = {}
    for row in rows:
        for key, number in row.scores.items():
            first.setdefault(key, number)
    datasets = [dataset for dataset, _ in first]
    return sorted(first.values(), key=lambda number: datasets.index(number.dataset))


def main_set(runs: Sequence[Run]) -> str:
    """The first data set with a confusion matrix, rather no validation split; empty: none."""
    names = [name for run in runs for name in run.classified]
    return min(names, key=lambda name: name.endswith("_val"), default="")


def best(rows: Iterable[Row], column: Number) -> Row | None:
    sign = -1 if column.higher_is_better is False else 1
    scored = (row for row in rows if column.key in row.scores)
    return max(scored, key=lambda row: sign * row.scores[column.key].value, default=None)


def build_report(run_dirs: Sequence[Path], out: Path, *, title: str, samples: Path | None = None) -> Path:
    """Write the page to `out`, which is returned; `samples` is a gallery instead of the runs' own."""
    import jinja2  # here, because a run imports this module at its start

    if not run_dirs:
        raise UserError("no run folder was given; name at least one, e.g. runs/tinyclip_nano")
    runs = [read_run(folder) for folder in run_dirs]
    rows = rows_of(runs)
    columns = columns_of(rows)
    galleries = merge_galleries(runs, samples)
    speakers = chats.speakers(runs, [run.json(f"eval/{PICTURES}").get("pictures", {}) for run in runs])
    main = [one for one in columns if one.main]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "millions": millions, "title_of": title_of, "short": short, "color": plots.color_of,
        "median": statistics.median_high, "inline": _inline,
    }  # fmt: skip
    page = environment.get_template("report.html").render(
        title=title,
        main=min(main, key=lambda one: one.dataset != main_set(runs), default=None),
        rows=rows,
        columns=columns,
        best=best,
        sizes=[(name, plots.svg(plot, name)) for name, plot in size_plots(rows, columns)],
        curves=[(name, plots.svg(plot, name)) for name, plot in curve_plots(runs, rows, columns)],
        runs=runs,
        confusion=confusion,
        mistakes={run: run.json(f"eval/{MISTAKES}") for run in runs},
        asked=chats.questions(speakers),
        speakers=speakers,
        galleries=galleries,
        attributions=_attributions(runs),
    )
    write_text(out, page, "--out")
    return out


def size_plots(rows: Sequence[Row], columns: Sequence[Number]) -> list[tuple[str, Any]]:
    """Captions and plots: main metrics of two models or more over their sizes."""
    found = []
    for one in columns:
        points = [
            (row.label, row.color, (row.parameters, _drawn(row.scores[one.key])))
            for row in rows
            if one.main and row.parameters and one.key in row.scores
        ]
        if len(points) > 1:
            plot = plots.scatter_plot(points, y_label=_axis(one))
            found.append((f"{one.dataset}: {_axis(one)}", plot))
    return found


def curve_plots(runs: Sequence[Run], rows: Sequence[Row], columns: Sequence[Number]) -> list[tuple[str, Any]]:
    """Captions and plots: training loss, and main metrics seen more than once."""
    found: list[tuple[str, Any]] = []
    lines = [
        (run.name, [(line["step"], line["loss"]) for line in run.train if line.get("loss") is not None])
        for run in runs
    ]
    if any(points for _, points in lines):
        found.append(("Training loss", plots.line_plot(lines, y_label="loss")))
    for one in (column for column in columns if column.main):
        key, title = one.key, _axis(one)
        levels = [(row.label, _drawn(row.scores[key])) for row in rows if row.teacher and key in row.scores]
        lines = []
        for run in runs:
            seen = {n.step: _drawn(n) for n in run.numbers if n.model == STUDENT and n.key == key}
            lines.append((run.name, sorted(seen.items())))
        if any(len(points) > 1 for _, points in lines):
            found.append((f"{one.dataset}: {title}", plots.line_plot(lines, levels, y_label=title)))
    return found


def merge_galleries(runs: Sequence[Run], samples: Path | None) -> list[dict[str, Any]]:
    """One gallery for each set of texts and images, with the models of all its runs, teachers first.

    `right` is the share of a text's affinity that its own image has.
    """
    if samples:
        galleries = [(runs[0].name, read_object(samples, "gallery"))]
    else:
        galleries = [(run.name, own) for run in runs if (own := run.json(f"eval/{GALLERY}"))]
    merged: dict[str, dict[str, Any]] = {}
    for name, own in galleries:
        if not {"texts", "images", "models"} <= own.keys():
            raise UserError(f"{samples or name} is not a gallery; name a run's eval/{GALLERY}")
        one = merged.setdefault(json.dumps([own["texts"], own["images"]]), own | {"models": {}})
        for model, entry in own["models"].items():
            right = statistics.fmean(line[index] for index, line in enumerate(entry["affinity"]))
            one["models"].setdefault(name if model == STUDENT else model, entry | {"right": right})
    students = {name for name, _ in galleries}
    for one in merged.values():
        one["models"] = dict(sorted(one["models"].items(), key=lambda item: item[0] in students))
    return [*merged.values()]


def confusion(details: dict[str, Any]) -> tuple[list[list[float]], list[str]]:
    """Shares of each class's images by answer, and the classes: all, or those with most wrong images."""
    wrong = [seen - right for right, seen in details["per_class"]]
    shown = sorted(sorted(range(len(wrong)), key=lambda index: -wrong[index])[:_CONFUSED])
    place = {label: row for row, label in enumerate(shown)}
    rows = [[0.0] * len(shown) for _ in shown]
    for label, predicted, images in details["confusion"]:
        if label in place and predicted in place:
            rows[place[label]][place[predicted]] = images / details["per_class"][label][1]
    return rows, [details["classes"][index] for index in shown]


def millions(parameters: float | None) -> str:
    return "-" if parameters is None else f"{parameters:.2f} M"


def _inline(uri: str, file: str) -> str:
    if not uri.startswith("data:image/"):
        raise UserError(
            f"{file}: image {uri[:40]!r} is not a data:image/ URI: nothing is loaded from outside"
        )
    return uri


def _attributions(runs: Sequence[Run]) -> list[str]:
    files = [run.json(name) for name in ("data.json", f"eval/{PICTURES}") for run in runs]
    found = [str(line) for content in files for line in content.get("attributions", [])]
    for run in runs:
        config = run.path / "config.yaml"
        if config.is_file() and "emoji:" in config.read_text(encoding="utf-8"):
            found += LICENCES.values()
    return list(dict.fromkeys(found))


def _values(scores: dict[Key, Number]) -> dict[Key, float]:
    return {key: number.value for key, number in scores.items()}


def _axis(number: Number) -> str:
    return f"{number.label}, %" if number.unit == "share" else title_of(number)


def _drawn(number: Number) -> float:
    return 100 * number.value if number.unit == "share" else number.value
