"""Write the keys of the images that a config trains on: `python -m projects.dho.pool_keys CONFIG.yaml [field=value ...] --out FILE`.

For `data_tools/embed_labelled.py --keys`, so that a teacher embeds no image that no run will see (split.pool_per_class).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from projects.dho.config import DhoConfig
from projects.dho.labels import pool
from vlmkd import config
from vlmkd.datasets.labelled_sets import configured_set, items_of
from vlmkd.errors import run_tool
from vlmkd.files import write_text


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml or field=value")
    parser.add_argument("--out", type=Path, required=True, help="text file, one key a line")
    args = parser.parse_args(argv)
    cfg = config.load(DhoConfig, args.words)
    keys = [item.key for item in pool(items_of(configured_set(cfg.data), "train"), cfg.split.pool_per_class)]
    write_text(args.out, "\n".join(keys) + "\n", "--out")
    print(f"{args.out}: {len(keys)} images")
    return 0


if __name__ == "__main__":
    run_tool(main)
