"""What black-box teachers were asked and paid, by teacher.

python data_tools/ledger.py report ledger.sqlite
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd.data.ledger import Report, report
from vlmkd.errors import run_tool


def told(part: Report) -> str:
    """One teacher's figures as lines."""
    left = "no limit" if part.queries_left is None else f"{part.queries_left}"
    cost_left = "no limit" if part.cost_left is None else f"{part.cost_left:g}"
    return (
        f"{part.teacher}\n"
        f"  paid       {part.paid} queries, cost {part.cost:g}\n"
        f"  answered   {part.answered}\n"
        f"  reused     {part.reused}\n"
        f"  failed     {part.failed} not served, {part.rejected} rejected answers, {part.lost} lost answers\n"
        f"  under way  {part.under_way}\n"
        f"  remaining  {left} queries, cost {cost_left}"
    )


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["report"])
    parser.add_argument("path", help="the ledger file")
    args = parser.parse_args(argv)
    for part in report(args.path):
        print(told(part))
    return 0


if __name__ == "__main__":
    run_tool(main)
