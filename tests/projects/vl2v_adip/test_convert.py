"""Checkpoints in the released code's format: converted to equal logits, Distill starts from them, nothing executed."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.vl2v_adip.build import job
from projects.vl2v_adip.config import DistillConfig
from projects.vl2v_adip.convert_vl2v import convert, main, read_checkpoint, student_weights
from projects.vl2v_adip.folds import FACTS
from scripts.table import Pivot, read_spec, scores_of, sources_in
from tests.projects.vl2v_adip import tiny
from vlmkd import config as configs
from vlmkd.errors import UserError
from vlmkd.export.classifier import load_classifier
from vlmkd.models.backbones import load_backbone
from vlmkd.models.class_vectors import encode_classes
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor

SPEC = Path(__file__).parents[3] / "projects/vl2v_adip/table.yaml"
CLASSES = ["cat", "dog", "red fox"]


class Munch(dict):
    """Pickles as munch.Munch 2 to 4 does: items one by one, and all of them again as its state."""

    __module__ = "munch"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("the package's own code was called")


class ScalarFloat(float):
    """Pickles as ruamel.yaml's: a float, and how it was written as its state."""

    __module__ = "ruamel.yaml.scalarfloat"

    def __new__(cls, value: float) -> ScalarFloat:
        return super().__new__(cls, value)

    def __init__(self, value: float) -> None:
        self._width, self._prec, self._m_sign, self._exp = 6, 1, False, "e"


@contextmanager
def named_as_in_their_packages() -> Iterator[None]:
    """The two classes under the names by which a released file knows them, while it is written."""
    modules = {
        name: types.ModuleType(name) for name in ("munch", "ruamel", "ruamel.yaml", ScalarFloat.__module__)
    }
    for kind in (Munch, ScalarFloat):
        setattr(modules[kind.__module__], kind.__name__, kind)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def model_dict(vectors: Tensor, **changes: Any) -> dict[str, Tensor]:
    """The weights of a tiny released student."""
    torch.manual_seed(0)
    network = load_backbone("timm:test_resnet", False, image_size=32)
    state = {f"featurizer.network.{name}": value for name, value in network.module.state_dict().items()}
    width = vectors.shape[1]
    state |= {"proj_lyr.weight": torch.randn(width, network.dim), "proj_lyr.bias": torch.randn(width)}
    for prefix in ("clip_cls", "classifier"):
        state |= {f"{prefix}.weight": 100 * vectors, f"{prefix}.bias": torch.zeros(len(vectors))}
    return state | changes


