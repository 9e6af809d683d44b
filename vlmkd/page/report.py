"""Run folders -> one self-contained HTML page and one Markdown table.

Reads what every run writes (`metrics.jsonl`, `eval/*.json`, `eval/gallery.json`, `env.json`, `command.txt`,
`data.json`) and loads no model. `write_gallery` makes the gallery, while models are at hand, and `write_mistakes` the
pictures of a classifier's worst mistakes.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import statistics
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmkd.errors import UserError
from vlmkd.files import read_object, read_text, write_text
from vlmkd.page import charts
from vlmkd.page.charts import Series

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from vlmkd.data.labelled import Item
    from vlmkd.evaluation.base import Result
    from vlmkd.predictors import DualEncoder

STUDENT = "student"
GALLERY, MISTAKES, MODELS = "gallery.json", "mistakes.json", "models.json"
_CONFUSED = 40
"""Classes of a confusion matrix; of a larger set those with most wrong images."""

_METRIC_NAMES = (
    (re.compile(r"^top_?(\d+)$"), r"top-\1"),
    (re.compile(r"^(.+)_top_?(\d+)$"), r"\1 top-\2"),
    (re.compile(r"^(?:image_to_text|i2t)_(?:r|recall)?@?_?(\d+)$"), r"image→text R@\1"),
    (re.compile(r"^(?:text_to_image|t2i)_(?:r|recall)?@?_?(\d+)$"), r"text→image R@\1"),
)
_SHARE = re.compile(
    r"top_?\d+$|recall|(^|_)r@?\d+$|(i2t|t2i|to_text|to_image)|accuracy|agreement|mean_per_class|harmonic_mean"
)


@dataclass(kw_only=True)
class Run:
    """What a run folder says about its run."""

    name: str
    folder: Path
    train: list[dict[str, Any]] = field(default_factory=list)
    """Train lines of metrics.jsonl, by step."""
    evals: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    """Model name -> step -> scores by `dataset/metric`."""
    final: dict[str, dict[str, float]] = field(default_factory=dict)
    """Model name -> final scores by `dataset/metric`."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Model name -> number of parameters, where known."""
    gallery: dict[str, Any] | None = None
    exported: str = STUDENT
    """Which weights of the student are in the run's export: the last ones, or those of a selection."""
    selections: list[str] = field(default_factory=list)
    """Names of other weights of the student than the last ones."""
    classified: list[dict[str, Any]] = field(default_factory=list)
    """Final results of the exported weights that have a confusion matrix."""
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)
    """Data set -> what was fitted on it for the exported weights and scores nothing."""
    mistakes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Data set -> its worst mistakes with their pictures."""
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    command: str = ""


@dataclass(kw_only=True)
class Row:
    """One model of the results table."""

    label: str
    teacher: bool
    color: int
    """Series colour: -1 for teachers, else the number of the run."""
    scores: dict[str, float]
    parameters: int | None
    exported: bool = True
    """False for weights of a student that are not in its run's export."""


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: no metrics.jsonl there, or a line that is not JSON (the last one may be torn by a kill).
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} has no metrics.jsonl; give the folder of a run (run_dir=...) that has logged a step"
        )
    run = Run(name=folder.resolve().name, folder=folder)
    by_step: dict[int, dict[str, Any]] = {}
    for line in _json_lines(path):
        if line.get("kind") == "train":
            by_step[int(line["step"])] = line
        elif line.get("kind") == "eval":
            scores = {key: float(value) for key, value in line.items() if "/" in key and _is_number(value)}
            steps = run.evals.setdefault(str(line.get("model", STUDENT)), {})
            steps.setdefault(int(line["step"]), {}).update(scores)
    run.train = [by_step[step] for step in sorted(by_step)]
    run.final = {model: dict(steps[max(steps)]) for model, steps in run.evals.items()}
    _read_evaluations(run)
    run.environment = _read_object(folder / "env.json")
    run.data = _read_object(folder / "data.json")
    command = folder / "command.txt"
    run.command = read_text(command, "command").strip() if command.is_file() else ""
    return run


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Teachers first, each once; then the student of every run, in the order of `runs`."""
    rows: list[Row] = []
    for run in runs:
        for model, scores in run.final.items():
            parameters = run.parameters.get(model)
            if model in (STUDENT, *run.selections):
                continue
            name = model.removeprefix("teacher ")  # which its column says
            same_name = [row for row in rows if row.label == name]
            if any(row.scores == scores for row in same_name):
                continue
            label = name if not same_name else f"{name} ({run.name})"
            rows.append(Row(label=label, teacher=True, color=-1, scores=scores, parameters=parameters))
    for index, run in enumerate(runs):
        parameters = run.parameters.get(STUDENT)
        own = [model for model in (STUDENT, *run.selections) if model in run.final]
        for model in sorted(own, key=lambda model: model != run.exported):
            exported = model == run.exported
            label = run.name if exported else f"{run.name}, {'last step' if model == STUDENT else model}"
            rows.append(
                Row(
                    label=label,
                    teacher=False,
                    color=index,
                    scores=run.final[model],
                    parameters=parameters,
                    exported=exported,
                )
            )
    return rows


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The `dataset/metric` keys of `rows`, data sets together, in the order in which they were written."""
    keys = list(dict.fromkeys(key for row in rows for key in row.scores))
    datasets = list(dict.fromkeys(_dataset(key) for key in keys))
    return [key for dataset in datasets for key in keys if _dataset(key) == dataset]


