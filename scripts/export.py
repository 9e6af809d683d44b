#!/usr/bin/env python
"""Write a CLIP as a folder that open_clip or transformers reads, or a chat model's export anew, checked in a fresh process."""

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
  scripts/export.py runs/chat/teacher exports/teacher --half

A pruned (ragged) model fits the open_clip layout only, and is then read by this repository alone."""


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        help="CLIP: architecture, JSON config, local-dir:FOLDER, hf:FOLDER or zoo:NAME; chat model: a run",
    )
    parser.add_argument("folder", type=Path, help="where the export goes")
    parser.add_argument(
        "--pretrained", default="", help="open_clip tag or weights file of an architecture or JSON config"
    )
    parser.add_argument(
        "--layout", choices=("open_clip", "hf"), default="open_clip", help="default: open_clip"
    )
    parser.add_argument("--half", action="store_true", help="store fp16 weights")
    args = parser.parse_args(argv)
    from vlmkd.export.mllm import CONFIG, export_folder

    folder = Path() if args.model.startswith("zoo:") else export_folder(args.model)
    if (folder / CONFIG).is_file():
        _chat_model(folder, args.folder, half=args.half)
        layout = "chat model"
    else:
        _clip(args)
        layout = f"{args.layout} layout"
    print(f"{args.folder}: {layout}, reloaded in a fresh process with equal outputs")
    return 0


def _clip(args: argparse.Namespace) -> None:
    from scripts import export_hf
    from vlmkd.export import clip as export
    from vlmkd.export.folder import stored
    from vlmkd.models.clip import load_clip

    clip = load_clip(args.model, args.pretrained)
    if not clip.digest:
        raise UserError(f"model {args.model} has no weights; give --pretrained a tag or a file")
    if args.half:  # what the check compares is rounded alike
        clip = clip.with_weights({k: stored(v, half=True) for k, v in clip.module.state_dict().items()})
    if args.layout == "hf":
        export_hf.export_hf(args.folder, clip, half=args.half)
        export_hf.verify_hf(args.folder, clip)
    else:
        export.export_clip(args.folder, clip, half=args.half)
        export.verify_export(args.folder, clip)


def _chat_model(folder: Path, out: Path, *, half: bool) -> None:
    import projects
    from vlmkd.export.mllm import CONFIG, check_mllms, export_mllm, load_mllm
    from vlmkd.files import read_object

    owner = read_object(folder / CONFIG, "chat model")["project"]
    surgery = projects.surgery_of(owner)
    parts = load_mllm(folder, surgery=surgery, keep_lora=True)
    probe = export_mllm(out, parts, parts.module.state_dict(), half=half)
    check_mllms({out: probe}, surgery.__module__)


if __name__ == "__main__":
    run_tool(main)
