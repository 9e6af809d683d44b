"""The look at the teacher before a run: a loaded one is asked, a stored one is looked up."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_tools.embed_labelled import embed_items
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.data.loader import Loader
from vlmkd.data.pipelines import ImagePipeline
from vlmkd.data.sources import ItemSource, Stream
from vlmkd.data.teacher_outputs import CLEAN, TeacherOutputs
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.classify import Classification
from vlmkd.image_spec import ImageSpec
from vlmkd.train.task import Task
from vlmkd.train.teacher_check import hardly_knows, look_at_teachers

CLASSES = ["red", "green", "blue"]
SPEC = ImageSpec(size=(4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("right", "count", "classes", "bad"),
    [
        (4, 250, 10, True),  # what a user saw: 1.6 % of ten classes
        (18, 100, 10, True),
        (20, 100, 10, False),
        (54, 100, 2, True),  # twice chance would be all of them
        (56, 100, 2, False),
        (2, 10, 10, False),  # too few images to say so
        (0, 40, 100, False),
        (1, 100, 100, True),
        (3, 256, 1000, False),
        (0, 256, 1000, True),
    ],
)
def test_who_hardly_knows(right: int, count: int, classes: int, bad: bool) -> None:
    assert hardly_knows(right, count, classes) == bad


class Eye:
    """Sees the colour of a picture; a wrong one turns the colours round."""

    def __init__(self, wrong: bool) -> None:
        self.name, self.image_spec, self.class_names, self.logit_scale = "eye", SPEC, CLASSES, 1.0
        self._wrong = wrong

    def classify(self, images: Tensor) -> Tensor:
        colours = images.mean(dim=(2, 3))
        return colours.roll(1, dims=1) if self._wrong else colours

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.classify(images), dim=1)


class Method(Task):
    """A teacher whose embedding is its answer."""

    without_teacher = "loss.method=ce"

    def __init__(self, eye: Eye | None) -> None:
        self._eye = eye

    def teacher_predictors(self) -> dict[str, Any]:
        assert self._eye is not None, "a stored teacher is not loaded for this"
        return {"teacher eye": self._eye}

    def teacher_logits(self, embeds: Tensor) -> Tensor:
        return embeds


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    folder = tmp_path_factory.mktemp("colours")
    found = []
    for number in range(30):
        colour = [10, 10, 10]
        colour[number % 3] = 200 + number
        path = folder / f"{number}.png"
        Image.new("RGB", (4, 4), tuple(colour)).save(path)
        found.append(Item(path.name, ImageRef(str(path)), number % 3))
    return found


def loader(items: list[Item], stored: TeacherOutputs | None = None) -> Loader:
    source = ItemSource({"all": Stream(items, 3)}, seed=0, rank=0, world_size=1)
    return Loader(source, ImagePipeline(SPEC, CLEAN, stored=[[stored]] if stored else []), workers=0)


def look(caplog: pytest.LogCaptureFixture, *arguments: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "vlmkd"):
        look_at_teachers(*arguments, Context(progress=False))
    return [record.getMessage() for record in caplog.records]


def test_a_loaded_teacher_is_asked(items: list[Item], caplog: pytest.LogCaptureFixture) -> None:
    evaluators = [Classification(items, CLASSES, dataset="colours")]
    assert look(caplog, Method(Eye(wrong=False)), evaluators, loader(items)) == []
    mislabelled = [*items[:-3], *(replace(item, label=0) for item in items[-3:])]
    evaluators.append(Classification(mislabelled, CLASSES, dataset="others"))
    (line,) = look(caplog, Method(Eye(wrong=False)), evaluators, loader(items))
    assert line.startswith("teacher eye: 58 of 60 images right before the run (96.7 %; guessing among 3")
    line, advice = look(caplog, Method(Eye(wrong=True)), evaluators, loader(items))
    assert "1 of 60" in line and "hardly knows these classes" in advice and "(loss.method=ce)" in advice
    assert look(caplog, Method(Eye(wrong=True)), [], loader(items)) == []


def test_a_stored_teacher_is_looked_up(
    items: list[Item], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the validation images where they are stored, else by labelled training images."""
    validation, train = items[:9], items[9:]
    evaluators = [Classification(validation, CLASSES, dataset="colours")]
    for name, given, count in (("all", items, 9), ("train", train, 21)):
        facts: dict[str, Any] = {"name": "colours", "source": "eye", "digest": "0" * 64, "views": CLEAN}
        embed_items(Eye(wrong=True), given, tmp_path / name, view_count=1, **facts)
        stored = TeacherOutputs(tmp_path / name, "clean")
        lines = look(caplog, Method(None), evaluators, loader(train, stored))
        assert lines[0].startswith(f"teacher eye (stored): 0 of {count} images right")
        assert len(lines) == 1 + (count >= 20)
