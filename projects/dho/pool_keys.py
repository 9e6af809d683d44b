"""Print the keys of the images that a config trains on: `python -m projects.dho.pool_keys CONFIG.yaml [field=value ...]`.

For `data_tools/embed_labelled.py --keys`, so that a teacher embeds no image that no run will see (split.pool_per_class).
"""

from __future__ import annotations

import sys

from projects.dho.config import DhoConfig
from projects.dho.labels import pool
from vlmkd import config
from vlmkd.data.labelled_sets import configured_set, items_of
from vlmkd.errors import UserError, run_tool


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    try:
        cfg = config.load(DhoConfig, argv)
        train = items_of(configured_set(cfg.data), "train")
        print("\n".join(item.key for item in pool(train, cfg.split.pool_per_class)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_tool(main)
