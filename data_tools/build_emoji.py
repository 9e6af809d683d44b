"""Build the embedded emoji data set into the cache, or check the one that is there against its manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys

from vlmkd.datasets.emoji.cache import emoji_folder
from vlmkd.errors import UserError


def main() -> None:
    """Build when absent; with --check, compare every shard's sha256 with the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the shards with the manifest")
    options = parser.parse_args()
    try:
        folder = emoji_folder()
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if options.check:
            for shard in manifest["shards"]:
                path = folder / shard["path"]
                if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
                    raise UserError(f"{path} differs from the manifest; delete {folder} and build again")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(folder)
    for split, count in manifest["samples"].items():
        print(f"  emoji:{split:<15} {count:>6,} samples")
    for part, licence in manifest["licences"].items():
        print(f"  {part}: {licence}")


if __name__ == "__main__":
    main()
