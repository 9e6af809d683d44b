"""Checkpoints in the released code's format: read, converted to equal logits, and nothing executed."""

from __future__ import annotations

import argparse
import os
import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from projects.vl2v_adip.convert_vl2v import convert, read_checkpoint
from vlmkd.classifier_export import export_classifier, load_classifier
from vlmkd.errors import UserError
from vlmkd.models.backbones import load_backbone, with_spec

CLASSES = ["cat", "dog", "fox"]


def checkpoint(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A released-format file with a tiny network, and its tensors."""
    torch.manual_seed(0)
    network = load_backbone("timm:test_resnet", False, image_size=32)
    text = 100 * F.normalize(torch.randn(3, 8), dim=1)
    state = {f"featurizer.network.{name}": value for name, value in network.module.state_dict().items()}
    state |= {"proj_lyr.weight": torch.randn(8, network.dim), "proj_lyr.bias": torch.randn(8)}
    for prefix in ("clip_cls", "classifier"):
        state |= {f"{prefix}.weight": text.clone(), f"{prefix}.bias": torch.zeros(3)}
    state |= changes
    arguments = {"out_dir": pathlib.PosixPath("train_output/x"), "swad": True}
    for args in (arguments, argparse.Namespace(**arguments)):
        torch.save({"args": args, "model_hparams": {"lr": 5e-5}, "test_envs": [0], "model_dict": state}, path)
        assert read_checkpoint(path).keys() == state.keys()
    return state


def test_a_released_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "TE0_best.pth")
    backbone = with_spec(load_backbone("timm:test_resnet", False, image_size=32), resize_mode="squash")
    config, weights = convert(
        read_checkpoint(tmp_path / "TE0_best.pth"), backbone, CLASSES, ["a photo of a {}"]
    )
    export_classifier(tmp_path / "out", config, weights)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = backbone.module.eval()(images)
        z = F.normalize(features @ state["proj_lyr.weight"].T + state["proj_lyr.bias"], dim=1)
    expected = z @ state["classifier.weight"].T
    torch.testing.assert_close(
        load_classifier(tmp_path / "out").classify(images), expected, rtol=0, atol=1e-4
    )


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
    state = checkpoint(tmp_path / "a.pth", **{"clip_cls.weight": torch.zeros(3, 8)})
    with pytest.raises(UserError, match="two that differ"):
        convert(state, backbone, CLASSES, [])
    state = checkpoint(tmp_path / "a.pth")
    with pytest.raises(UserError, match="3 classes, the data set 2"):
        convert(state, backbone, CLASSES[:2], [])
