#!/usr/bin/env python
"""Fetch models of the zoo into the local cache, verified; or list them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd import zoo
from vlmkd.errors import UserError, run_tool

EPILOG = """environment:
  VLMKD_CACHE               folder of the cache (default ~/.cache/vlmkd; files lie in its zoo/)
  HF_HOME                   folder of the hub's cache, where the `hub` entries lie
  VLMKD_MIRROR              base URL that serves the release files by their names in the cache
  HF_ENDPOINT               another Hugging Face host
  VLMKD_OFFLINE, HF_HUB_OFFLINE   use what is in the cache only
  HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE   as usual

An interrupted download continues when the command is given again. Entries of the kind `manual` cannot be downloaded: a line
says which file to put where, and the next call verifies it. Exit code 2: bad name, unreachable, not there, wrong sha256."""


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="zoo entries (see --list, MODEL_ZOO.md)")
    parser.add_argument("--list", action="store_true", help="print every entry and stop")
    parser.add_argument(
        "--offline", action="store_true", help="never use the network; verify what the cache has"
    )
    args = parser.parse_args(argv)
    if args.list:
        for item in zoo.entries().values():
            size = "size not seen" if item.size_mb is None else f"{item.size_mb:g} MB"
            print(f"{item.name:52s} {item.kind:8s} {size:14s} {item.licence:12s} {item.data}")
        return 0
    if not args.names:
        parser.error("name at least one model, or give --list")
    if args.offline:
        os.environ["VLMKD_OFFLINE"] = "1"
    try:
        for name in args.names:
            zoo.entry(name)
        for name in args.names:
            print(zoo.fetch(name))
    except UserError as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_tool(main)
