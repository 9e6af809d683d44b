#!/usr/bin/env python
"""Check zoo.yaml, the repository's own weights and MODEL_ZOO.md; `--write` writes the page anew."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd import zoo
from vlmkd.errors import UserError, run_tool

PAGE = zoo.REPOSITORY / "MODEL_ZOO.md"


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write MODEL_ZOO.md from zoo.yaml")
    args = parser.parse_args(argv)
    text = zoo.markdown()
    if args.write:
        temporary = PAGE.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, PAGE)
    try:
        for item in zoo.entries().values():
            if item.kind == "local":
                zoo.fetch(item.name)
    except UserError as error:
        print(f"check_zoo.py: {error}", file=sys.stderr)
        return 2
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(
            "check_zoo.py: MODEL_ZOO.md is not what zoo.yaml gives; run scripts/check_zoo.py --write",
            file=sys.stderr,
        )
        return 2
    print(f"{len(zoo.entries())} zoo entries checked")
    return 0


if __name__ == "__main__":
    run_tool(main)
