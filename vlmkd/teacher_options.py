"""The teacher of a data tool, as options: a model on this machine, or a black box that is asked through a ledger."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vlmkd.data.ledger import Budget, Ledger, Policy, Prices
from vlmkd.data.transforms import eval_transform_of_bytes
from vlmkd.distributed import device_named
from vlmkd.errors import UserError, at_least
from vlmkd.models.black_box import BlackBox, HttpTeacher, LocalTeacher
from vlmkd.models.clip import ClipPredictor, load_clip
from vlmkd.predictors import DualEncoder
from vlmkd.zoo import sha256_of

ORACLE = "emoji-oracle:"
"""Before the file of heads that data_tools/train_emoji_oracle.py writes."""


def add_options(parser: argparse.ArgumentParser) -> list[str]:
    """Add them; returns the destinations of those that go with a black box only."""
    add = parser.add_argument
    add(
        "--model",
        default="",
        help=f"open_clip name, JSON config, local-dir:, hf: or zoo: name, or {ORACLE}FILE of the emoji set's strong teacher",
    )
    add("--pretrained", default="", help="open_clip tag or weights file")
    add("--threads", type=at_least(0), default=0, help="CPU threads; 0: torch's default")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    box = parser.add_argument_group("black-box teacher")
    add = box.add_argument
    add("--black-box", default="", help="address of the call, or `local`")
    options = [
        add("--token-env", default="", help="environment variable that holds the token"),
        add(
            "--teacher-id", default="", help="name and version of the teacher; another one is another teacher"
        ),
        add("--dim", type=int, default=0, help="width of its vectors"),
        add("--unit-norm", action="store_true", help="it declares unit vectors"),
        add("--ledger", default="", help="sqlite file on a local disk"),
        add("--max-queries", type=int, default=None, help="budget in queries, images and texts together"),
        add("--max-cost", type=float, default=None, help="budget in money"),
        add("--price", type=float, default=None, help="cost of one query of this tool"),
        add(
            "--resend-lost",
            action="store_true",
            help="ask again where an answer was lost; may be charged twice",
        ),
    ]
    add("--logit-scale", type=float, default=100.0, help="factor of its cosines in the softmax")
    add("--timeout", type=float, default=60.0, help="seconds")
    add("--retries", type=at_least(0), default=2, help="repetitions of a call that was not served")
    return [option.dest for option in options]


def encoder(args: argparse.Namespace, box_only: list[str]) -> tuple[DualEncoder, str]:
    """The model of `--model` on `--device`, where no black box is asked, and the digest of its weights.

    Raises:
        UserError: no model, one with random weights, or one of the options `box_only` beside it.
    """
    given = [name for name in box_only if getattr(args, name)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} goes with --black-box only")
    return _load(args)


def ledger(args: argparse.Namespace, prices: Prices, *, mask: bool = False) -> Ledger:
    """The ledger of `--ledger` before the teacher of `--black-box`; `args` also has the tool's own `batch_size`.

    Args:
        prices: of one query.
        mask: leave out what gets no vector; default: stop.

    Raises:
        UserError: a missing option, an address or token that cannot work, or a file that is no ledger.
    """
    for name in ("ledger", "teacher_id", "dim"):
        if not getattr(args, name):
            raise UserError(f"--black-box needs --{name.replace('_', '-')}")
    teacher: BlackBox
    if args.black_box == "local":
        local, _ = _load(args)
        teacher = LocalTeacher(local, eval_transform_of_bytes(local.image_spec))
    else:
        teacher = HttpTeacher(
            args.black_box, token_env=args.token_env, timeout=args.timeout, retries=args.retries
        )
    return Ledger(
        args.ledger, teacher, args.teacher_id, dim=args.dim, unit_norm=args.unit_norm,
        logit_scale=args.logit_scale, budget=Budget(args.max_queries, args.max_cost), prices=prices,
        batch_size=args.batch_size, policy=Policy(args.retries, "mask" if mask else "abort", args.resend_lost),
    )  # fmt: skip


def _load(args: argparse.Namespace) -> tuple[DualEncoder, str]:
    if not args.model:
        raise UserError("--model is missing: the teacher's name, or --black-box with an address")
    if args.model.startswith(ORACLE):
        from vlmkd.models.emoji_oracle import load_oracle

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
