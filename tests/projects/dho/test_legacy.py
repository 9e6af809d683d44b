"""Released checkpoints: files built the way the released code saves them, read without running anything."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from torch import nn

from projects.dho.legacy import load_released, read_checkpoint
from vlmkd.errors import UserError

CLASSES = 7


class Released(nn.Module):
    """The released student's module tree: backbone, ce_head, kd_head."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.ce_head = nn.Linear(width, CLASSES)
        self.kd_head = nn.Linear(width, CLASSES)


def tower(**options: Any) -> nn.Module:
    """A small CLIP image tower with quick GELU."""
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "heads": 1,
        "mlp_ratio": 4.0,
        "output_dim": 24,
    }
    act_layer = open_clip.transformer.QuickGELU
    return open_clip.transformer.VisionTransformer(**{**sizes, **options}, act_layer=act_layer)


def cnn(name: str) -> nn.Module:
    """The children of a torchvision network without its classifier, in a row."""
    return nn.Sequential(*list(getattr(torchvision.models, name)(weights=None).children())[:-1])


def test_a_low_shot_file_saved_from_ddp(tmp_path: Path) -> None:
    model = Released(tower(), 24)
    state = OrderedDict((f"module.{name}", value) for name, value in model.state_dict().items())
    file = tmp_path / "vit_b_1.pt"
    torch.save({"model_state_dict": state, "epoch": 31, "acc": 81.6, "alpha": 0.5, "beta": 1}, file)
    read = read_checkpoint(file)
    assert (read.family, read.alpha, read.beta) == ("clip", 0.5, 1.0)
    assert read.vision_config == {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
    assert read.backbone.keys() == model.backbone.state_dict().keys()
    assert torch.equal(read.kd_weight, model.kd_head.weight) and torch.equal(read.ce_bias, model.ce_head.bias)


def test_the_number_of_tensors_of_a_real_vit_b_16(tmp_path: Path) -> None:
    """156 tensors with both heads, as many as the published file (shapes on the meta device)."""
    with torch.device("meta"):
        model = Released(
            tower(image_size=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512), 512
        )
    assert len(model.state_dict()) == 156


@pytest.mark.parametrize(("name", "width", "tensors"), [("resnet18", 512, 124), ("mobilenet_v2", 1280, 316)])
def test_a_fine_grained_file_with_numpy_scalars(tmp_path: Path, name: str, width: int, tensors: int) -> None:
    model = Released(cnn(name), width)
    file = tmp_path / "best.pt"
    content = {
        "model_state_dict": model.state_dict(),
        "epoch": 17,
        "acc": np.float64(71.25),
        "alpha": np.float64(0.35),
        "beta": np.float64(1.5),
    }
    torch.save(content, file)
    with pytest.raises(Exception, match="numpy"):
        torch.load(file, weights_only=True)  # why a reader of our own is needed
    read = read_checkpoint(file)
    assert (read.family, read.alpha, read.beta) == (name, 0.35, 1.5)
    assert type(read.alpha) is float
    wanted = getattr(torchvision.models, name)(weights=None)
    assert len(read.backbone) + 4 == tensors
    missing, unexpected = wanted.load_state_dict(read.backbone, strict=False)
    assert not unexpected and all(entry.startswith(("fc.", "classifier.")) for entry in missing)


def test_resnet50_is_told_by_its_third_convolution(tmp_path: Path) -> None:
    with torch.device("meta"):
        backbone = cnn("resnet50")
    assert len(Released(backbone, 2048).state_dict()) == 322
    state = {
        f"backbone.{name}": torch.zeros(1)
        for name in ("0.weight", "1.weight", "7.1.conv2.weight", "7.1.conv3.weight")
    }
    heads = {
        f"{head}.{leaf}": torch.zeros(1) for head in ("ce_head", "kd_head") for leaf in ("weight", "bias")
    }
    torch.save({**state, **heads}, tmp_path / "bare.pt")
    read = read_checkpoint(tmp_path / "bare.pt")
    assert read.family == "resnet50" and set(read.backbone) == {
        "conv1.weight",
        "bn1.weight",
        "layer4.1.conv2.weight",
        "layer4.1.conv3.weight",
    }
    assert (read.alpha, read.beta) == (0.5, 0.5)


class Bomb:
    """Pickles as a call of os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Make unpickling leave a folder behind."""
        return os.mkdir, (str(self.folder),)


def test_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model_state_dict": Bomb(tmp_path / "went_off")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="is not plain data"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_state_dict": {"backbone.0.weight": torch.zeros(1)}}, "has no ce_head.weight"),
        ([1, 2], "holds a list"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "nothing.pt")


def test_a_released_vit_answers_like_a_plain_re_implementation(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Released(tower(), 24).eval()
    torch.save({"model_state_dict": model.state_dict(), "alpha": 0.5, "beta": 0.5}, tmp_path / "vit.pt")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        z = model.backbone(images)
        ce = model.ce_head(z)
        kd = 100 * (z / z.norm(dim=1, keepdim=True) @ model.kd_head.weight.T + model.kd_head.bias)
    loaded = load_released(tmp_path / "vit.pt", [f"class {i}" for i in range(CLASSES)])
    with torch.no_grad():
        found = loaded.module(images)
    torch.testing.assert_close(found.ce, ce, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.kd, kd, atol=1e-4 * kd.abs().max().item(), rtol=0)
    expected = 0.5 * ce.softmax(1) + 0.5 * (kd / 0.5).softmax(1)
    torch.testing.assert_close(loaded.classify(images).exp(), expected, atol=1e-4, rtol=0)
    assert loaded.image_spec.size == (32, 32)
    with pytest.raises(UserError, match="has 7 classes"):
        load_released(tmp_path / "vit.pt", ["one"])


def test_a_released_resnet_answers_like_its_sequential(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Released(cnn("resnet18"), 512).eval()
    torch.save(model.state_dict(), tmp_path / "cnn.pt")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        z = model.backbone(images).flatten(1)
        found = load_released(tmp_path / "cnn.pt", [str(i) for i in range(CLASSES)]).module(images)
    torch.testing.assert_close(found.ce, model.ce_head(z), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.kd, model.kd_head(z), atol=1e-4, rtol=0)
