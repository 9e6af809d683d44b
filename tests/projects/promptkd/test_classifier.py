"""A student in the core's classifier format: the same answers, for any number of images, without the project's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from projects.promptkd.student import PromptedStudent, as_classifier, student_classifier
from scripts.to_onnx import Prediction, missing_for_onnx, to_onnx
from tests.projects.promptkd import tiny
from vlmkd.errors import UserError
from vlmkd.export.classifier import (
    export_classifier,
    load_classifier,
    verify_classifiers,
)
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.classifier import ClassifierPredictor

NAMES = ["amber", "blue", "cyan"]


def exported(folder: Path, depth: int) -> ClassifierPredictor:
    """A student of random weights, and its export in `folder`."""
    clip = tiny.clip()
    student = PromptedStudent(clip, 24, depth=depth, length=2, seed=3)
    vectors = ClassVectors(
        vectors=F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(4)), dim=1),
        class_names=NAMES, templates=["a {}"], teacher="t", teacher_digest="d", logit_scale=30.0,
    )  # fmt: skip
    with torch.no_grad():
        for batch_norm in student.projector.modules():
            if isinstance(batch_norm, torch.nn.BatchNorm1d):  # statistics of their own
                batch_norm.running_mean.fill_(0.1)
                batch_norm.running_var.fill_(0.5)
    config, weights = as_classifier(student, student.state_dict(), clip, vectors)
    export_classifier(folder, config, weights)
    return student_classifier("student", student.eval(), vectors, clip.image_spec)


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_export_answers_as_the_student(depth: int, tmp_path: Path) -> None:
    student = exported(tmp_path / "out", depth)
    again = load_classifier(tmp_path / "out")
    torch.testing.assert_close(again.classify(pixels(3)), student.classify(pixels(3)), rtol=1e-5, atol=1e-5)
    assert (again.class_names, again.image_spec) == (NAMES, student.image_spec)
    # What ONNX is made from: the traced graph, for another number of images.
    model = Prediction(again).eval()
    shapes = {"images": {0: torch.export.Dim("batch")}}
    graph = torch.export.export(model, (pixels(2),), dynamic_shapes=shapes).module()
    torch.testing.assert_close(graph(pixels(5)), student.classify(pixels(5)), rtol=1e-5, atol=1e-5)


def test_a_fresh_process_without_the_project_agrees(tmp_path: Path) -> None:
    exported(tmp_path / "out", 2)
    module = load_classifier(tmp_path / "out").module
    verify_classifiers({tmp_path / "out": module})
    module.backbone.prompts.data[..., 0] += 1.0  # not all alike: the norms take a common shift away
    with pytest.raises(UserError, match="logits differs"):
        verify_classifiers({tmp_path / "out": module})


@pytest.mark.skipif(
    bool(missing_for_onnx()), reason="needs the extra `export` (onnx, onnxscript, onnxruntime)"
)
def test_onnx(tmp_path: Path) -> None:
    exported(tmp_path / "out", 2)
    assert to_onnx(tmp_path / "out") == tmp_path / "out" / "model.onnx"
