"""Zero-shot accuracy of a teacher from its stored embeddings of test images and its class vectors; no model is loaded.

  python -m projects.dho.eval_teacher OUTPUTS CLASSES [--results FILE]

OUTPUTS is of data_tools/embed_labelled.py --splits test, CLASSES of data_tools/embed_classes.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.errors import UserError, run_tool
from vlmkd.evaluation.base import Result
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.results import numbers_of, share, write_results


def zero_shot(outputs: Path, classes: Path) -> Result:
    """The share of the test images whose stored embedding is nearest to its own class's vector.

    Raises:
        UserError: files that are missing, or of two teachers.
    """
    stored, vectors = TeacherOutputs(outputs), ClassVectors.load(classes)
    if stored.info.digest != vectors.teacher_digest:
        raise UserError(f"{outputs} and {classes} are of two teachers; make both with one model")
    found = [(item.label, stored.get(item.key)) for item in items_of(load_set(stored.info.set_name), "test")]
    kept = [(label, entry.image_embeds[0]) for label, entry in found if entry is not None]
    answers = vectors.logits(torch.stack([embeds for _, embeds in kept])).argmax(dim=-1)
    right = (answers == torch.tensor([label for label, _ in kept])).float().mean()
    meanings = {"top1": share("top-1", main=True)}
    return Result(
        "classification", stored.info.set_name, {"top1": float(right)}, len(kept), meanings=meanings
    )


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outputs", type=Path)
    parser.add_argument("classes", type=Path)
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the number to FILE")
    args = parser.parse_args(argv)
    result = zero_shot(args.outputs, args.classes)
    print(f"{result.dataset}: top-1 {100 * result.metrics['top1']:.1f} % of {result.count} images")
    if args.results:
        write_results(
            args.results, numbers_of([result], run=str(args.outputs), model="teacher"), what="--results"
        )
    return 0


if __name__ == "__main__":
    run_tool(main)
