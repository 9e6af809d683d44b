"""Runs named METHOD_LABELS_sSEED in one folder -> a table of methods by labels: mean and standard deviation over seeds.

  python -m projects.dho.table runs/dho_nano [--dataset NAME] [--teacher OUTPUTS CLASSES] [--markdown table.md]

--teacher adds a line with the accuracy of the teacher whose embeddings of the test images lie in OUTPUTS (embed_labelled.py
--splits test) and whose class vectors are CLASSES. A second table has the mean gradient cosine of the runs that measured it (backbone / heads). Only finished runs count.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.errors import UserError, run_tool
from vlmkd.files import read_object, read_text, write_text
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.page.report import mean_and_spread

_NAME = re.compile(r"(?P<method>.+)_(?P<labels>\d+shot|\d+pct|none)_s(?P<seed>\d+)$")
_COSINES = ("gradient_cosine/backbone", "gradient_cosine/heads")
Cells = dict[tuple[str, str], list[float]]


def read_runs(folder: Path, dataset: str) -> tuple[Cells, dict[str, Cells]]:
    """Test top-1 in per cent by (method, labels), one entry a seed; and the mean of each cosine.

    Raises:
        UserError: no finished run.
    """
    scores: Cells = defaultdict(list)
    cosines: dict[str, Cells] = {name: defaultdict(list) for name in _COSINES}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.match(path.name)
        if match is None or not (path / "done.json").is_file():
            continue
        cell = (match["method"], match["labels"])
        scores[cell].append(100 * _top1(path, dataset))
        for name, values in _measured(path).items():
            cosines[name][cell].append(statistics.mean(values))
    if not scores:
        raise UserError(
            f"{folder} has no finished run named METHOD_LABELS_sSEED; run the table's script first"
        )
    return scores, cosines


def _top1(run: Path, dataset: str) -> float:
    exported = read_object(run / "eval" / "models.json", "models")["exported"]
    student = read_object(run / "eval" / "results.json", "results")[exported]
    tests = [item for item in student if item["name"] == "classification"]
    found = [item for item in tests if dataset in ("", item["dataset"])]
    if not found:
        raise UserError(
            f"{run} was not tested on {dataset}; it has {', '.join(item['dataset'] for item in tests)}"
        )
    return float(found[0]["metrics"]["top1"])


def _measured(run: Path) -> dict[str, list[float]]:
    """Values of each cosine over the log lines; names that were never measured are left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in read_text(run / "metrics.jsonl", "metrics").splitlines():
        for name, value in json.loads(line).items():
            if name in _COSINES:
                found[name].append(value)
    return found


def teacher_top1(outputs: Path, classes: Path) -> float:
    """Per cent of the test images whose stored embedding is nearest to its own class's vector.

    Raises:
        UserError: files that are missing, or of two teachers.
    """
    stored, vectors = TeacherOutputs(outputs), ClassVectors.load(classes)
    if stored.info.digest != vectors.teacher_digest:
        raise UserError(f"{outputs} and {classes} are of two teachers; make both with one model")
    found = [(item.label, stored.get(item.key)) for item in items_of(load_set(stored.info.set_name), "test")]
    kept = [(label, entry.image_embeds[0]) for label, entry in found if entry is not None]
    answers = vectors.logits(torch.stack([embeds for _, embeds in kept])).argmax(dim=-1)
    return 100 * float((answers == torch.tensor([label for label, _ in kept])).float().mean())


def _order(labels: str) -> tuple[int, int]:
    """Shots by number, then per cent, then none."""
    kind = 0 if labels.endswith("shot") else 1 if labels.endswith("pct") else 2
    return kind, int(re.sub(r"\D", "", labels) or 0)


def markdown(cells: Mapping[tuple[str, str], list[float]], title: str, show: Callable[[float], str]) -> str:
    """One table; a cell that was not run says so."""
    methods = sorted({method for method, _ in cells})
    columns = sorted({labels for _, labels in cells}, key=_order)
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for method in methods:
        row = []
        for labels in columns:
            values = cells.get((method, labels), [])
            row.append(mean_and_spread(values, show) if values else "not run")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the run folders")
    parser.add_argument("--dataset", default="", help="test set; default: the first one of each run")
    parser.add_argument(
        "--teacher", type=Path, nargs=2, metavar=("OUTPUTS", "CLASSES"), help="stored teacher"
    )
    parser.add_argument("--markdown", type=Path, help="write to this file instead of printing")
    args = parser.parse_args(argv)
    scores, cosines = read_runs(args.folder, args.dataset)
    seeds = sorted({len(values) for values in scores.values()})
    parts = [markdown(scores, "test top-1 (%)", "{:.1f}".format)]
    parts += [
        markdown(cells, name.replace("_", " ").replace("/", ", "), "{:.2f}".format)
        for name, cells in cosines.items()
        if cells
    ]
    if args.teacher:
        parts.append(f"Teacher, zero-shot: {teacher_top1(*args.teacher):.1f} %.\n")
    text = "\n".join(parts) + f"\nSeeds per cell: {', '.join(map(str, seeds))}.\n"
    if args.markdown:
        write_text(args.markdown, text, "--markdown")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    run_tool(main)
