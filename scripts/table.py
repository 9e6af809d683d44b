"""A folder of runs and results files -> Markdown tables: pivoted by tags, mean ± standard deviation over the seeds.

python scripts/table.py runs/dho_nano --spec projects/dho/table.yaml [--markdown table.md] [--json numbers.json]

Without --spec there is one row for runs of the same name but for their seed (NAME_s0, NAME_s1, ...), and one column for
each data set and metric. Only finished runs count. What a specification may say: vlmkd/page/table.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that was not installed

from vlmkd.errors import run_tool
from vlmkd.files import write_json, write_text
from vlmkd.page.table import PLAIN, read_spec, sources_in, write_tables


def main(argv: list[str]) -> int:
    """Parse arguments and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the run folders")
    parser.add_argument("--spec", type=Path, default=PLAIN, help="specification of the tables (YAML)")
    parser.add_argument(
        "--markdown", type=Path, help="write the tables to this file instead of printing them"
    )
    parser.add_argument("--json", type=Path, help="write every number with its place and run to this file")
    args = parser.parse_args(argv)
    text, data = write_tables(read_spec(args.spec), sources_in(args.folder))
    if args.json:
        write_json(args.json, data, "--json")
    if args.markdown:
        write_text(args.markdown, text, "--markdown")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    run_tool(main)
