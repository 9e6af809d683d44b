"""Runs named ARM_sSEED in one folder -> a Markdown table with mean ± standard deviation over the seeds.

python scripts/seeds_table.py runs/emoji_table --baseline scratch_contrastive [--markdown table.md]

With --baseline, a last column says at which share of the steps each arm passes the baseline's final score, in the first
metric of the table.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that was not installed

from vlmkd.errors import UserError
from vlmkd.report import STUDENT, Run, columns_of, format_score, metric_name, read_run, rows_of

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


def spread(values: list[float], key: str) -> str:
    """`mean ± standard deviation`; a single value alone."""
    if len(values) == 1:
        return format_score(key, values[0])
    return f"{format_score(key, statistics.mean(values))} ± {format_score(key, statistics.stdev(values))}"


def first_pass(run: Run, key: str, goal: float) -> float | None:
    """Share of the run's steps at which its student first reached `goal` in `key`; None: never."""
    steps = run.evals[STUDENT]
    reached = [step for step in sorted(steps) if steps[step].get(key, -1.0) >= goal]
    return reached[0] / max(steps) if reached else None


def table(arms: dict[str, list[Run]], baseline: str) -> str:
    """The Markdown table; teachers first."""
    rows = rows_of([run for runs in arms.values() for run in runs])
    keys = [key for key in columns_of(rows) if metric_name(key) != "mean per class"]
    head = ["model", "params (M)", "seeds", *(f"{key.split('/')[0]} {metric_name(key)}" for key in keys)]
    if baseline:
        head.append(f"share of steps to {baseline}'s final score")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        if row.teacher:
            size = f"{row.parameters / 1e6:.2f}" if row.parameters else "-"
            cells = [row.label, size, "", *(format_score(key, row.scores.get(key)) for key in keys)]
            lines.append("| " + " | ".join(cells + [""] * bool(baseline)) + " |")
    for arm, runs in arms.items():
        sizes = {run.parameters[STUDENT] / 1e6 for run in runs if STUDENT in run.parameters}
        size = "-".join(f"{value:.2f}" for value in sorted({min(sizes), max(sizes)})) if sizes else "-"
        cells = [arm, size, str(len(runs))]
        cells += [spread([run.final[STUDENT][key] for run in runs], key) for key in keys]
        if baseline:
            goal = statistics.mean(run.final[STUDENT][keys[0]] for run in arms[baseline])
            shares = [first_pass(run, keys[0], goal) for run in runs]
            whole = [share for share in shares if share is not None]
            cells.append(
                f"{statistics.mean(whole):.2f}" if len(whole) == len(shares) else "not reached by all"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parse arguments and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Runs named ARM_sSEED -> mean ± standard deviation as Markdown."
    )
    parser.add_argument("folder", type=Path, help="folder of the run folders")
    parser.add_argument("--baseline", default="", help="arm whose final score the others are timed against")
    parser.add_argument("--markdown", type=Path, help="write the table to this file instead of printing it")
    args = parser.parse_args()
    try:
        arms = arms_in(args.folder)
        if args.baseline and args.baseline not in arms:
            raise UserError(f"--baseline {args.baseline} is none of the arms {', '.join(arms)}")
        text = table(arms, args.baseline)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
