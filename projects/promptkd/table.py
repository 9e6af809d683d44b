"""The tables of scripts/nano.sh from its folder: accuracies, accuracy by epoch, cost of the text tower.

python -m projects.promptkd.table runs/promptkd_emoji [--markdown table.md]
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path

from vlmkd.errors import UserError, run_tool
from vlmkd.export.classifier import WEIGHTS
from vlmkd.files import read_object, write_text
from vlmkd.page.report import STUDENT, mean_and_spread, read_run
from vlmkd.tensor_files import read_safetensors

_ROWS = ("zero_shot_student", "zero_shot_teacher", "prompted_teacher", "distilled_student")
_KEYS = ("base_top1", "novel_top1", "harmonic_mean")
_STUDENT = re.compile(r"student_s(\d+)$")


def accuracies(folder: Path) -> str:
    """Base, novel and harmonic mean of every row that eval.py measured; spread over the seeds where there are several.

    Raises:
        UserError: eval.py wrote no file of a row.
    """
    lines = ["| model | seeds | base | novel | harmonic mean |", "|---|---:|---:|---:|---:|"]
    for name in _ROWS:
        path = folder / f"{name}.json"
        if not path.is_file():
            raise UserError(f"{path} is missing; run projects/promptkd/scripts/nano.sh first")
        runs = read_object(path, "results")["runs"]
        cells = [_cell([run["metrics"][key] for run in runs]) for key in _KEYS]
        lines.append(f"| {name.replace('_', ' ')} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_epoch(folder: Path) -> str:
    """Base, novel and harmonic mean of the distilled student after each epoch."""
    found: dict[int, list[dict[str, float]]] = {}
    for path in sorted(path for path in folder.iterdir() if _STUDENT.search(path.name)):
        evaluated = read_run(path).evals[STUDENT]
        for epoch, step in enumerate(sorted(evaluated), start=1):
            scores = {name.rpartition("/")[2]: value for name, value in evaluated[step].items()}
            found.setdefault(epoch, []).append(scores)
    lines = ["| epoch | base | novel | harmonic mean |", "|---:|---:|---:|---:|"]
    for epoch, scored in found.items():
        cells = [_cell([scores[key] for scores in scored]) for key in _KEYS]
        lines.append(f"| {epoch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def text_tower(folder: Path) -> str:
    """Seconds a step with the text tower at every step and with stored class vectors, and how far the results differ."""
    runs = {"text tower at every step": "text_every_step", "stored class vectors": "stored_class_vectors"}
    seconds, weights = {}, {}
    for title, name in runs.items():
        # The first line has the warm-up in it.
        seconds[title] = statistics.median(line["step_s"] for line in read_run(folder / name).train[1:])
        weights[title] = read_safetensors(folder / name / "export" / WEIGHTS)
    first, second = weights.values()
    difference = max(float((first[key].double() - second[key].double()).abs().max()) for key in first)
    every, stored = seconds.values()
    lines = ["| class vectors | s a step |", "|---|---:|"]
    lines += [f"| {title} | {spent:.3f} |" for title, spent in seconds.items()]
    return (
        "\n".join(lines)
        + f"\n\nRatio {every / stored:.2f}; largest difference of a weight at the end: {difference}.\n"
    )


def _cell(shares: list[float]) -> str:
    return mean_and_spread([100 * share for share in shares], "{:.2f}".format)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m projects.promptkd.table", description="The tables of nano.sh from its folder."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", type=Path, help="write to this file instead of printing")
    args = parser.parse_args(argv)
    text = "\n".join(make(args.folder) for make in (accuracies, by_epoch, text_tower))
    if args.markdown:
        write_text(args.markdown, text, "--markdown")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    run_tool(main)
