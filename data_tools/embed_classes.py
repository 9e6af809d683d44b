r"""Write the class vectors of a labelled set: what a teacher's text side says about its classes, prompt by prompt.

    python data_tools/embed_classes.py --set emoji --model zoo:tinyclip-emoji-teacher --out vectors.safetensors
    python data_tools/embed_classes.py --set office_home --root data --templates 'a photo of a {}' \
        --black-box https://HOST/embed --token-env TOKEN --teacher-id vendor-v3 --dim 512 --ledger ledger.sqlite \
        --max-queries 15653 --out vectors.safetensors

Runs name the file in `teacher.class_vectors` (DHO, VL2V-ADiP) or `class_vectors` (PromptKD; a prompted teacher's are written by
its build_bank.py). A black box is asked for each prompt of each class through the same ledger as for images
(data_tools/embed_labelled.py), once and for all: a further call, another set that shares classes, or an interrupted call
pays for new prompts only. The budget is that of the teacher in the ledger, for images and texts together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from vlmkd import teacher_options
from vlmkd.class_names import read_templates
from vlmkd.data.ledger import Prices, text_query
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError, run_tool
from vlmkd.files import check_writable
from vlmkd.models.class_vectors import class_prompts, encode_classes
from vlmkd.predictors import TextEncoder


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser, box_only = _parser()
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out} must end in .safetensors")
    check_writable(args.out, "--out")
    if args.threads:
        torch.set_num_threads(args.threads)
    dataset = load_set(args.set, args.root)
    templates = chosen_templates(args.templates, dataset.templates)
    encoder: TextEncoder
    paid = ""
    if args.black_box:
        box = teacher_options.ledger(args, Prices(text=args.price or 0.0))
        asked = box.require_budget(text_query(text) for text in class_prompts(dataset.class_names, templates))
        encoder, digest, paid = box, box.digest, f", {asked} texts asked"
    else:
        encoder, digest = teacher_options.encoder(args, box_only)
    vectors = encode_classes(
        encoder, dataset.class_names, templates, args.normalise, teacher_digest=digest,
        batch_size=args.batch_size,
    )  # fmt: skip
    vectors.save(Path(args.out))
    print(
        f"{args.out}: {len(vectors.class_names)} classes, {len(templates)} prompts each, by {vectors.teacher}, "
        f"digest {vectors.digest[:12]}{paid}"
    )
    return 0


def chosen_templates(given: list[str], own: list[str]) -> list[str]:
    """The prompts of `--templates`; `own` are the set's."""
    if len(given) == 1 and "{" not in given[0]:
        return read_templates(given[0])
    return given or own


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", required=True, help="as data.set")
    add("--root", default="", help="as data.root")
    add("--out", required=True, help="file of the class vectors, .safetensors")
    add("--templates", nargs="+", default=[], metavar="T",
        help="prompts with {} for the class, or one of: openai (80), simple (7), a text file; default: the set's own")  # fmt: skip
    add("--normalise", choices=["each_and_mean", "each", "mean", "none"], default="each_and_mean",
        help="which vectors are made unit vectors: each prompt's, the mean (a black box gives unit vectors only)")  # fmt: skip
    add("--batch-size", type=int, default=64, help="prompts per forward pass, or per call")
    return parser, teacher_options.add_options(parser)


if __name__ == "__main__":
    run_tool(main)
