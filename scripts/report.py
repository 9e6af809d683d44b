"""Make one HTML page (and a Markdown table) out of run folders.

python scripts/report.py runs/tinyclip_nano [runs/MORE ...] --out report.html [--markdown table.md]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that was not installed

from vlmkd.errors import run_tool
from vlmkd.files import write_text
from vlmkd.page.report import build_report, columns_of, millions, read_run, rows_of
from vlmkd.results import markdown, title_of


def markdown_table(run_dirs: Sequence[Path]) -> str:
    """Models x test sets; `-` where a model was not evaluated."""
    rows = rows_of([read_run(folder) for folder in run_dirs])
    columns = columns_of(rows)
    lines = []
    for row in rows:
        cells = [row.scores[one.key].shown() if one.key in row.scores else "-" for one in columns]
        lines.append([row.label + (" (teacher)" if row.teacher else ""), millions(row.parameters), *cells])
    return markdown(["model", "parameters", *(f"{one.dataset} {title_of(one)}" for one in columns)], lines)


def main(argv: list[str]) -> int:
    """Parse arguments and write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run folders -> one self-contained HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders (run_dir of a config)")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first run folder")
    parser.add_argument("--title", default="vlmkd report", help="heading of the page")
    parser.add_argument(
        "--gallery", type=Path, help="a gallery file instead of the runs' own eval/gallery.json"
    )
    parser.add_argument("--markdown", type=Path, help="also write the results table as Markdown to this file")
    args = parser.parse_args(argv)
    out = build_report(
        args.runs, args.out or args.runs[0] / "report.html", title=args.title, samples=args.gallery
    )
    if args.markdown is not None:
        write_text(args.markdown, markdown_table(args.runs), "--markdown")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    run_tool(main)
