"""The report: its numbers are the runs' numbers, it loads nothing, and bad input is told in one line."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scripts.report import markdown_table
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Result
from vlmkd.image_spec import ImageSpec
from vlmkd.page import gallery, plots, report
from vlmkd.page.gallery import write_gallery, write_mistakes
from vlmkd.results import FILE, Meaning, Number, details_of, numbers_of, parameters, share, write_results

ROOT = Path(__file__).parents[2]
TEACHER = "teacher <ViT & text>"
SHOWN = "<ViT & text>"
"""Its name in tables, which say that it is a teacher."""
TEACHER_SCORES = {"top1": 0.3661, "top5": 0.646, "image_to_text_r1": 0.254}
SIZES = {TEACHER: 4_600_000, "student": 1_150_000}
MEANINGS = {
    "top1": share("top-1", main=True),
    "top5": share("top-5"),
    "image_to_text_r1": share("image→text R@1", main=True),
    "photo_top1": share("photo top-1"),
    "harmonic_mean": share("harmonic mean"),
}


class Colours:
    """A dual encoder that sees mean colours: red, green and blue texts lie on the three axes."""

    logit_scale = 20.0
    image_spec = ImageSpec(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def __init__(self, name: str, swapped: bool = False) -> None:
        self.name = name
        self._order = [1, 0, 2] if swapped else [0, 1, 2]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(2, 3))[:, self._order], dim=1)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(3)[[["red", "green", "blue"].index(text) for text in texts]]


def scored(model: str, step: int, scores: dict[str, float], dataset: str = "unseen") -> list[Number]:
    result = Result("classification", dataset, scores, 9, meanings=MEANINGS)
    return numbers_of([result], run="run", model=model, step=step)


def write_run(folder: Path, scores: dict[str, float], *, dataset: str = "unseen", steps: int = 40) -> Path:
    """A run folder as `vlmkd.train.run` writes it; its last evaluation has `scores`."""
    (folder / "eval").mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        facts = {
            "loss": 5.0 / step,
            "samples_per_s": 100.0 + step,
            "peak_memory_mb": 1500.0,
            "skipped/corrupt_image": 3,
        }
        lines.append({"step": step, "time": 1000.0 + 6 * step, "kind": "train", **facts})
    half = {key: value / 2 for key, value in scores.items()}
    lines.append({"step": steps, "time": 2.0, "kind": "eval", "model": "student", "unseen/top1": 0.9})
    numbers = scored("student", steps // 2, half, dataset) + scored("student", steps, scores, dataset)
    numbers += scored(TEACHER, steps, TEACHER_SCORES)
    numbers += [parameters(count, run="run", model=model) for model, count in SIZES.items()]
    write_results(folder / FILE, numbers)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "command.txt").write_text("launch <config> run_dir=here\n")
    (folder / "env.json").write_text(json.dumps({"packages": {"torch": "2.99"}, "cpus": 2}))
    (folder / "data.json").write_text(json.dumps({"attributions": ["Pictures by A & B, CC BY 4.0"]}))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two runs with the same teacher and one gallery each."""
    monkeypatch.setattr(gallery, "RETRIEVED", 2)
    first = write_run(tmp_path / "inherited", {"top1": 0.21875, "top5": 0.5, "image_to_text_r1": 0.2})
    second = write_run(tmp_path / "scratch", {"top1": 0.125, "top5": 0.75, "image_to_text_r1": 0.1})
    images = [Image.new("RGB", (40, 20), colour) for colour in ("red", "lime", "blue")]
    for folder, swapped in ((first, False), (second, True)):
        models = {TEACHER: Colours("t"), "student": Colours("s", swapped)}
        write_gallery(folder / "eval/gallery.json", models, images, ["red", "green", "blue"])
    return [first, second]