def markdown_table(run_dirs: Sequence[Path]) -> str:
    """Models x test sets as a Markdown table; shares in per cent, `-` where a model was not evaluated."""
    rows = rows_of([read_run(folder) for folder in run_dirs])
    keys = columns_of(rows)
    head = ["model", "parameters", *(f"{_dataset(key)} {metric_name(key)}" for key in keys)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [row.label + (" (teacher)" if row.teacher else ""), _millions(row.parameters)]
        cells += [format_score(key, row.scores.get(key)) for key in keys]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def build_report(run_dirs: Sequence[Path], out: Path, *, title: str, samples: Path | None = None) -> Path:
    """Write one HTML page about `run_dirs` to `out`; it loads nothing from outside. Returns `out`.

    Args:
        run_dirs: run folders; each is one line in the curves and one row of the table.
        title: heading of the page.
        samples: a gallery file instead of the runs' own `eval/gallery.json`.

    Raises:
        UserError: no run, a folder without metrics, or a gallery that is not one.
    """
    if not run_dirs:
        raise UserError("no run folder was given; name at least one, e.g. runs/tinyclip_nano")
    runs = [read_run(folder) for folder in run_dirs]
    if samples is not None:
        runs[0].gallery = _read_gallery(samples)
        for run in runs[1:]:
            run.gallery = None
    rows = rows_of(runs)
    galleries = merge_galleries(runs)
    body = [
        _header(title, rows, main_set(runs)),
        _table_section(rows),
        _size_section(rows),
        _curve_section(runs, rows),
        *(_classifier_section(run) for run in runs),
        *(_gallery_section(gallery, index) for index, gallery in enumerate(galleries)),
        _run_section(runs),
        _attribution_section(runs, galleries),
    ]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(part for part in body if part))
    write_text(out, page, "--out")
    return out


