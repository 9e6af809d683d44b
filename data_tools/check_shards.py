"""Read every sample of some shards the way training does, and list the bad ones by reason.

    python data_tools/check_shards.py 'shards/*.tar'
    python data_tools/check_shards.py 'chats/*.tar' --chats

Exit code 0 when all samples are good, 1 when any is bad, 2 when the call itself is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd.config import DataConfig
from vlmkd.data.chats import parts_of
from vlmkd.data.decode import decode
from vlmkd.data.samples import BadSample, RawSample, checked_size, members, unpack
from vlmkd.data.shards import expand, read_shard
from vlmkd.errors import at_least, run_tool


def check(raw: RawSample, cfg: DataConfig, chats: bool, pixels: bool) -> None:
    """Raise the BadSample for which training would drop the sample; `pixels` decodes the images as well.

    How long a chat is depends on the tokenizer and is left to training.
    """
    if chats and not raw.reason:
        _, images = parts_of(raw.members)
    else:
        images = [unpack(raw, cfg.image_keys, cfg.text_key)[0]]
    for image in images:
        checked_size(image, cfg.max_pixels)
        if pixels:
            decode(image)


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    default = DataConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shards", nargs="+", help="paths, brace ranges, globs, URLs, pipe:COMMAND or emoji:train"
    )
    parser.add_argument("--image-keys", nargs="+", default=default.image_keys, help="as data.image_keys")
    parser.add_argument("--text-key", default=default.text_key, help="as data.text_key")
    parser.add_argument(
        "--max-pixels", type=at_least(1), default=default.max_pixels, help="as data.max_pixels"
    )
    parser.add_argument("--chats", action="store_true", help="the samples are chats")
    parser.add_argument("--headers-only", action="store_true", help="do not decode the images")
    args = parser.parse_args(argv)
    cfg = DataConfig(image_keys=args.image_keys, text_key=args.text_key, max_pixels=args.max_pixels)
    reasons: Counter[str] = Counter()
    total = 0
    for url in expand(args.shards, "shards"):
        for raw in read_shard(url, None if args.chats else members(cfg)):
            total += 1
            try:
                check(raw, cfg, args.chats, not args.headers_only)
            except BadSample as bad:
                reasons[bad.reason] += 1
                print(f"{bad.reason}\t{raw.name}\t{bad.detail}")
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    print(f"{total} samples, {sum(reasons.values())} bad" + (f": {told}" if told else ""))
    return 1 if reasons else 0


if __name__ == "__main__":
    run_tool(main)
