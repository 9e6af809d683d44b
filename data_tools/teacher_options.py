"""The teacher of a data tool, as options."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vlmkd.distributed import device_named
from vlmkd.errors import UserError, at_least
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.predictors import DualEncoder
from vlmkd.zoo import sha256_of

ORACLE = "emoji-oracle:"
"""Before the file of heads that data_tools/train_emoji_oracle.py writes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"open_clip name, JSON config, local-dir:, hf: or zoo: name, or {ORACLE}FILE of the emoji set's strong teacher",
    )
    add("--pretrained", default="", help="open_clip tag or weights file")
    add("--threads", type=at_least(0), default=0, help="CPU threads; 0: torch's default")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def encoder(args: argparse.Namespace) -> tuple[DualEncoder, str]:
    """The model of `--model` on `--device`, and the digest of its weights.

    Raises:
        UserError: no such model, or one with random weights.
    """
    if args.model.startswith(ORACLE):
        from data_tools.emoji.oracle import load_oracle

        heads = Path(args.model.removeprefix(ORACLE))
        oracle = load_oracle(heads).to(device_named(args.device))
        return oracle, sha256_of(heads)
    loaded = load_clip(args.model, args.pretrained)
    if not loaded.digest:
        raise UserError(
            f"--model {args.model} alone has random weights; name the trained ones with --pretrained"
        )
    loaded.module.to(device_named(args.device))
    return ClipPredictor.of(loaded), loaded.digest