def write_gallery(
    path: Path,
    predictors: dict[str, DualEncoder],
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    targets: Sequence[Sequence[int]] | None = None,
    parameters: dict[str, int] | None = None,
    top: int = 5,
    device: torch.device | None = None,
) -> None:
    """Write how each model relates `texts` to `images`: affinities, and the images it retrieves for a text.

    The affinity of text i to image j is softmax over j of logit_scale * cosine: TinyCLIP's text-to-image affinity.

    Args:
        predictors: models by name, teachers first.
        images: M pictures; stored as PNG of at most 96 pixels.
        texts: N texts.
        targets: for each text the indexes of its right images; None: text i belongs to image i.
        parameters: number of parameters by model name, where known.
        top: images retrieved for a text.
        device: where the models are; None: the CPU.

    Raises:
        ValueError: N texts without as many targets, or an index outside the images.
    """
    import torch  # here, because pages are made without it

    from vlmkd.data.transforms import eval_transform

    right = (
        [list(indexes) for indexes in targets]
        if targets is not None
        else [[index] for index in range(len(texts))]
    )
    if len(right) != len(texts) or any(not 0 <= index < len(images) for line in right for index in line):
        raise ValueError(f"{len(texts)} texts and {len(images)} images do not fit targets {right}")
    models: dict[str, dict[str, Any]] = {}
    for name, predictor in predictors.items():
        transform = eval_transform(predictor.image_spec)
        with torch.no_grad():
            batch = torch.stack([transform(image) for image in images]).to(device)
            image_embeds = predictor.encode_image(batch).float()
            text_embeds = predictor.encode_text(list(texts)).float()
        similarity = text_embeds @ image_embeds.T
        affinity = torch.softmax(float(predictor.logit_scale) * similarity, dim=1)
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :top]
        models[name] = {
            "affinity": [[round(value, 5) for value in line] for line in affinity.tolist()],
            "retrieved": order.tolist(),
        }
        if parameters is not None and name in parameters:
            models[name]["parameters"] = parameters[name]
    gallery = {
        "texts": list(texts),
        "images": [_data_uri(image) for image in images],
        "targets": right,
        "models": models,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(gallery))


def write_mistakes(path: Path, results: Sequence[Result], items: Mapping[str, Sequence[Item]]) -> None:
    """Write the worst mistakes of classification results with their pictures (PNG of at most 96 pixels).

    `items` has the images of data sets; results of others, and results without mistakes, are left out.
    """
    from PIL import Image  # here, because pages are made without it

    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "mistakes" not in result.details or result.dataset not in items:
            continue
        images = {item.key: item.image for item in items[result.dataset]}
        names = result.details["classes"]
        found[result.dataset] = [
            {
                "label": names[mistake["label"]],
                "predicted": names[mistake["predicted"]],
                "probability": mistake["probability"],
                "key": mistake["key"],
                "image": _data_uri(Image.open(io.BytesIO(images[mistake["key"]].read()))),
            }
            for mistake in result.details["mistakes"]
        ]
    if found:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))


def merge_galleries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One gallery for each set of texts and images, with the models of all runs that share it.

    A run's student takes the run's name; teachers stand once.
    """
    merged: list[dict[str, Any]] = []
    for run in runs:
        if run.gallery is None:
            continue
        same = [
            item
            for item in merged
            if item["texts"] == run.gallery["texts"] and item["images"] == run.gallery["images"]
        ]
        if not same:
            same = [run.gallery | {"models": {}}]
            merged.append(same[0])
        for model, entry in run.gallery["models"].items():
            same[0]["models"].setdefault(run.name if model == STUDENT else model, entry)
    for item in merged:
        names = [run.name for run in runs]
        item["models"] = dict(
            sorted(
                item["models"].items(), key=lambda entry: names.index(entry[0]) if entry[0] in names else -1
            )
        )
    return merged


def metric_name(key: str) -> str:
    """How tables call the metric of a `dataset/metric` key."""
    name = key.rpartition("/")[2]
    for pattern, shown in _METRIC_NAMES:
        if pattern.match(name):
            return pattern.sub(shown, name)
    return name.replace("_", " ")


def format_score(key: str, value: float | None) -> str:
    """A score as tables show it: shares as per cent with one decimal."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if _is_share(key) else charts.number(value)


