"""Test sets with some of the student's classes: the answers compete among these alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from projects.dho.selection import HeadClassifier, Shifted
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.classify import Classification
from vlmkd.image_spec import ImageSpec
from vlmkd.models.heads import DualLogits

NAMES = ["missile", "cat", "dog", "missile"]


def student(logits: list[list[float]]) -> HeadClassifier:
    """Answers the images in their order with these rows."""

    def heads(images: Tensor) -> DualLogits:
        return DualLogits(torch.tensor(logits)[: len(images)], torch.zeros(len(images), 4))

    spec = ImageSpec(size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)
    return HeadClassifier("student", spec, NAMES, heads, lambda both: both.ce)


def shifted(folder: Path, class_names: list[str], labels: list[int]) -> Shifted:
    """A set of one picture a label."""
    items = []
    for number, label in enumerate(labels):
        Image.new("RGB", (5, 5)).save(folder / f"{number}.png")
        items.append(Item(str(number), ImageRef(str(folder / f"{number}.png")), label))
    return Shifted(Classification(items, class_names, dataset="shift"))


def test_answers_compete_among_the_sets_classes_and_the_higher_of_two_equal_names_counts(
    tmp_path: Path,
) -> None:
    context = Context(batch_size=8, progress=False)
    rows = [
        [0.0, 1.0, 9.0, 2.0],  # dog is no class of the set; the second missile is surer than cat
        [0.0, 3.0, 9.0, 2.0],
        [4.0, 3.0, 9.0, 2.0],
    ]
    (result,) = shifted(tmp_path, ["cat", "missile"], [1, 0, 0]).run(student(rows), context)
    assert result.metrics["top1"] == pytest.approx(2 / 3) and result.count == 3
    with pytest.raises(
        UserError, match=r"test set shift: 1 of its classes are not the student's \(first: owl\)"
    ):
        shifted(tmp_path, ["cat", "owl"], [0]).run(student(rows), context)