class Page(HTMLParser):
    """Collects table rows (text and exact values), what the page would load, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str | None]]] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag == "tr":
            self.rows.append([])
        self.cell = self.cell or tag in ("td", "th")
        if tag in ("td", "th"):
            self.rows[-1].append(("", named.get("title")))

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            text, title = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, title)


def test_the_table_holds_the_runs_numbers(runs: list[Path], tmp_path: Path) -> None:
    text = report.build_report(runs, tmp_path / "page.html", title="Nano").read_text()
    rows = Page(text).rows
    assert [row[0][0] for row in rows if len(row) == 6][1:] == [
        "inherited",
        "scratch",
    ]  # what they took: the same
    rows = rows[:4]
    assert [cell for cell, _ in rows[0]] == ["model", "parameters", "top-1", "top-5", "image→text R@1"]
    assert [row[0][0] for row in rows[1:]] == [f"{SHOWN} teacher", "inherited", "scratch"]
    assert [row[1][0] for row in rows[1:]] == ["4.60 M", "1.15 M", "1.15 M"]
    assert [[cell for cell, _ in row[2:]] for row in rows[1:]] == [
        ["36.6", "64.6", "25.4"],
        ["21.9", "50.0", "20.0"],
        ["12.5", "75.0", "10.0"],
    ]
    assert [[float(exact or "nan") for _, exact in row[2:]] for row in rows[1:]] == [
        [0.3661, 0.646, 0.254],
        [0.21875, 0.5, 0.2],
        [0.125, 0.75, 0.1],
    ]


def test_the_page_loads_nothing(runs: list[Path], tmp_path: Path) -> None:
    text = report.build_report(runs, tmp_path / "page.html", title="Nano").read_text()
    page = Page(text)
    assert page.loads, "the pictures should be found"
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not re.search(r"url\((?!#)|@import", text)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)


def test_names_are_escaped_and_credits_shown(runs: list[Path], tmp_path: Path) -> None:
    text = report.build_report(runs, tmp_path / "page.html", title="A < B").read_text()
    assert "<title>A &lt; B</title>" in text
    assert "<ViT" not in text and "teacher &lt;ViT &amp; text&gt;" in text
    assert "Pictures by A &amp; B, CC BY 4.0" in text
    assert "launch &lt;config&gt; run_dir=here" in text
    assert "packages / torch" in text


def test_emoji_runs_credit_the_artists(runs: list[Path], tmp_path: Path) -> None:
    (runs[1] / "config.yaml").write_text("data: {sources: [{shards: ['emoji:train']}]}\n")
    text = report.build_report(runs, tmp_path / "page.html", title="Nano").read_text()
    for words in ("Twemoji", "CC BY 4.0", "OpenMoji", "CC BY-SA 4.0", "Noto Emoji", "SIL Open Font License"):
        assert words in text


def test_curves_pass_through_the_logged_values(runs: list[Path]) -> None:
    found = [report.read_run(folder) for folder in runs]
    rows = report.rows_of(found)
    columns = report.columns_of(rows)
    curves = dict(report.curve_plots(found, rows, columns))
    assert list(curves) == ["Training loss", "unseen: top-1, %", "unseen: image→text R@1, %"]
    drawn = {line.get_label(): line for line in curves["Training loss"].axes[0].lines}
    assert (
        list(drawn["inherited"].get_xdata()) == [10, 20, 30, 40] and drawn["scratch"].get_ydata()[-1] == 0.125
    )
    drawn = {line.get_label(): line for line in curves["unseen: top-1, %"].axes[0].lines}
    assert list(drawn["inherited"].get_ydata()) == [10.9375, 21.875]
    assert list(drawn[SHOWN].get_ydata()) == pytest.approx([36.61, 36.61])  # a level
    points = dict(report.size_plots(rows, columns))["unseen: top-1, %"].axes[0].lines
    assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == [
        (4.6, pytest.approx(36.61)),
        (1.15, 21.875),
        (1.15, 12.5),
    ]
    assert report.size_plots(rows[:1], columns) == []  # nothing to compare


def test_plots_follow_the_theme_and_are_the_same_for_the_same_numbers() -> None:
    lines = [("none", []), ("a <b>", [(1.0, 2.0), (2.0, math.nan), (3.0, 1.0)])]
    figures = [plots.line_plot(lines, [("t", 1.5)], y_label="loss") for _ in range(2)]
    first, second = (plots.svg(figure, "x & y") for figure in figures)
    assert (
        first == second
        and first.startswith('<svg class="chart" viewBox="')
        and 'aria-label="x &amp; y"' in first
    )
    assert "var(--series-1)" in first and "var(--ink-2)" in first and plots._MARK not in first
    assert "http" not in first.replace("http://www.w3.org/", "")


def test_affinity_is_the_softmax_of_scaled_cosines(runs: list[Path]) -> None:
    written = json.loads((runs[0] / "eval/gallery.json").read_text())
    own = math.exp(20.0) / (math.exp(20.0) + 2.0)
    for model in (TEACHER, "student"):
        for index, line in enumerate(written["models"][model]["affinity"]):
            assert line[index] == pytest.approx(own, abs=1e-5)
            assert sum(line) == pytest.approx(1.0, abs=1e-4)
    assert [line[0] for line in written["models"]["student"]["retrieved"]] == [0, 1, 2]
    # The second run's student takes red for green.
    swapped = json.loads((runs[1] / "eval/gallery.json").read_text())["models"]["student"]
    assert [line[0] for line in swapped["retrieved"]] == [1, 0, 2]


def test_right_and_wrong_pictures_are_marked(runs: list[Path], tmp_path: Path) -> None:
    text = report.build_report(runs, tmp_path / "page.html", title="Nano").read_text()
    # Two pictures a text and model: the teacher and the first student have 3 right ones each among 6, the second,
    # whose first two answers are swapped, finds "blue" first, and red and green second or not at all.
    cards = re.findall(r'<figure class="card">.*?</figure>', text, flags=re.S)
    assert len(cards) == 3
    hits = [re.findall(r'<span class="thumb (right|wrong)">', card) for card in cards]
    assert [marks[:4] for marks in hits] == [["right", "wrong", "right", "wrong"]] * 3
    assert hits[0][4] == hits[1][4] == "wrong" and hits[2][4] == "right"


def test_markdown_equals_the_inputs(runs: list[Path]) -> None:
    lines = markdown_table(runs).splitlines()
    assert lines[0] == "| model | parameters | unseen top-1 | unseen top-5 | unseen image→text R@1 |"
    assert lines[2] == f"| {SHOWN} (teacher) | 4.60 M | 36.6 | 64.6 | 25.4 |"
    assert lines[4] == "| scratch | 1.15 M | 12.5 | 75.0 | 10.0 |"


@pytest.mark.parametrize(
    ("value", "meaning", "name", "shown"),
    [
        (0.12345, share("top-1"), "top-1", "12.3"),
        (0.123456, Meaning("KL", "nats", higher_is_better=False), "KL", "0.1235"),
        (0.5, Meaning(), "made up", "0.5"),
        (3.0, Meaning(unit="count"), "made up", "3"),
        (21.5, Meaning("speed", "tokens/s"), "speed (tokens/s)", "21.5"),
    ],
)
def test_a_metric_brings_its_meaning_to_table_and_page(
    value: float, meaning: Meaning, name: str, shown: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", {"top1": 0.1})
    result = Result("own", "chat", {"made_up": value}, 9, meanings={"made_up": meaning})
    write_results(folder / FILE, numbers_of([result], run="run", model="student", step=40))
    assert (
        markdown_table([folder])
        == f"| model | parameters | chat {name} |\n|---|---:|---:|\n| run | - | {shown} |\n"
    )
    text = report.build_report([folder], tmp_path / "page.html", title="Own").read_text()
    best = ' class="top"' if meaning.higher_is_better is not None else ""
    assert f'<th scope="col">{name}</th>' in text and f'<td{best} title="{value}">{shown}</td>' in text


def test_the_best_is_the_least_where_less_is_better(runs: list[Path], tmp_path: Path) -> None:
    for folder, value in zip(runs, (1.0, 2.0), strict=True):
        loss = {"loss": Meaning("loss", "nats", higher_is_better=False, main=True)}
        result = Result("own", "chat", {"loss": value}, 9, meanings=loss)
        write_results(folder / FILE, numbers_of([result], run="run", model="student", step=40))
    text = report.build_report(runs, tmp_path / "page.html", title="Own").read_text()
    assert 'class="top" title="1.0"' in text and "<b>inherited</b> has 1 nats loss on chat." in text


def test_runs_of_earlier_versions_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"top1": 0.1})
    (folder / FILE).unlink()
    (folder / "eval/results.json").write_text("{}")
    with pytest.raises(UserError, match="run is of an earlier version"):
        report.read_run(folder)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"top1": 0.1})
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 50, "ti')
    assert [line["step"] for line in report.read_run(folder).train] == [10, 20, 30, 40]
    path.write_text('{"step": 50, "ti\n' + path.read_text())
    with pytest.raises(UserError, match="line 1"):
        report.read_run(folder)


def test_a_run_without_evaluation_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "kind": "train", "loss": null}\n')
    text = report.build_report([folder], tmp_path / "page.html", title="Young").read_text()
    assert "No evaluation has been written yet" in text


def test_pictures_from_outside_are_refused(runs: list[Path], tmp_path: Path) -> None:
    written = json.loads((runs[0] / "eval/gallery.json").read_text())
    written["images"][1] = "http://127.0.0.1/picture.png"
    (tmp_path / "bad.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="data:image/"):
        report.build_report(runs, tmp_path / "page.html", title="x", samples=tmp_path / "bad.json")
    assert not (tmp_path / "page.html").exists()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="bad.json is not a gallery"):
        report.build_report(runs, tmp_path / "page.html", title="x", samples=tmp_path / "bad.json")


def test_the_script_writes_both_files_and_refuses_a_wrong_folder(runs: list[Path], tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/report.py")]
    page, table = tmp_path / "out/page.html", tmp_path / "table.md"
    command = [*script, *map(str, runs), "--out", str(page), "--markdown", str(table)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert page.is_file() and table.read_text() == markdown_table(runs)
    result = subprocess.run(
        [*script, str(tmp_path / "nowhere")], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert "nowhere has no metrics.jsonl" in result.stderr and len(result.stderr.splitlines()) == 1


def classified(folder: Path, classes: int) -> Path:
    """A run with a classification of `classes` classes: every class confused once with the next, class 1 twice."""
    confusion = [[c, c, 3] for c in range(classes)] + [[c, (c + 1) % classes, 1] for c in range(classes)]
    confusion.append([1, 3, 1])
    seen = [4 + (c == 1) for c in range(classes)]
    mistakes = [{"key": "a/1.png", "label": 1, "predicted": 3, "probability": 0.975}]
    details = {
        "classes": [f"class <{c}>" for c in range(classes)],
        "per_class": [[3, number] for number in seen],
        "confusion": confusion,
        "mistakes": mistakes,
    }
    metrics = {"top1": 0.75, "photo_top1": 0.5, "harmonic_mean": 0.625}
    result = Result("classification", "pets", metrics, sum(seen), details)
    write_run(folder, metrics, dataset="pets")
    (folder / "eval/details.json").write_text(json.dumps(details_of({"student": [result]})))
    Image.new("RGB", (200, 100), "red").save(folder / "picture.png")
    item = Item("a/1.png", ImageRef(str(folder / "picture.png")), 1)
    write_mistakes(folder / "eval/mistakes.json", [result], {"pets": [item], "other": []})
    return folder


def test_confusion_matrix_and_worst_mistakes(tmp_path: Path) -> None:
    folder = classified(tmp_path / "run", 5)
    text = report.build_report([folder], tmp_path / "page.html", title="C").read_text()
    assert (
        "class &lt;1&gt; × class &lt;3&gt;: 0.200" in text
        and "class &lt;0&gt; × class &lt;0&gt;: 0.750" in text
    )
    assert text.count('title="class &lt;') == 30  # squares and their rows' names
    assert "class &lt;1&gt; → <b>class &lt;3&gt;</b>, 98\u00a0%" in text
    page = Page(text)
    assert [load for load in page.loads if not load.startswith("#")]
    assert all(load.startswith(("#", "data:image/png;base64,")) for load in page.loads)
    table = {cell for row in page.rows for cell, _ in row}
    assert {"photo top-1", "50.0", "harmonic mean", "62.5"} <= table


def test_the_exported_weights_are_the_ones_that_are_shown(tmp_path: Path) -> None:
    folder = classified(tmp_path / "run", 5)
    details = json.loads((folder / "eval/details.json").read_text())
    kept = details["student"]["pets"] | {"classes": [f"kept {c}" for c in range(5)]}
    (folder / "eval/details.json").write_text(json.dumps(details | {"SWAD": {"pets": kept}}))
    numbers = scored("student", 40, {"top1": 0.75}, "pets") + scored("SWAD", 40, {"top1": 0.875}, "pets")
    numbers += scored(TEACHER, 40, TEACHER_SCORES) + [parameters(7_000_000, run="run", model="student")]
    write_results(folder / FILE, numbers)
    (folder / "eval/models.json").write_text(json.dumps({"exported": "SWAD", "selections": ["SWAD"]}))
    assert report.main_set([report.read_run(folder)]) == "pets"
    rows = report.rows_of([report.read_run(folder)])
    assert [(row.label, row.teacher, row.exported) for row in rows] == [
        (SHOWN, True, True), ("run", False, True), ("run, last step", False, False)
    ]  # fmt: skip
    assert [row.scores["pets", "top1"].value for row in rows[1:]] == [0.875, 0.75]
    assert rows[1].parameters == 7
    text = report.build_report([folder], tmp_path / "page.html", title="C").read_text()
    assert "kept 0" in text and "<b>run</b> has 87.5\u00a0% top-1 on pets" in text


def test_a_large_confusion_matrix_shows_the_classes_with_most_wrong_images(tmp_path: Path) -> None:
    folder = classified(tmp_path / "run", 60)
    text = report.build_report([folder], tmp_path / "page.html", title="C").read_text()
    assert "the 40 of 60 classes with most wrong images" in text
    assert "× class &lt;1&gt;:" in text and "× class &lt;50&gt;:" not in text


def test_a_mistake_that_loads_from_outside_is_refused(tmp_path: Path) -> None:
    folder = classified(tmp_path / "run", 5)
    path = folder / "eval/mistakes.json"
    content = json.loads(path.read_text())
    content["pets"][0]["image"] = "https://example.org/x.png"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a data:image/ URI"):
        report.build_report([folder], tmp_path / "page.html", title="C")
