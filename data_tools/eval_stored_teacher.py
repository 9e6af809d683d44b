"""Zero-shot accuracy of a teacher from its stored embeddings of test images and its class vectors; no model is loaded.

    python data_tools/eval_stored_teacher.py OUTPUTS CLASSES [--results FILE]

OUTPUTS is of embed_labelled.py --splits test, CLASSES of embed_classes.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.errors import UserError, run_tool
from vlmkd.evaluation.base import Result
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.results import numbers_of, share, write_results


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outputs", type=Path)
    parser.add_argument("classes", type=Path)
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the number to FILE")
    args = parser.parse_args(argv)
    stored, vectors = TeacherOutputs(args.outputs), ClassVectors.load(args.classes)
    if stored.info.digest != vectors.teacher_digest:
        raise UserError(f"{args.outputs} and {args.classes} are of two teachers; make both with one model")
    name = stored.info.set_name
    found = [(item.label, stored.get(item.key)) for item in items_of(load_set(name), "test")]
    labels, embeds = zip(
        *((label, one.columns["image_embeds"][0].float()) for label, one in found if one), strict=True
    )
    right = vectors.logits(torch.stack(embeds)).argmax(dim=-1) == torch.tensor(labels)
    top1, meanings = float(right.float().mean()), {"top1": share("top-1", main=True)}
    print(f"{name}: top-1 {100 * top1:.1f} % of {len(labels)} images")
    if args.results:
        result = Result("classification", name, {"top1": top1}, len(labels), meanings=meanings)
        numbers = numbers_of([result], run=str(args.outputs), model="teacher")
        write_results(args.results, numbers, what="--results")
    return 0


if __name__ == "__main__":
    run_tool(main)
