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
from vlmkd.data.chats import BadChatError, parts_of
from vlmkd.data.decode import BadImageError, decode
from vlmkd.data.samples import BadSample, RawSample, checked_size, members, unpack
from vlmkd.data.shards import expand, read_shard
from vlmkd.errors import at_least, run_tool


def check(raw: RawSample, cfg: DataConfig, pixels: bool) -> BadSample | None:
    """Why training would drop the sample, or None; `pixels` decodes the image as well."""
    encoded = unpack(raw, cfg.image_keys, cfg.text_key)
    if isinstance(encoded, BadSample):
        return encoded
    try:
        checked_size(encoded.image, cfg.max_pixels)
        if pixels:
            decode(encoded.image)
    except BadImageError as error:
        return BadSample(error.reason, raw.name, str(error))
    return None


def check_chat(raw: RawSample, cfg: DataConfig, pixels: bool) -> BadSample | None:
    """As `check`, for a chat; how long it is depends on the tokenizer and is left to training."""
    if raw.reason:
        return BadSample(raw.reason, raw.name, raw.detail)
    try:
        _, images = parts_of(raw.members)
        for image in images:
            checked_size(image, cfg.max_pixels)
            if pixels:
                decode(image)
    except (BadChatError, BadImageError) as error:
        return BadSample(error.reason, raw.name, str(error))
    return None


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
    total, judge = 0, check_chat if args.chats else check
    for url in expand(args.shards, "shards"):
        for raw in read_shard(url, None if args.chats else members(cfg)):
            total += 1
            bad = judge(raw, cfg, not args.headers_only)
            if bad is not None:
                reasons[bad.reason] += 1
                print(f"{bad.reason}\t{bad.name}\t{bad.detail}")
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    print(f"{total} samples, {sum(reasons.values())} bad" + (f": {told}" if told else ""))
    return 1 if reasons else 0


if __name__ == "__main__":
    run_tool(main)
