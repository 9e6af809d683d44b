#!/usr/bin/env python
"""Write any loadable CLIP as a folder that open_clip or transformers reads, and check it in a fresh process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd.errors import UserError, run_tool

EPILOG = """examples:
  scripts/export.py zoo:TinyCLIP-ViT-8M-16-Text-3M-YFCC15M exports/tinyclip_8m --layout hf
  scripts/export.py ViT-B-32 exports/b32 --pretrained laion2b_e16 --half
  scripts/export.py hf:downloads/TinyCLIP-ViT-40M exports/tinyclip_40m

A pruned (ragged) model fits the open_clip layout only, and is then read by this repository alone."""


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="architecture, JSON config, local-dir:FOLDER, hf:FOLDER or zoo:NAME")
    parser.add_argument("folder", type=Path, help="where the export goes")
    parser.add_argument(
        "--pretrained", default="", help="open_clip tag or weights file of an architecture or JSON config"
    )
    parser.add_argument(
        "--layout", choices=("open_clip", "hf"), default="open_clip", help="default: open_clip"
    )
    parser.add_argument("--half", action="store_true", help="store fp16 weights")
    args = parser.parse_args(argv)
    from vlmkd.export.clip import export_clip, verify_export
    from vlmkd.models.clip import load_clip

    clip = load_clip(args.model, args.pretrained)
    if not clip.digest:
        raise UserError(f"model {args.model} has no weights; give --pretrained a tag or a file")
    export_clip(args.folder, clip, layout=args.layout, half=args.half)
    verify_export(args.folder, clip)
    print(f"{args.folder}: {args.layout} layout, reloaded in a fresh process with equal outputs")
    return 0


if __name__ == "__main__":
    run_tool(main)
