#!/usr/bin/env python
"""How close a chat model's next tokens are to its teacher's, and how well it still knows prose.

  python scripts/eval_tokens.py --model runs/chat/d2d --teacher zoo:llava-mod-emoji-teacher --chats runs/scenes/captions.json \
      --most 200 --results tokens.jsonl
  python scripts/eval_tokens.py --model runs/matvlm/25 --teacher zoo:llava-mod-emoji-teacher --text prose.txt

Of chats the tokens of the answers count, of a text all, in windows of --length tokens that do not overlap; the first of a
window is context alone. KL(teacher || student) in nats a token, the share of tokens whose likeliest next one is the
teacher's, and perplexity, the exponential of the mean cross entropy. Without --teacher there is perplexity alone.
Under scripts/launch.sh the ranks share the batches.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts import chat
from scripts import evaluation_command as command
from vlmkd import distributed
from vlmkd.chat_ids import IGNORED
from vlmkd.chat_runs import check_alike
from vlmkd.data.chats import ChatItem, ChatPipeline, read_chats
from vlmkd.data.samples import BadSample, RawSample
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.answers import ChatModel
from vlmkd.evaluation.base import Context, Result, progress, spread
from vlmkd.files import read_text
from vlmkd.losses.tokens import TeacherStates, TokenObjective, token_loss
from vlmkd.results import Meaning, numbers_of, parameters, share, write_results

MEANINGS = {
    "kl": Meaning("KL to the teacher", "nats", higher_is_better=False, main=True),
    "agreement": share("agreement top-1"),
    "perplexity": Meaning(higher_is_better=False),
}
"""What each number is."""


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chat.add_model_options(parser, required=True)
    add, count = parser.add_argument, at_least(0)
    add(
        "--teacher", default="", metavar="EXPORT", help="as --model; of the same tokenizer and image features"
    )
    add("--chats", nargs="+", default=[], metavar="FILE", help="LLaVA's JSON")
    add("--images", default="", metavar="FOLDER", help="their images (default: beside each file)")
    add("--text", nargs="+", default=[], metavar="FILE", help="plain texts")
    add(
        "--length",
        type=at_least(2),
        default=512,
        help="most tokens of a chat, and those of a window (default 512)",
    )
    add(
        "--most",
        type=count,
        default=0,
        help="so many chats, and windows, of each file, drawn from it (default: all)",
    )
    add("--results", default="", metavar="FILE", help="write a line a number to FILE")
    add("--batch-size", type=at_least(1), default=8, help="chats or windows per forward pass (default 8)")
    add("--threads", type=count, default=0, help="CPU threads (default: torch's)")
    add("--quiet", action="store_true", help="no progress lines")
    args = parser.parse_args(argv)
    if not args.chats and not args.text:
        raise UserError("nothing to read; give --chats or --text")
    args.workers = 0
    return command.on_ranks(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> None:
    context = command.start(args)
    student, teacher = chat.load(args), None
    if args.teacher:
        teacher = chat.load(argparse.Namespace(**vars(args) | {"model": args.teacher, "project": ""}))
        check_alike(
            (args.model, student.tokens.tokenizer, student.model, student.image_spec),
            (args.teacher, teacher.tokens.tokenizer, teacher.model, teacher.image_spec),
        )
    results = []
    for path in args.chats:
        items = spread(read_chats(path, args.images or str(Path(path).parent)), args.most)
        if not items:
            raise UserError(f"--chats {path} has no chat; name another file")
        pipeline = ChatPipeline(student.tokens, student.image_spec, max_length=args.length)
        results.append(
            measure(Path(path).stem, items, partial(of_chats, pipeline), student, teacher, context)
        )
    for path in args.text:
        texts = spread(windows(path, student, args.length), args.most)
        make = partial(of_windows, student)
        results.append(measure(Path(path).stem, texts, make, student, teacher, context))
    if distributed.is_main():
        size = sum(p.numel() for p in student.model.parameters())
        numbers = [parameters(size, run=args.model, model=args.model)]
        tags = {"teacher": args.teacher} if args.teacher else {}
        numbers += numbers_of(results, run=args.model, model=args.model, tags=tags)
        print(command.table(numbers))
        if args.results:
            details = {"command": sys.argv, "torch": torch.__version__}
            write_results(Path(args.results), numbers, details, "--results")


def of_chats(pipeline: ChatPipeline, items: Sequence[ChatItem]) -> dict[str, Any]:
    """A batch of these chats.

    Raises:
        UserError: one that cannot be used.
    """
    found = []
    for item in items:
        try:
            found.append(pipeline.process(RawSample("", item.key, item.members())))
        except BadSample as error:
            raise UserError(f"--chats: chat {item.key} {error.detail}; mend it or leave it out") from None
    return pipeline.collate(found)


def windows(path: str, model: ChatModel, length: int) -> Tensor:
    """int64 [W, length], the text's tokens; what is left at its end takes no part.

    Raises:
        UserError: the text is shorter than a window.
    """
    tokenizer = model.tokens.tokenizer
    ids = tokenizer(read_text(path, "text"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length:
        raise UserError(f"text {path} has {len(ids)} tokens, fewer than --length {length}; set that smaller")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def of_windows(model: ChatModel, texts: Sequence[Tensor]) -> dict[str, Any]:
    """A batch of these windows, without images."""
    ids = torch.stack(list(texts))
    return {
        "input_ids": ids,
        "targets": F.pad(ids[:, 1:], (0, 1), value=IGNORED),
        "segments": torch.ones_like(ids),
        "images": torch.zeros(0, 3, *model.image_spec.size),
        "image_rows": torch.zeros(0, dtype=torch.int64),
    }


@torch.inference_mode()
def measure(
    dataset: str,
    items: Sequence[Any],
    make: Callable[[Sequence[Any]], dict[str, Any]],
    student: ChatModel,
    teacher: ChatModel | None,
    context: Context,
) -> Result:
    """The three numbers over all ranks; `make` makes a batch of some of the items."""
    size = context.batch_size
    groups = [items[start : start + size] for start in range(0, len(items), size)]
    own = [groups[index] for index in distributed.rank_share(len(groups))]
    sums = torch.zeros(4, dtype=torch.float64)
    for group in progress(own, len(own), dataset, context):
        made = make(group)
        batch = {name: x.to(context.device) if isinstance(x, Tensor) else x for name, x in made.items()}
        learned = batch["targets"] != IGNORED
        states = [
            TeacherStates(one.model(batch)[learned], one.model.head.weight, one.model.head.bias)
            for one in (student, teacher)
            if one is not None
        ]
        hidden, head, bias = states[0]
        found = token_loss(
            hidden, head, states[1] if teacher else None, TokenObjective(ce_weight=1.0),
            labels=batch["targets"][learned], bias=bias,
        )  # fmt: skip
        sums += torch.stack([found.divergence, found.agreement, found.ce, found.num_rows]).double().cpu()
    kl, agreement, ce, count = distributed.total(sums).tolist()
    metrics = {"kl": kl / count, "agreement": agreement / count} if teacher else {}
    metrics["perplexity"] = math.exp(ce / count)
    return Result("tokens", dataset, metrics, int(count), meanings=MEANINGS)


if __name__ == "__main__":
    run_tool(main)
