"""Classify sets with a trained student or a released checkpoint: fixed, searched or entropy-adaptive mixing.

  python -m projects.dho.eval --model runs/NAME/export --set imagenetv2 imagenet-sketch imagenet-r imagenet-a --root /data
  python -m projects.dho.eval --model zoo:DHO-ViT-B-16-1percent --set imagenet --root /data
  python -m projects.dho.eval --model vit_b_1.pt --classes imagenet --set imagenet-a --root /data --beta 1
  python -m projects.dho.eval --model runs/NAME/export --set caltech101 --root /data --search val

Without --alpha and --beta the model's own mixture is used. --search chooses both on another split of the first set, never
on the split that is reported. The CE head and the KD head are reported too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from projects.dho.legacy import load_released
from projects.dho.mixing import entropy_alpha, mix, search
from projects.dho.selection import Shifted, head_logits
from vlmkd import distributed
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.errors import UserError, run_tool
from vlmkd.evaluation.base import Context, Result
from vlmkd.evaluation.classify import Classification
from vlmkd.export.classifier import load_classifier
from vlmkd.files import check_writable
from vlmkd.models.classifier import ClassifierPredictor
from vlmkd.models.heads import DualLogits
from vlmkd.models.towers import evaluating
from vlmkd.results import Number, numbers_of, write_results
from vlmkd.zoo import weights_file

_SMALLEST = 1e-30  # below any probability that fp32 softmax tells from 0


class TwoHeads:
    """The predictor of an exported dual-head classifier, with its heads apart."""

    def __init__(self, inner: ClassifierPredictor, *, entropy: bool = False, only: str = "") -> None:
        """`only` names one head (`ce` or `kd`) that answers alone."""
        if inner.mix is None:
            raise UserError(f"model {inner.name} has one head; evaluate it with a run's final test")
        self.name, self.image_spec, self.class_names = inner.name, inner.image_spec, inner.class_names
        self.alpha, self.beta = inner.mix
        self._inner, self._entropy, self._only = inner, entropy, only

    @torch.no_grad()
    def heads(self, images: Tensor) -> DualLogits:
        """Logits [B, C] of both heads."""
        device = next(self._inner.module.parameters()).device
        with evaluating(self._inner.module):
            output: DualLogits = self._inner.module(images.to(device))
        return output

    def classify(self, images: Tensor) -> Tensor:
        """Logits of one head, or the logarithm of the mixture, [B, C]."""
        logits = self.heads(images)
        if self._only:
            found: Tensor = getattr(logits, self._only)
            return found
        alpha = entropy_alpha(*logits) if self._entropy else self.alpha
        return mix(*logits, alpha, self.beta).clamp_min(_SMALLEST).log()


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a run's export folder, a released .pt file, or zoo:NAME of one")
    add(
        "--classes",
        default="",
        help="data set whose class names a released file has; default: the first --set",
    )
    add("--set", nargs="+", required=True, dest="sets", help="data sets, as data.set of a config")
    add("--root", default="", help="folder of the data sets")
    add("--split", default="test", help="split that is reported")
    add("--search", default="", metavar="SPLIT", help="choose alpha and beta on this split of the first set")
    add("--entropy", action="store_true", help="alpha for each image from the heads' entropies")
    add("--alpha", type=float, help="weight of the CE head")
    add("--beta", type=float, help="temperature of the KD head")
    add("--batch-size", type=int, default=64)
    add("--results", type=Path, metavar="FILE", help="write a line a number to FILE, and details beside it")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
    if args.results:
        check_writable(args.results, "--results")
    numbers, details = evaluate(args)
    if args.results:
        write_results(args.results, numbers, details, "--results")
    return 0


def evaluate(args: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Results of the mixture and of each head on every set."""
    if args.search and args.search == args.split:
        raise UserError(f"--search {args.search} is the split that is reported; choose another, e.g. val")
    if args.search and (args.alpha is not None or args.beta is not None or args.entropy):
        raise UserError("--search finds alpha and beta; leave out --alpha, --beta and --entropy")
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha is {args.alpha}; it is a share of 0 to 1")
    if args.beta is not None and args.beta <= 0:
        raise UserError(f"--beta is {args.beta}; it must be above 0")
    sets = [load_set(name, args.root) for name in args.sets]
    model = weights_file(args.model)
    if model.is_dir():
        inner = load_classifier(model)
    else:
        classes = load_set(args.classes, args.root) if args.classes else sets[0]
        inner = load_released(model, classes.class_names)
    device = distributed.device()
    inner.module.to(device)
    context = Context(device=device, batch_size=args.batch_size)
    predictor = TwoHeads(inner, entropy=args.entropy)
    predictor.alpha = predictor.alpha if args.alpha is None else args.alpha
    predictor.beta = predictor.beta if args.beta is None else args.beta
    if args.search:
        items = items_of(sets[0], args.search)
        logits, labels, _ = head_logits(predictor, items, f"{sets[0].name} {args.search}", context)
        found = search(*logits, labels)
        predictor.alpha, predictor.beta = found.alpha, found.beta
        print(
            f"alpha {found.alpha:g}  beta {found.beta:g}  {sets[0].name} {args.search} {found.accuracy:.4f}"
        )
    numbers: list[Number] = []
    details: dict[str, Any] = {}
    for dataset in sets:
        evaluator = Shifted(Classification.of(dataset, args.split))
        for answer in ("mixed", "ce", "kd"):
            asked = predictor if answer == "mixed" else TwoHeads(inner, only=answer)
            (result,) = evaluator.run(asked, context)
            print(_line(result, answer))
            mixture = {"alpha": predictor.alpha, "beta": predictor.beta} if answer == "mixed" else {}
            tags = {"answer": answer, **mixture}
            numbers += numbers_of([result], run=args.model, model=args.model, tags=tags)
            details.setdefault(dataset.name, {})[answer] = result.details
    return numbers, details


def _line(result: Result, answer: str) -> str:
    shown = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    return f"{result.dataset}  {answer}  {shown}"


if __name__ == "__main__":
    run_tool(main)
