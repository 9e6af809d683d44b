#!/usr/bin/env python
"""A benchmark of multimodal models in its authors' own files: ask, save the answers, score them.

  python scripts/eval_chat.py --model runs/chat/prefer --benchmark pope --data coco_pope_*.json --images val2014 \
      --out answers.jsonl --results results.jsonl
  python scripts/eval_chat.py --benchmark mmhal --data response_template.json --out answers.jsonl --judge-file judge.json

The second form asks nothing: it scores the answers in --out again. --data takes the published files, see `read_...` in
scripts/chat_benchmarks/questions.py and hallucination.py; --images the folder of the images (default: that
of the first file). A run that was stopped goes on with the same command. Answers to benchmarks with a judge are scored
once --judge-file has what the judge said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from scripts import chat
from scripts import evaluation_command as command
from scripts.chat_benchmarks import (
    BENCHMARKS,
    read_answers,
    read_benchmark,
    read_judge,
    scored,
    write_answers,
)
from vlmkd import distributed
from vlmkd.data.chats import ChatItem
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.answers import ChatModel, Question, ask
from vlmkd.evaluation.base import Context, spread
from vlmkd.files import check_writable, write_json
from vlmkd.results import Number, numbers_of, parameters, write_results

KEPT_EVERY = 1000
"""Questions after which the answers are saved."""


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chat.add_model_options(parser, required=False)
    add, count = parser.add_argument, at_least(0)
    add("--benchmark", required=True, choices=list(BENCHMARKS))
    add("--data", nargs="+", required=True, type=Path, metavar="FILE", help="its published files, or folder")
    add("--images", default="", metavar="FOLDER", help="its images (default: beside the first file)")
    add("--out", required=True, type=Path, metavar="FILE", help="answers, one JSON object a line")
    add("--judge-file", type=Path, metavar="FILE", help="what the judge said of the answers, in their order")
    add("--results", default="", metavar="FILE", help="write a line a number to FILE")
    add("--name", default="", help="name of the data in the table (default: the benchmark's)")
    add("--most", type=count, default=0, help="ask so many questions, drawn from the files (default: all)")
    add("--batch-size", type=at_least(1), default=16, help="questions per forward pass (default 16)")
    add("--threads", type=count, default=0, help="CPU threads (default: torch's)")
    add("--quiet", action="store_true", help="no progress lines")
    args = parser.parse_args(argv)
    args.workers = 0
    return command.on_ranks(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> None:
    if args.most and BENCHMARKS[args.benchmark].groups:
        raise UserError(f"--most leaves out part of what {args.benchmark} scores together; ask all")
    context = command.start(args)
    name = args.name or args.benchmark
    images = args.images or str(args.data[0] if args.data[0].is_dir() else args.data[0].parent)
    items = list(spread(read_benchmark(args.benchmark, args.data, images), args.most))
    size: list[Number] = []
    if args.model:
        check_writable(args.out, "--out")
        model = chat.load(args)
        size = [
            parameters(sum(p.numel() for p in model.model.parameters()), run=args.model, model=args.model)
        ]
        said = _asked(args, name, model, items, context)
        if distributed.is_main():
            write_answers(args.out, args.benchmark, args.model, items, said)
            _partial(args).unlink(missing_ok=True)
    if distributed.is_main():
        _score(args, name, items, size)


def _asked(
    args: argparse.Namespace, name: str, model: ChatModel, items: list[ChatItem], context: Context
) -> dict[str, str]:
    """Key -> answer; those of a run that was stopped are kept beside --out, and not asked for again."""
    said: dict[str, str] = {}
    if distributed.is_main() and _partial(args).is_file():
        told, kept = read_answers(_partial(args), args.benchmark, items, whole=False)
        said = kept if told == args.model else {}
    said = distributed.broadcast_object(said)
    order = sorted(map(Question.of, items), key=lambda one: len(one.text))  # of about one length together
    rest = [one for one in order if one.item.key not in said]
    for start in range(0, len(rest), KEPT_EVERY):
        own = rest[start : start + KEPT_EVERY]
        said |= ask(
            model, own, context, f"{name} {start}/{len(rest)}", BENCHMARKS[args.benchmark].most_tokens
        )
        if distributed.is_main():
            done = [item for item in items if item.key in said]
            write_answers(_partial(args), args.benchmark, args.model, done, said)
    return said


def _partial(args: argparse.Namespace) -> Path:
    out: Path = args.out
    return out.with_suffix(".partial.jsonl")


def _score(args: argparse.Namespace, name: str, items: list[ChatItem], size: list[Number]) -> None:
    benchmark = BENCHMARKS[args.benchmark]
    model, said = read_answers(args.out, args.benchmark, items)
    if benchmark.submission:
        path = args.out.with_suffix(".submission.json")
        write_json(path, benchmark.submission([(item, said[item.key]) for item in items]))
        print(f"wrote {path} for the server")
    if benchmark.judged and not args.judge_file:
        print(f"{args.out} has {len(said)} answers; give the judge's outputs as --judge-file to score them")
        return
    judged = read_judge(args.judge_file, items) if benchmark.judged else {}
    result = scored(args.benchmark, name, items, said, judged)
    if not result.metrics:
        print(f"--data has no answers; {args.out} waits for the server")
        return
    tags = {"benchmark": args.benchmark, "protocol": benchmark.protocol}
    numbers = size + numbers_of([result], run=model, model=model, tags=tags)
    print(f"{command.table(numbers)}\n{args.benchmark}: {benchmark.protocol}")
    if args.results:
        details = {"command": sys.argv, "torch": torch.__version__, "answers": str(args.out)}
        write_results(Path(args.results), numbers, details, "--results")


if __name__ == "__main__":
    run_tool(main)
