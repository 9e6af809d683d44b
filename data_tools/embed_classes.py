"""Write the class vectors of a labelled set: what a teacher's text side says about its classes, prompt by prompt.

    python data_tools/embed_classes.py --set emoji --model zoo:tinyclip-emoji-teacher --out vectors.safetensors

Runs name the file in `teacher.class_vectors` (DHO, VL2V-ADiP) or `class_vectors` (PromptKD; a prompted teacher's are written by
its build_bank.py). A teacher that is paid per query is asked by projects/vl2v_adip/ask.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data_tools import teacher_options
from vlmkd.class_names import read_templates
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError, run_tool
from vlmkd.files import check_writable
from vlmkd.models.class_vectors import encode_classes


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out} must end in .safetensors")
    check_writable(args.out, "--out")
    if args.threads:
        torch.set_num_threads(args.threads)
    dataset = load_set(args.set, args.root)
    templates = chosen_templates(args.templates, dataset.templates)
    encoder, digest = teacher_options.encoder(args)
    vectors = encode_classes(
        encoder, dataset.class_names, templates, args.normalise, teacher_digest=digest,
        batch_size=args.batch_size,
    )  # fmt: skip
    vectors.save(Path(args.out))
    print(
        f"{args.out}: {len(vectors.class_names)} classes, {len(templates)} prompts each, by {vectors.teacher}, "
        f"digest {vectors.digest[:12]}"
    )
    return 0


def chosen_templates(given: list[str], own: list[str]) -> list[str]:
    """The prompts of `--templates`; `own` are the set's."""
    if len(given) == 1 and "{" not in given[0]:
        return read_templates(given[0])
    return given or own


def _parser() -> argparse.ArgumentParser:
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
        help="which vectors are made unit vectors: each prompt's, the mean")  # fmt: skip
    add("--batch-size", type=int, default=64, help="prompts per forward pass")
    teacher_options.add_options(parser)
    return parser


if __name__ == "__main__":
    run_tool(main)
