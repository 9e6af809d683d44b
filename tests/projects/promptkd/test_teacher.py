"""The teacher's class vectors, whoever asks for them."""

from __future__ import annotations

import torch

from data_tools.emoji.catalog import class_names
from projects.promptkd.build import class_vectors
from projects.promptkd.config import ClipConfig, StudentConfig, TeacherSource
from projects.promptkd.prompts import PromptedCLIP, PromptShape
from projects.promptkd.teacher import Teacher
from vlmkd.config import EvaluationConfig
from vlmkd.data.labelled import LabelledSet
from vlmkd.models.clip import load_clip


def test_class_vectors_are_equal_to_the_bit_however_they_are_made() -> None:
    """At a hundred classes a text tower's bits depend on how many of them one pass takes."""
    clip = load_clip("zoo:tinyclip-emoji-teacher")
    shape = PromptShape(image_depth=1, image_length=1, text_depth=2, text_length=2)
    teacher = Teacher(clip, PromptedCLIP(clip, shape, init="an emoji of", seed=0), "an emoji of {}", "", "")
    dataset = LabelledSet("many", class_names(), ["{}"], {})
    cfg = StudentConfig(
        run_dir="unused",
        student=ClipConfig(model="unused"),
        teacher=TeacherSource(clip=ClipConfig(model="unused")),
        evaluation=EvaluationConfig(batch_size=1000),
    )
    with torch.no_grad():
        at_start = class_vectors(cfg, dataset, teacher).vectors
        assert at_start.shape[0] == 100
        assert torch.equal(teacher.class_vectors(dataset).vectors, at_start)
