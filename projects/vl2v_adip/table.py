"""Leave-one-domain-out table of finished runs: `python -m projects.vl2v_adip.table RUNS [--markdown FILE] [--json FILE]`.

One row a method and selection, one column a held-out domain; several trial seeds give mean ± standard deviation, of the
domains and of their average. `iid` and `SWAD` are top-1 on the held-out domain's 80 %, `SWAD (inD)` is top-1 on the
source domains' 20 %.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from projects.vl2v_adip.folds import FACTS
from projects.vl2v_adip.task import BEST, SWAD
from vlmkd.errors import UserError, run_tool
from vlmkd.files import read_object, write_json, write_text
from vlmkd.page.report import mean_and_spread


@dataclass(frozen=True)
class Score:
    """One number of one run."""

    set: str
    student: str
    method: str
    selection: str
    test_domain: str
    trial_seed: int
    top1: float
    """In per cent."""
    run: str


def scores_in(folder: Path) -> list[Score]:
    """The scores of every finished run below `folder`.

    Raises:
        UserError: no finished run of this project there.
    """
    scores: list[Score] = []
    for path in sorted(folder.glob(f"**/export/{FACTS}")):
        run = path.parents[1]
        if (run / "done.json").is_file():
            scores += _scores_of(run, read_object(path, "facts of a run"))
    if not scores:
        raise UserError(
            f"{folder} holds no finished run of vl2v_adip; start one with projects/vl2v_adip/scripts/run.sh"
        )
    return scores


def _scores_of(run: Path, facts: dict[str, Any]) -> list[Score]:
    results = read_object(run / "eval" / "results.json", "results")
    target = f"{facts['test_domain']}_in"
    found: list[tuple[str, str, float]] = []
    for model, items in results.items():
        top1 = {item["dataset"]: item["metrics"]["top1"] for item in items}
        if model == BEST:
            found.append((facts["method"], "iid", top1[target]))
        elif model == SWAD:
            sources = [
                value for name, value in top1.items() if name.endswith("_out") and name[:-4] != target[:-3]
            ]
            found.append((facts["method"], "SWAD", top1[target]))
            found.append((facts["method"], "SWAD (inD)", statistics.mean(sources)))
        elif model.startswith("teacher "):
            found.append(("zero-shot", model, top1[target]))
    kept = {name: facts[name] for name in ("set", "student", "test_domain", "trial_seed")}
    return [
        Score(**kept, method=method, selection=selection, top1=100 * value, run=str(run))
        for method, selection, value in found
    ]


def markdown(scores: list[Score]) -> str:
    """One table per data set and student."""
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.set, score.student].append(score)
    return "\n".join(_table(f"{name}, {student}", group) for (name, student), group in groups.items())


def _table(title: str, scores: list[Score]) -> str:
    domains = sorted({score.test_domain for score in scores})
    rows: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for score in scores:
        rows[score.method, score.selection][score.trial_seed][score.test_domain] = score.top1
    lines = [
        f"### {title}",
        "",
        "| method | selection | " + " | ".join([*domains, "average", "seeds"]) + " |",
    ]
    lines.append("|---|---|" + "---:|" * (len(domains) + 2))
    for (method, selection), by_seed in rows.items():
        cells = [_cell([one[domain] for one in by_seed.values() if domain in one]) for domain in domains]
        # Only whole rows have an average.
        whole = [statistics.mean(one.values()) for one in by_seed.values() if len(one) == len(domains)]
        lines.append("| " + " | ".join([method, selection, *cells, _cell(whole), str(len(by_seed))]) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return "not run"
    return mean_and_spread(values, "{:.1f}".format)


def main(argv: list[str]) -> int:
    """Parse arguments and write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Finished runs -> leave-one-domain-out tables.")
    parser.add_argument("folder", type=Path, help="folder of the run folders")
    parser.add_argument("--markdown", type=Path, help="write the table to this file instead of printing it")
    parser.add_argument("--json", type=Path, help="write every number with its run to this file")
    args = parser.parse_args(argv)
    scores = scores_in(args.folder)
    text = markdown(scores)
    if args.json:
        write_json(args.json, [asdict(score) for score in scores], "--json")
    if args.markdown:
        write_text(args.markdown, text, "--markdown")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    run_tool(main)
