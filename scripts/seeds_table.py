"""Runs named ARM_sSEED in one folder -> a Markdown table with mean ± standard deviation over the seeds.

python scripts/seeds_table.py runs/emoji_table --baseline scratch_contrastive [--markdown table.md]

A run that starts from the export of a run beside it (student.model=local-dir:RUN/export) counts that run's steps, too.
With --baseline, a last column says after how many steps each arm passes the baseline's final score, in the first metric
of the table, and by which factor that is sooner.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that was not installed

from vlmkd.errors import UserError, run_tool
from vlmkd.files import read_object, read_yaml, write_text
from vlmkd.page.report import (
    STUDENT,
    Run,
    columns_of,
    format_score,
    mean_and_spread,
    metric_name,
    read_run,
    rows_of,
)

_NAME = re.compile(r"(.+)_s(\d+)$")


def arms_in(folder: Path) -> dict[str, list[Run]]:
    """Finished runs of `folder` by arm, seeds in order; runs without an evaluation (mask runs) are left out.

    Raises:
        UserError: no run there.
    """
    arms: dict[str, list[Run]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.match(path.name)
        if match and (path / "done.json").is_file():
            run = read_run(path)
            if run.final.get(STUDENT):
                arms.setdefault(match[1], []).append(run)
    if not arms:
        raise UserError(
            f"{folder} has no finished run whose name ends in _sSEED; run the table's script first"
        )
    return arms


def steps_before(run: Path) -> int:
    """Steps of the runs that made this run's initial student: those whose export its `student.model` names.

    Raises:
        UserError: a stage before is not beside this run any more.
    """
    export = re.fullmatch(r"local-dir:(?:.*/)?([^/]+)/export/?", str(_config(run)["student"]["model"]))
    if not export:
        return 0
    stage = run.resolve().parent / export[1]
    if not (stage / "done.json").is_file():
        raise UserError(f"{run} starts from the run {stage}, which is gone: its steps can not be counted")
    return int(read_object(stage / "done.json", "a finished run's")["step"]) + steps_before(stage)


def _config(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_yaml(run / "config.yaml", "config of a run")
    return config


def first_pass(run: Run, key: str, goal: float) -> int | None:
    """Steps after which the run's student first reached `goal` in `key`, stages before included; None: never."""
    steps = run.evals[STUDENT]
    reached = [step for step in sorted(steps) if steps[step].get(key, -1.0) >= goal]
    return steps_before(run.folder) + reached[0] if reached else None


def table(arms: dict[str, list[Run]], baseline: str) -> str:
    """The Markdown table; teachers first."""
    rows = rows_of([run for runs in arms.values() for run in runs])
    keys = [key for key in columns_of(rows) if metric_name(key) != "mean per class"]
    names = [f"{key.split('/')[0]} {metric_name(key)}" for key in keys]
    head = ["model", "params (M)", "seeds", "steps", *names]
    if baseline:
        head.append(f"steps to {baseline}'s {names[0]}")
        goal = statistics.mean(run.final[STUDENT][keys[0]] for run in arms[baseline])
        whole = statistics.mean(max(run.evals[STUDENT]) for run in arms[baseline])
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        if row.teacher:
            size = f"{row.parameters / 1e6:.2f}" if row.parameters else "-"
            cells = [row.label, size, "", "", *(format_score(key, row.scores.get(key)) for key in keys)]
            lines.append("| " + " | ".join(cells + [""] * bool(baseline)) + " |")
    for arm, runs in arms.items():
        sizes = {run.parameters[STUDENT] / 1e6 for run in runs if STUDENT in run.parameters}
        size = "-".join(f"{value:.2f}" for value in sorted({min(sizes), max(sizes)})) if sizes else "-"
        lengths = sorted({steps_before(run.folder) + max(run.evals[STUDENT]) for run in runs})
        cells = [arm, size, str(len(runs)), "-".join(map(str, lengths))]
        cells += [
            mean_and_spread([run.final[STUDENT][key] for run in runs], functools.partial(format_score, key))
            for key in keys
        ]
        if baseline:
            passes = [first_pass(run, keys[0], goal) for run in runs]
            reached = [steps for steps in passes if steps is not None]
            if len(reached) == len(passes):
                mean = statistics.mean(reached)
                cells.append(
                    f"{mean:.0f} ({whole / mean:.1f} times fewer)" if mean < whole else f"{mean:.0f}"
                )
            else:
                cells.append("not reached" if not reached else f"reached by {len(reached)} of {len(passes)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Parse arguments and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Runs named ARM_sSEED -> mean ± standard deviation as Markdown."
    )
    parser.add_argument("folder", type=Path, help="folder of the run folders")
    parser.add_argument("--baseline", default="", help="arm whose final score the others are timed against")
    parser.add_argument("--markdown", type=Path, help="write the table to this file instead of printing it")
    args = parser.parse_args(argv)
    arms = arms_in(args.folder)
    if args.baseline and args.baseline not in arms:
        raise UserError(f"--baseline {args.baseline} is none of the arms {', '.join(arms)}")
    text = table(arms, args.baseline)
    if args.markdown:
        write_text(args.markdown, text, "--markdown")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    run_tool(main)