def save(path: Path, state: dict[str, Any], *, algorithm: str = "DFC_STAGE1", test_envs: Any = (1,)) -> Path:
    """A file as the released code writes it."""
    arguments = {
        "algorithm": algorithm,
        "trial_seed": 2,
        "out_dir": pathlib.PosixPath("train_output/x"),
        "swad": True,
    }
    hparams = Munch(lr=ScalarFloat(5e-5), swad_kwargs=Munch(tolerance_ratio=ScalarFloat(0.3)), batch_size=32)
    with named_as_in_their_packages():
        torch.save(
            {
                "args": argparse.Namespace(**arguments),
                "model_hparams": hparams,
                "test_envs": list(test_envs) if isinstance(test_envs, tuple) else test_envs,
                "model_dict": state,
            },
            path,
        )
    return path


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(1)), dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain tree and a teacher."""
    path = tmp_path_factory.mktemp("released")
    tiny.domain_tree(path / "tree", per_class=5)
    tiny.export_teacher(path)
    return path


@pytest.fixture(scope="module")
def vectors(folder: Path) -> Tensor:
    """The class vectors of that teacher, as the released code makes them."""
    clip = ClipPredictor.of(load_clip(f"local-dir:{folder / 'teacher'}"))
    return encode_classes(clip, CLASSES, ["a photo of a {}"], teacher_digest="").vectors


def test_the_genuine_classes_are_read_as_data_without_their_packages(tmp_path: Path) -> None:
    path = save(tmp_path / "TE1_best.pth", model_dict(unit(3, 8)))
    assert "munch" not in sys.modules and "ruamel.yaml" not in sys.modules
    with pytest.raises(Exception, match="munch.Munch|scalarfloat|argparse"):
        torch.load(path, weights_only=True)  # why stand-ins are needed
    released = read_checkpoint(path)
    assert (released.test_env, released.facts["trial_seed"]) == (1, 2)
    wrapped = {f"module.{name}": value for name, value in released.weights.items()}
    again = read_checkpoint(save(tmp_path / "wrapped.pth", wrapped))
    assert again.weights.keys() == released.weights.keys()


def test_a_converted_align_starts_distill_and_enters_the_table(folder: Path, vectors: Tensor) -> None:
    state = model_dict(vectors)
    path = save(folder / "TE1_best.pth", state)
    base, run_dir = str(tiny.config(folder, "stack")), folder / "runs" / "released"
    assert main([str(path), str(run_dir), base, "fold.test_domain=oil"]) == 0

    # The same logits as a plain re-implementation.
    backbone = load_backbone("timm:test_resnet", False, image_size=32)
    backbone.image_spec = replace(backbone.image_spec, resize_mode="squash")
    student_weights(state, backbone)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = backbone.module.eval()(images)
        z = F.normalize(features @ state["proj_lyr.weight"].T + state["proj_lyr.bias"], dim=1)
    expected = z @ state["classifier.weight"].T
    loaded = load_classifier(run_dir / "export")
    scale = loaded.module.head.logit_scale  # the teacher's own, not exactly 100
    torch.testing.assert_close(loaded.classify(images) * 100 / scale, expected, rtol=0, atol=1e-3)
    assert (loaded.image_spec.mean, loaded.image_spec.resize_mode) == ((0.485, 0.456, 0.406), "squash")

    facts = json.loads((run_dir / "export" / FACTS).read_text())
    assert (facts["method"], facts["test_domain"], facts["trial_seed"]) == ("align", "oil", 2)
    distill = [base, "run_dir=x", "method=distill", "fold.trial_seed=2"]
    with pytest.raises(UserError, match="no export below .* legacy_norm False"):
        job(configs.load(DistillConfig, distill))
    student = job(configs.load(DistillConfig, [*distill, "legacy_norm=true"])).task.student
    for name, value in student_weights(state, backbone).items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=0, atol=1e-5)

    (table,) = read_spec(SPEC).tables
    (score,) = scores_of(table, sources_in(folder / "runs"))
    assert (score.row, score.column, score.over) == (("align", "iid"), "oil", "2")
    assert "| align | iid |" in Pivot(table, [score]).markdown()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"test_envs": (0, 1)}, [], "test_envs .0, 1.; it needs the one held-out domain"),
        ({"test_envs": None}, [], "test_envs None"),
        ({"test_envs": (7,)}, [], "holds out domain 7; .* has 3"),
        ({}, ["fold.test_domain=ink"], "fold.test_domain is 'ink'; .* holds out oil"),
        ({}, [], "has other class vectors"),
        ({"algorithm": "ERM"}, ["method=erm", "teacher.model="], "method is erm"),
    ],
)
def test_what_does_not_fit_the_config_is_refused(
    changes: dict[str, Any], arguments: list[str], message: str, folder: Path, vectors: Tensor, tmp_path: Path
) -> None:
    spread = F.normalize(vectors + unit(*vectors.shape), dim=1) if "class vectors" in message else vectors
    path = save(tmp_path / "file.pth", model_dict(spread), **changes)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out", [str(tiny.config(folder, "stack")), *arguments])
    assert not (tmp_path / "out").exists()


class Harmful:
    """Unpickling it would call os.mkdir."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"args": Harmful(str(tmp_path / "ran")), "model_dict": {}}, path)
    with pytest.raises(UserError, match="names posix.mkdir, which is code"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_other_content_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no model_dict"):
        read_checkpoint(tmp_path / "other.pth")
    backbone = load_backbone("timm:test_resnet", False, image_size=32)
    with pytest.raises(UserError, match="two that differ"):
        student_weights(model_dict(unit(3, 8), **{"clip_cls.weight": torch.zeros(3, 8)}), backbone)
    rows = torch.randn(3, 8)
    long = {name: rows for name in ("clip_cls.weight", "classifier.weight")}
    with pytest.raises(UserError, match="differ in length"):
        student_weights(model_dict(unit(3, 8), **long), backbone)
    with pytest.raises(UserError, match="unknown tensors: q"):
        student_weights(model_dict(unit(3, 8), q=torch.zeros(1)), backbone)
