"""Build the embedded emoji data set into the cache, or check the one that is there against its manifest."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd.datasets.emoji import emoji_folder
from vlmkd.errors import UserError, run_tool
from vlmkd.files import read_object


def main(argv: list[str]) -> int:
    """Build when absent; with --check, compare every shard's sha256 with the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the shards with the manifest")
    options = parser.parse_args(argv)
    folder = emoji_folder("emoji")
    manifest = read_object(folder / "manifest.json", "emoji manifest", f"delete {folder} and run again")
    for shard in manifest["shards"] if options.check else []:
        path = folder / shard["path"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
            raise UserError(f"{path} differs from the manifest; delete {folder} and build again")
    print(folder)
    for split, count in manifest["samples"].items():
        print(f"  emoji:{split:<15} {count:>6,} samples")
    for part, licence in manifest["licences"].items():
        print(f"  {part}: {licence}")
    return 0


if __name__ == "__main__":
    run_tool(main)
