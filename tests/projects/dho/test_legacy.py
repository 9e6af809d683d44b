"""Released checkpoints: files built the way the released code saves them, read without running anything."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from projects.dho import eval as evaluation
from projects.dho.legacy import load_released, read_checkpoint
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import load_backbone, load_backbone_weights
from vlmkd.models.classifier import ClassifierConfig
from vlmkd.results import read_results

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
    assert torch.equal(read.heads["kd_head.weight"], model.kd_head.weight)
    assert torch.equal(read.heads["ce_head.bias"], model.ce_head.bias)


def test_the_number_of_tensors_of_a_real_vit_b_16(tmp_path: Path) -> None:
    """156 tensors with both heads, as many as the published file (shapes on the meta device)."""
    with torch.device("meta"):
        model = Released(
            tower(image_size=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512), 512
        )
    assert len(model.state_dict()) == 156


CLIP_B16 = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12}
CLIP_L14 = {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24}


@pytest.mark.parametrize(
    ("backbone", "width", "millions"),
    [
        ("resnet18", 512, 12.20),
        ("resnet50", 2048, 27.61),
        ("mobilenet_v2", 1280, 4.79),
        (CLIP_B16, 512, 87.21864),  # exactly the 87,218,640 of the published file
        (CLIP_L14, 768, 305.5),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_students_of_a_thousand_classes_have_the_published_parameters(
    backbone: Any, width: int, millions: float
) -> None:
    named: dict[str, Any] = {"kind": "torchvision", "name": backbone}
    if isinstance(backbone, dict):
        text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
        model = {"embed_dim": width, "vision_cfg": backbone, "quick_gelu": True, "text_cfg": text}
        named = {"kind": "clip", "model": model}
    config = ClassifierConfig(
        backbone=named,
        head={"kind": "dual", "width": width, "classes": 1000, "kd": "linear"},
        class_names=[str(number) for number in range(1000)],
        image_spec=ImageSpec(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3),
        source="published",
        mix=(0.5, 0.5),
    )
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in config.build().parameters()) / 1e6
    digits = len(str(millions).partition(".")[2])
    assert round(count, digits) == millions


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
    assert len(read.backbone) + 4 == tensors
    loaded = load_released(file, [str(i) for i in range(CLASSES)]).module.backbone
    named, given = loaded.state_dict(), model.backbone.state_dict()
    assert len(named) == len(given) and all(map(torch.equal, named.values(), given.values()))
    wanted = getattr(torchvision.models, name)(weights=None).state_dict().keys()
    assert all(entry.startswith(("fc.", "classifier.")) for entry in wanted - named.keys())


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
    assert read.family == "resnet50"
    with pytest.raises(
        UserError, match=r"resized: conv1.weight \[1\].*bn1.weight \[1\].*layer4.1.conv2.weight \[1\]"
    ):
        load_backbone_weights(load_backbone("torchvision:resnet50", False), read.backbone, "bare.pt")
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
    with pytest.raises(UserError, match="names posix.mkdir, which is code"):
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


def test_the_zoos_name_is_taken_where_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--model zoo:NAME` evaluates the cached file, and `student.weights=zoo:NAME` starts from its backbone."""
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))
    torch.manual_seed(5)
    model = Released(tower(), 24)
    (tmp_path / "zoo").mkdir()
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "zoo" / "DHO-ViT-B-16-1percent.pt")
    for number in range(CLASSES):
        for split in ("train", "test"):
            folder = tmp_path / "set" / split / f"class {number}"
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 36), (30 * number, 90, 200 - 20 * number)).save(folder / "0.png")
    written = []
    for name in ("zoo:DHO-ViT-B-16-1percent", str(tmp_path / "zoo" / "DHO-ViT-B-16-1percent.pt")):
        out = tmp_path / "results.jsonl"
        arguments = ["--model", name, "--set", f"folder:{tmp_path / 'set'}", "--results", str(out)]
        assert evaluation.main(arguments) == 0, capsys.readouterr().err
        written.append([(one.key, one.value, one.count) for one in read_results(out)])
    assert written[0] == written[1] and written[0][0][2] == CLASSES
    with pytest.raises(UserError, match="did you mean DHO-ViT-B-16-1"):
        evaluation.main(["--model", "zoo:DHO-ViT-B-16", "--set", f"folder:{tmp_path / 'set'}"])

    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    (tmp_path / "clip.json").write_text(json.dumps(config))
    backbone = load_backbone(f"clip:{tmp_path / 'clip.json'}", weights="zoo:DHO-ViT-B-16-1percent")
    found = backbone.module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.backbone.state_dict().items())
