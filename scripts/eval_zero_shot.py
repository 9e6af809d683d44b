#!/usr/bin/env python
"""Zero-shot classification of any CLIP, or of an exported classifier: top-1, top-5 and mean per-class accuracy.

  python scripts/eval_zero_shot.py --model zoo:NAME ViT-B-32/openai --data /data/imagenet --results out.jsonl
  python scripts/eval_zero_shot.py --model runs/my_run --data emoji:unseen_drawing emoji:unseen_concept
  python scripts/eval_zero_shot.py --model classifier:runs/my_dho/export --data emoji:unseen_drawing

--data takes an ImageNet-layout folder (val/<class>/*), a folder or list of webdataset shards with `cls` members, or
an embedded set. Class names and templates come from classnames.txt and templates.txt beside the data, else from the
folders' names (OpenAI's names for ImageNet's wnids) and OpenAI's 80 templates.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import evaluation_command as command
from scripts.agreement import Agreement
from vlmkd.datasets.evaluation_sets import zero_shot_set
from vlmkd.errors import run_tool
from vlmkd.evaluation.base import Context, Evaluator
from vlmkd.evaluation.classify import Classification
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = command.parser(__doc__ or "")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="sets to classify")
    parser.add_argument(
        "--class-names", nargs="+", default=[], metavar="NAMES", help="`imagenet`, or a text file"
    )
    parser.add_argument(
        "--templates", nargs="+", default=[], help="`openai`, `simple`, or a text file with {} or {c}"
    )
    parser.add_argument(
        "--teacher", default="", metavar="NAME", help="add agreement and KL with this model's answers"
    )
    args = parser.parse_args(argv)
    return command.run(args, lambda context: _evaluators(args, context))


def _evaluators(args: argparse.Namespace, context: Context) -> list[Evaluator]:
    class_names = command.per_set(args.class_names, args.data, "--class-names")
    templates = command.per_set(args.templates, args.data, "--templates")
    names = command.per_set(args.name, args.data, "--name", shared=False)
    sets = [
        zero_shot_set(data, class_names=class_names[index], templates=templates[index], name=names[index])
        for index, data in enumerate(args.data)
    ]
    evaluators: list[Evaluator] = [Classification.of(one) for one in sets]
    if args.teacher:
        clip = load_clip(*command.model_name(args.teacher))
        clip.module.to(context.device)
        teacher = ClipPredictor.of(clip, args.teacher)
        evaluators += [Agreement(teacher, one) for one in sets]
    return evaluators


if __name__ == "__main__":
    run_tool(main)
