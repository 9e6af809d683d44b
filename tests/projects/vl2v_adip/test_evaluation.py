"""Accuracy and cross entropy of a domain's part against a sum by hand, unreadable files left out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from projects.vl2v_adip.evaluation import DomainAccuracy
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context
from vlmkd.image_spec import ImageSpec


class ByRed:
    """Logits [red, 1 - red] of an image's mean red."""

    name = "by red"
    image_spec = ImageSpec(size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    class_names = ["red", "dark"]

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        red = images[:, 0].mean((1, 2))
        return torch.stack([red, 1 - red], dim=1)


def items(folder: Path, reds: list[int], labels: list[int]) -> list[Item]:
    """One-coloured pictures."""
    found = []
    for index, (red, label) in enumerate(zip(reds, labels, strict=True)):
        path = folder / f"{index}.png"
        Image.new("RGB", (4, 4), (red, 0, 0)).save(path)
        found.append(Item(path.name, ImageRef(str(path)), label))
    return found


def test_top1_and_the_mean_cross_entropy(tmp_path: Path) -> None:
    reds, labels = [255, 51, 204, 0, 102], [0, 0, 0, 1, 1]
    (result,) = DomainAccuracy(items(tmp_path, reds, labels), ByRed.class_names, dataset="ink_out").run(
        ByRed(), Context(batch_size=2, progress=False)
    )
    losses = []
    for red, label in zip(reds, labels, strict=True):
        logits = [red / 255, 1 - red / 255]
        losses.append(math.log(sum(map(math.exp, logits))) - logits[label])
    assert (result.dataset, result.count) == ("ink_out", 5)
    assert result.metrics["top1"] == pytest.approx(4 / 5)  # the second is red but dark
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 5, abs=1e-6)


def test_an_unreadable_file_is_left_out_and_named_and_an_empty_part_refused(tmp_path: Path) -> None:
    found = items(tmp_path, [255, 0], [0, 1])
    (tmp_path / "1.png").write_bytes(b"torn")
    context = Context(batch_size=2, progress=False, max_unreadable_share=0.6)
    (result,) = DomainAccuracy(found, ByRed.class_names, dataset="ink_out").run(ByRed(), context)
    assert result.count == 1 and result.details["unreadable"] == [str(tmp_path / "1.png")]
    with pytest.raises(UserError, match="ink_out has no images"):
        DomainAccuracy([], ByRed.class_names, dataset="ink_out")