def mean_and_spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """`mean ± standard deviation` of one value a seed, each as `show` writes it; a single value alone."""
    mean = show(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {show(statistics.stdev(values))}"


def _header(title: str, rows: Sequence[Row], dataset: str) -> str:
    """Heading, and the best student beside the best teacher in one sentence."""
    return f"<header><h1>{escape(title)}</h1>{_headline(rows, dataset)}</header>"


def main_set(runs: Sequence[Run]) -> str:
    """The first data set with a confusion matrix, a validation split only if there is no other; empty: none."""
    names = [result["dataset"] for run in runs for result in run.classified]
    return min(names, key=lambda name: name.endswith("_val"), default="")


def _headline(rows: Sequence[Row], dataset: str) -> str:
    keys = [key for key in columns_of(rows) if metric_name(key) == "top-1"]
    key = next((key for key in keys if _dataset(key) == dataset), keys[0] if keys else None)
    teachers = [row for row in rows if row.teacher and key in row.scores]
    students = [row for row in rows if row.exported and not row.teacher and key in row.scores]
    if key is None or not students:
        return ""
    student = max(students, key=lambda row: row.scores[key])
    text = f"<b>{escape(student.label)}</b> has {format_score(key, student.scores[key])}\u00a0% top-1 on {escape(_dataset(key))}"
    if teachers:
        teacher = max(teachers, key=lambda row: row.scores[key])
        text += f"; its teacher <b>{escape(teacher.label)}</b> has {format_score(key, teacher.scores[key])}\u00a0%"
        if student.parameters and teacher.parameters:
            text += f" with {teacher.parameters / student.parameters:.1f} times the parameters"
    return f'<p class="lead">{text}.</p>'


def _table_section(rows: Sequence[Row]) -> str:
    """One table for each data set: a page is seldom wide enough for the columns of two."""
    keys = columns_of(rows)
    if not keys:
        return _section("Results", "<p>No evaluation has been written yet.</p>")
    tables = []
    for dataset in dict.fromkeys(_dataset(key) for key in keys):
        shown = [key for key in keys if _dataset(key) == dataset]
        tables.append(f"<h3>{escape(dataset)}</h3>{_results_table(rows, shown)}")
    note = "Accuracies and recalls in per cent; the best student is bold. Rest the pointer on a number for all digits."
    return _section("Results", "".join(tables) + f'<p class="note">{note}</p>')


def _results_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    names = "".join(f'<th scope="col">{escape(metric_name(key))}</th>' for key in keys)
    students = [row for row in rows if not row.teacher]
    best = {key: max((row.scores.get(key, -math.inf) for row in students), default=None) for key in keys}
    lines = []
    for row in rows:
        role = " <i>teacher</i>" if row.teacher else ""
        cells = [f'<th scope="row">{_dot(row.color)}{_breakable(row.label)}{role}</th>']
        cells.append(f"<td>{_millions(row.parameters)}</td>")
        for key in keys:
            value = row.scores.get(key)
            winner = _is_share(key) and not row.teacher and value is not None and value == best[key]
            mark = ' class="top"' if winner else ""
            exact = f' title="{value!r}"' if value is not None else ""
            cells.append(f"<td{mark}{exact}>{format_score(key, value)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = f'<tr><th scope="col">model</th><th scope="col">parameters</th>{names}</tr>'
    return (
        f'<div class="scroll"><table class="results"><thead>{head}</thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _size_section(rows: Sequence[Row]) -> str:
    figures = []
    for key in _primary(columns_of(rows)):
        points = [
            Series(name=row.label, points=[(float(row.parameters), 100 * row.scores[key])], color=row.color)
            for row in rows
            if row.parameters and key in row.scores
        ]
        if points:
            chart = charts.scatter_chart(
                points, x_label="million parameters", y_label=f"{metric_name(key)}, %", unit=1e6
            )
            figures.append(_figure(chart, f"{_dataset(key)}: {metric_name(key)}, %"))
    if not figures:
        return ""
    return _section("Accuracy against parameters", f'<div class="grid">{"".join(figures)}</div>')


def _curve_section(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    legend = "".join(
        f"<li>{_dot(index)}{escape(run.name)}</li>"
        for index, run in enumerate(runs)
        if run.train or run.evals
    )
    teachers = [row for row in rows if row.teacher]
    if teachers:
        legend += f"<li>{_dot(-1)}teacher</li>"
    losses = [
        Series(name=run.name, points=_points(run.train, "loss"), color=index)
        for index, run in enumerate(runs)
    ]
    figures = []
    if any(series.points for series in losses):
        figures.append(_figure(charts.line_chart(losses, x_label="step", y_label="loss"), "Training loss"))
    for key in _primary(columns_of(rows)):
        lines = [
            Series(name=row.label, points=[(0.0, 100 * row.scores[key])], color=-1, level=True)
            for row in teachers
            if key in row.scores
        ]
        for index, run in enumerate(runs):
            steps = run.evals.get(STUDENT, {})
            points = [(float(step), 100 * steps[step][key]) for step in sorted(steps) if key in steps[step]]
            lines.append(Series(name=run.name, points=points, color=index))
        if any(
            len(line.points) > 1 for line in lines
        ):  # a set that is seen at the end only has its place in the table
            chart = charts.line_chart(lines, x_label="step", y_label=f"{metric_name(key)}, %")
            figures.append(_figure(chart, f"{_dataset(key)}: {metric_name(key)}, %"))
    if not figures:
        return ""
    note = '<p class="note">Losses of different recipes are different quantities: compare their shapes, not their heights.</p>'
    return _section(
        "Curves",
        f'<ul class="legend">{legend}</ul><div class="grid">{"".join(figures)}</div>{note if len(runs) > 1 else ""}',
    )


def _gallery_section(gallery: dict[str, Any], number: int) -> str:
    """Affinity matrices side by side, then retrieved images for each text, one row a model."""
    ids = [f"g{number}i{index}" for index in range(len(gallery["images"]))]
    # Stored once; every chart and thumbnail refers to it.
    symbols = "".join(
        f'<symbol id="{name}" viewBox="0 0 72 72"><image width="72" height="72" href="{escape(uri)}"/></symbol>'
        for name, uri in zip(ids, gallery["images"], strict=True)
    )
    store = f'<svg width="0" height="0" class="store" aria-hidden="true">{symbols}</svg>'
    maps = []
    for model, entry in gallery["models"].items():
        right = _mean_right(entry["affinity"], gallery["targets"])
        chart = charts.heat_map(entry["affinity"], gallery["texts"], ids, label=f"affinity of {model}")
        maps.append(
            _figure(chart, f"{model}: {100 * right:.0f} % of a text's affinity falls on its own picture")
        )
    note = (
        "Each row is a text, each column a picture; a cell is the share of the text's affinity that the picture gets "
        "(softmax of the scaled cosines over the row; drawn with the square root as opacity). The ring marks the strongest cell of a row. A student that mimics "
        "its teacher shows the same pattern, mistakes included."
    )
    affinity = _section(
        "Affinity matrices", store + f'<div class="grid wide">{"".join(maps)}</div><p class="note">{note}</p>'
    )
    cards = [_retrieval_card(gallery, index, ids) for index in range(len(gallery["texts"]))]
    shown, more = cards[:12], cards[12:]
    rest = (
        f'<details><summary>{len(more)} more texts</summary><div class="grid">{"".join(more)}</div></details>'
        if more
        else ""
    )
    return affinity + _section("Retrieved pictures", f'<div class="grid">{"".join(shown)}</div>{rest}')


def _classifier_section(run: Run) -> str:
    """Confusion matrix and worst mistakes of a run's exported student on each of its classification sets."""
    parts = []
    for result in run.classified:
        details, dataset = result["details"], result["dataset"]
        rows, shown = _confusion(details)
        names = [details["classes"][index] for index in shown]
        chart = charts.heat_map(rows, names, [], label=f"confusion matrix on {dataset}", column_names=names)
        picked = f", the {len(shown)} of {len(details['classes'])} classes with most wrong images"
        title = (
            f"{dataset}: true class (row) and answers{picked if len(shown) < len(details['classes']) else ''}"
        )
        cards = "".join(_mistake_card(mistake) for mistake in run.mistakes.get(dataset, []))
        parts.append(f'<div class="grid wide">{_figure(chart, title)}</div>')
        if cards:
            parts.append(f"<h3>{escape(dataset)}: most confident mistakes</h3>")
            parts.append(f'<div class="mistakes">{cards}</div>')
    if not parts:
        return ""
    for dataset, values in run.chosen.items():
        numbers = ", ".join(f"{name} {charts.number(value)}" for name, value in values.items())
        parts.insert(0, f"<p>Chosen on {escape(dataset)}: {escape(numbers)}.</p>")
    note = (
        "A square is the share of a class's images that got the column's answer (drawn with the square root as opacity); "
        "columns are in the order of the rows, so that right answers lie on the diagonal. The ring marks a row's strongest."
    )
    return _section(f"Answers of {escape(run.name)}", "".join(parts) + f'<p class="note">{note}</p>')


def _confusion(details: dict[str, Any]) -> tuple[list[list[float]], list[int]]:
    """Shares of each shown class's images by answer, and the classes: all, or those with most wrong images."""
    wrong = [seen - right for right, seen in details["per_class"]]
    shown = sorted(sorted(range(len(wrong)), key=lambda index: -wrong[index])[:_CONFUSED])
    place = {label: row for row, label in enumerate(shown)}
    rows = [[0.0] * len(shown) for _ in shown]
    for label, predicted, images in details["confusion"]:
        if label in place and predicted in place:
            rows[place[label]][place[predicted]] = images / details["per_class"][label][1]
    return rows, shown


def _mistake_card(mistake: dict[str, Any]) -> str:
    text = f"{escape(mistake['label'])} → <b>{escape(mistake['predicted'])}</b>, {100 * mistake['probability']:.0f}\u00a0%"
    return (
        f'<figure class="card" title="{escape(mistake["key"])}"><img src="{escape(mistake["image"])}" alt=""/>'
        f"<p>{text}</p></figure>"
    )


def _retrieval_card(gallery: dict[str, Any], index: int, ids: list[str]) -> str:
    right = set(gallery["targets"][index])
    lines = []
    for model, entry in gallery["models"].items():
        thumbs = []
        for image in entry["retrieved"][index]:
            good = image in right
            thumbs.append(
                f'<span class="thumb {"right" if good else "wrong"}"><svg viewBox="0 0 72 72" role="img" '
                f'aria-label="picture {image + 1}, {"right" if good else "wrong"}"><use href="#{ids[image]}"/></svg>'
                f"<b>{'✓' if good else '✗'}</b></span>"
            )
        lines.append(f'<div class="hits"><span>{_breakable(model)}</span><div>{"".join(thumbs)}</div></div>')
    return f'<figure class="card"><figcaption>“{escape(gallery["texts"][index])}”</figcaption>{"".join(lines)}</figure>'


def _run_section(runs: Sequence[Run]) -> str:
    """What it took, the commands, and where they ran."""
    lines = []
    for index, run in enumerate(runs):
        if not run.train:
            continue
        first, last = run.train[0], run.train[-1]
        rates = sorted(line["samples_per_s"] for line in run.train if _is_number(line.get("samples_per_s")))
        memory = [line["peak_memory_mb"] for line in run.train if _is_number(line.get("peak_memory_mb"))]
        skipped = sum(
            value for name, value in last.items() if name.startswith("skipped/") and _is_number(value)
        )
        cells = [
            f'<th scope="row">{_dot(index)}{escape(run.name)}</th>',
            f"<td>{last['step']}</td>",
            f"<td>{(last.get('time', 0) - first.get('time', 0)) / 60:.1f}</td>",
            f"<td>{rates[len(rates) // 2]:.0f}</td>" if rates else "<td>-</td>",
            f"<td>{max(memory):,.0f}</td>" if memory else "<td>-</td>",
            f"<td>{skipped:.0f}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("run", "steps", "minutes", "samples/s (median)", "peak memory, MB", "skipped samples")
    )
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    commands = "".join(
        f"<h3>{escape(run.name)}</h3><pre>{escape(run.command)}</pre>" for run in runs if run.command
    )
    places = "".join(
        f"<details><summary>Environment of {escape(run.name)}</summary><dl>{_definitions(run.environment)}</dl></details>"
        for run in runs
        if run.environment
    )
    return _section("Runs, commands and environment", (table if lines else "") + commands + places)


def _attribution_section(runs: Sequence[Run], galleries: Sequence[dict[str, Any]]) -> str:
    lines = [
        str(line)
        for source in (*(run.data for run in runs), *galleries)
        for line in source.get("attributions", [])
    ]
    for run in runs:
        config = run.folder / "config.yaml"
        if config.is_file() and "emoji:" in config.read_text(encoding="utf-8"):
            from vlmkd.datasets.emoji.catalog import TABLES  # here: other reports need none of its packages

            lines += TABLES["licences"].values()
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(lines))
    return _section("Data and attributions", f"<ul>{items}</ul>")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _figure(chart: str, caption: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def _dot(color: int) -> str:
    return f'<span class="dot" style="background:{charts.color_of(color)}"></span>'


def _breakable(name: str) -> str:
    """`name` with leave to break after underscores."""
    return escape(name).replace("_", "_<wbr>")


def _definitions(values: dict[str, Any], prefix: str = "") -> str:
    """Nested facts as a flat definition list."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines.append(_definitions(value, f"{prefix}{name} / "))
        else:
            lines.append(f"<dt>{escape(prefix + str(name))}</dt><dd>{escape(str(value))}</dd>")
    return "".join(lines)


def _primary(keys: Iterable[str]) -> list[str]:
    """For each data set top-1 and image-to-text recall at 1, which are what charts show."""
    return [key for key in keys if metric_name(key) in ("top-1", "image→text R@1")]


def _dataset(key: str) -> str:
    return key.rpartition("/")[0]


def _is_share(key: str) -> bool:
    return bool(_SHARE.search(key.rpartition("/")[2]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[name])) for line in lines if _is_number(line.get(name))]


def _millions(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.2f} M"


def _mean_right(affinity: list[list[float]], targets: list[list[int]]) -> float:
    """Mean over texts of the affinity on their right images."""
    return sum(
        sum(line[index] for index in right) for line, right in zip(affinity, targets, strict=True)
    ) / len(targets)


def _read_evaluations(run: Run) -> None:
    """Final scores and parameter counts from `eval/*.json`, the gallery, and the exported weights."""
    models = _read_object(run.folder / "eval" / MODELS)
    run.exported, run.selections = models.get("exported", STUDENT), models.get("selections", [])
    run.parameters |= models.get("parameters", {})
    for path in sorted((run.folder / "eval").glob("*.json")):
        if path.name == MODELS:
            continue
        if path.name == GALLERY:
            run.gallery = _read_gallery(path)
            continue
        if path.name == MISTAKES:
            run.mistakes = _read_object(path)
            _refuse_foreign_images(path, [one["image"] for found in run.mistakes.values() for one in found])
            continue
        for model, results in _read_object(path).items():
            for result in results if isinstance(results, list) else []:
                if model == run.exported and "confusion" in result.get("details", {}):
                    run.classified.append(result)
                if model == run.exported and result.get("chosen"):
                    run.chosen[result["dataset"]] = result["chosen"]
                for metric, value in result["metrics"].items():
                    if metric == "parameters":
                        run.parameters[model] = int(value)
                    elif _is_number(value) and result["dataset"]:
                        run.final.setdefault(model, {})[f"{result['dataset']}/{metric}"] = float(value)
    for model, entry in run.gallery["models"].items() if run.gallery else ():
        if "parameters" in entry:
            run.parameters.setdefault(model, int(entry["parameters"]))
    weights = sorted((run.folder / "export").glob("*.safetensors"))
    if weights and STUDENT not in run.parameters:
        run.parameters[STUDENT] = sum(_count_weights(path) for path in weights)


def _count_weights(path: Path) -> int:
    """Number of floating-point values in a safetensors file, from its header alone."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    floats = [entry for name, entry in header.items() if name != "__metadata__" and "F" in entry["dtype"]]
    return sum(math.prod(entry["shape"]) for entry in floats)


def _read_gallery(path: Path) -> dict[str, Any]:
    gallery = _read_object(path)
    missing = {"texts", "images", "models"} - gallery.keys()
    if missing:
        raise UserError(
            f"{path} is not a gallery: {', '.join(sorted(missing))} is missing; write it with write_gallery"
        )
    _refuse_foreign_images(path, gallery["images"])
    gallery.setdefault("targets", [[index] for index in range(len(gallery["texts"]))])
    return gallery


def _refuse_foreign_images(path: Path, uris: Iterable[str]) -> None:
    foreign = [uri[:40] for uri in uris if not uri.startswith("data:image/")]
    if foreign:
        raise UserError(
            f"{path}: image {foreign[0]!r} is not a data:image/ URI; the page would load it from outside"
        )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    return read_object(path, "result file")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path, "metrics").splitlines()
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError
            values.append(value)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path} line {number} is not valid JSON; remove that line") from None
    return values


def _data_uri(image: Image.Image, side: int = 96) -> str:
    """`image` as an inline PNG that fits a square of `side` pixels."""
    small = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P") else "RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1d2127; --ink-2: #5c6470; --line: #dcdad5;
  --accent: #1f5fbf; --good: #1a7f4b; --bad: #b83232;
  --series-0: #1f6fd0; --series-1: #d4621e; --series-2: #16876b; --series-3: #9a45b5; --series-4: #a8820f; --series-5: #c23b6b; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1c2026; --ink: #e9e7e3; --ink-2: #a2a9b4;
  --line: #343a43; --accent: #78aef5; --good: #52c48a; --bad: #f07f7f;
  --series-0: #6aa9f7; --series-1: #f29354; --series-2: #4cc3a2; --series-3: #c98ae0; --series-4: #d9b748; --series-5: #ef7ba3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; }
h3 { font-size: 1rem; margin: 20px 0 6px; }
.lead { font-size: 1.05rem; max-width: 70ch; margin: 6px 0 0; }
.note { color: var(--ink-2); font-size: .875rem; max-width: 80ch; }
.scroll { overflow-x: auto; padding-bottom: 1px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; background: var(--card); }
th, td { padding: 6px 10px; border: 1px solid var(--line); text-align: right; white-space: nowrap; font-weight: 400; }
thead th { color: var(--ink-2); text-align: center; font-size: .8rem; white-space: normal; line-height: 1.25; }
tbody th { text-align: left; white-space: normal; min-width: 130px; }
.results th:first-child { position: sticky; left: 0; background: var(--card); }
tbody th i { color: var(--ink-2); font-size: .8rem; }
td.top { font-weight: 700; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.legend { list-style: none; padding: 0; margin: 0 0 12px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
figcaption { font-size: .9rem; margin-bottom: 8px; overflow-wrap: anywhere; }
svg.chart, svg.heat { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink-2); }
svg text.mark { fill: var(--ink); }
svg text.row { font-size: 9.5px; }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--ink-2); }
svg .hover { fill: transparent; }
svg.heat rect { fill: var(--accent); }
svg.heat rect.ground { fill: var(--line); fill-opacity: .35; }
svg.heat rect.best { stroke: var(--ink); stroke-width: 1; }
.store { position: absolute; }
.card figcaption { font-weight: 600; }
.hits { display: grid; grid-template-columns: 100px 1fr; gap: 8px; align-items: center; margin-top: 8px; }
.hits > span { font-size: .8rem; color: var(--ink-2); overflow-wrap: anywhere; line-height: 1.2; }
.hits > div { display: flex; gap: 6px; }
.thumb { position: relative; flex: 0 1 48px; background: #fff; border: 2px solid var(--line); border-radius: 6px; padding: 2px; }
.thumb svg { display: block; width: 100%; aspect-ratio: 1; }
.thumb b { position: absolute; right: -5px; bottom: -7px; font-size: 11px; line-height: 1; padding: 2px 3px; border-radius: 8px;
  background: var(--card); border: 1px solid currentColor; }
.thumb.right { border-color: var(--good); } .thumb.right b { color: var(--good); }
.thumb.wrong b { color: var(--bad); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 10px; }
.mistakes img { width: 72px; height: 72px; object-fit: contain; background: #fff; }
.mistakes p { font-size: .8rem; line-height: 1.25; margin: 6px 0 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; overflow-x: auto;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 12px 0; } summary { cursor: pointer; } details .grid { margin-top: 12px; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 2px 16px; font-size: .85rem; }
dt { color: var(--ink-2); } dd { margin: 0; overflow-wrap: anywhere; }
"""
