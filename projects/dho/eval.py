"""Classify sets with a trained student or a released checkpoint: fixed, searched or entropy-adaptive mixing.

  python -m projects.dho.eval --model runs/NAME/export --set imagenetv2 imagenet-sketch imagenet-r imagenet-a --root /data
  python -m projects.dho.eval --model zoo:DHO-ViT-B-16-1percent --set imagenet --root /data
  python -m projects.dho.eval --model vit_b_1.pt --classes imagenet --set imagenet-a --root /data --beta 1
  python -m projects.dho.eval --model runs/NAME/export --set caltech101 --root /data --search val

Without --alpha and --beta the model's own mixture is used; --search chooses both on another split of the first set.
Each head is reported too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from projects.dho.legacy import load_released
from projects.dho.mixing import entropy_alpha, mix, search
from projects.dho.selection import HeadClassifier, Shifted, head_logits
from vlmkd import distributed
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.classify import Classification
from vlmkd.export.classifier import load_classifier
from vlmkd.files import check_writable
from vlmkd.models.heads import DualLogits
from vlmkd.models.towers import evaluating
from vlmkd.results import Number, numbers_of, write_results
from vlmkd.zoo import weights_file

_SMALLEST = 1e-30  # below any probability that fp32 softmax tells from 0


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a run's export folder, a released .pt file, or zoo:NAME of one")
    add("--classes", default="", help="set with a released file's class names; default: the first --set")
    add("--set", nargs="+", required=True, dest="sets", help="data sets, as data.set of a config")
    add("--root", default="", help="folder of the data sets")
    add("--split", default="test", help="split that is reported")
    add("--search", default="", metavar="SPLIT", help="choose alpha and beta on this split of the first set")
    add("--entropy", action="store_true", help="alpha for each image from the heads' entropies")
    add("--alpha", type=float, help="weight of the CE head")
    add("--beta", type=float, help="temperature of the KD head")
    add("--batch-size", type=at_least(1), default=64)
    add("--results", type=Path, metavar="FILE", help="write a line a number to FILE, and details beside it")
    args = parser.parse_args(argv)
    if args.search and args.search == args.split:
        raise UserError(f"--search {args.search} is the split that is reported; choose another, e.g. val")
    if args.search and (args.alpha is not None or args.beta is not None or args.entropy):
        raise UserError("--search finds alpha and beta; leave out --alpha, --beta and --entropy")
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha is {args.alpha}; it is a share of 0 to 1")
    if args.beta is not None and args.beta <= 0:
        raise UserError(f"--beta is {args.beta}; it must be above 0")
    if args.results:
        check_writable(args.results, "--results")
    numbers, details = evaluate(args)
    if args.results:
        write_results(args.results, numbers, details, "--results")
    return 0


def evaluate(args: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Results of the mixture and each head on every set."""
    sets = [load_set(name, args.root) for name in args.sets]
    model = weights_file(args.model)
    if model.is_dir():
        inner = load_classifier(model)
    else:
        named = load_set(args.classes, args.root) if args.classes else sets[0]
        inner = load_released(model, named.class_names)
    if inner.mix is None:
        raise UserError(f"model {inner.name} has one head; evaluate it with a run's final test")
    given = (args.alpha, args.beta)
    alpha, beta = (own if value is None else value for value, own in zip(given, inner.mix, strict=True))
    context = Context(device=distributed.device(), batch_size=args.batch_size)
    inner.module.to(context.device)

    @torch.no_grad()
    def heads(images: Tensor) -> DualLogits:
        with evaluating(inner.module):
            output: DualLogits = inner.module(images.to(context.device))
        return output

    classifier = partial(HeadClassifier, inner.name, inner.image_spec, inner.class_names, heads)
    if args.search:
        items, title = items_of(sets[0], args.search), f"{sets[0].name} {args.search}"
        logits, labels, _ = head_logits(classifier(lambda logits: logits.ce), items, title, context)
        found = search(*logits, labels)
        alpha, beta = found.alpha, found.beta
        print(f"alpha {alpha:g}  beta {beta:g}  {title} {found.accuracy:.4f}")

    def mixed(logits: DualLogits) -> Tensor:
        weight = entropy_alpha(*logits) if args.entropy else alpha
        return mix(*logits, weight, beta).clamp_min(_SMALLEST).log()

    answers: dict[str, Callable[[DualLogits], Tensor]] = {
        "mixed": mixed,
        "ce": lambda logits: logits.ce,
        "kd": lambda logits: logits.kd,
    }
    numbers: list[Number] = []
    details: dict[str, Any] = {}
    for dataset in sets:
        evaluator = Shifted(Classification.of(dataset, args.split))
        for answer, of in answers.items():
            (result,) = evaluator.run(classifier(of), context)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            print(f"{result.dataset}  {answer}  {shown}")
            tags = {"answer": answer} | ({"alpha": alpha, "beta": beta} if answer == "mixed" else {})
            numbers += numbers_of([result], run=args.model, model=args.model, tags=tags)
            details.setdefault(dataset.name, {})[answer] = result.details
    return numbers, details


if __name__ == "__main__":
    run_tool(main)
