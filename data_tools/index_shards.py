"""Count the samples of local shards and keep the counts in a `sizes.json` beside them.

    python data_tools/index_shards.py 'shards/*.tar'

The counts are what a run's data.json reports as its samples; open_clip reads the same file.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd.data.shards import expand, is_remote, read_shard
from vlmkd.errors import UserError, run_tool
from vlmkd.files import read_object, write_json


def count(url: str) -> int:
    """Samples in a shard, duplicate keys left out.

    Raises:
        UserError: the shard cannot be read to its end.
    """
    number = 0
    for raw in read_shard(url, frozenset()):
        if raw.reason == "broken_tar":
            raise UserError(f"shard {raw.detail} is broken; fetch it again or delete it")
        number += not raw.reason
    return number


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="local shards: paths, brace ranges or globs")
    args = parser.parse_args(argv)
    urls = expand(args.shards, "shards")
    remote = [url for url in urls if is_remote(url)]
    if remote:
        raise UserError(
            f"shards: {remote[0]} is not a local file; sizes.json is written beside local shards only"
        )
    sizes: dict[Path, dict[str, int]] = defaultdict(dict)
    for url in urls:
        path = Path(url)
        sizes[path.parent][path.name] = count(url)
    for folder, counts in sizes.items():
        target = folder / "sizes.json"
        known = read_object(target, "shard sizes", "delete it") if target.is_file() else {}
        write_json(target, dict(sorted({**known, **counts}.items())), "shard sizes")
        print(f"{target}: {sum(counts.values())} samples in {len(counts)} shards")
    return 0


if __name__ == "__main__":
    run_tool(main)
