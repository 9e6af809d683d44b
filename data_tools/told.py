"""What a tool that fills a store prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlmkd import distributed


def tell(line: str) -> None:
    """Print a line, once for all ranks."""
    if distributed.is_main():
        print(line, flush=True)


def tell_complete(folder: Path, skipped: Counter[str]) -> None:
    """Say so, and what was left out for which reason."""
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    tell(f"{folder} is complete" + (f"; left out: {told}" if told else ""))
