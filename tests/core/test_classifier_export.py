"""Exported classifiers: rebuilt offline with equal outputs, as timm weights, as ONNX; refusals in one line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from scripts.to_onnx import to_onnx
from vlmkd.errors import UserError
from vlmkd.export import classifier as classifier_export
from vlmkd.export.classifier import export_classifier, load_classifier, verify_classifiers
from vlmkd.export.folder import compare
from vlmkd.models.backbones import Backbone, load_backbone
from vlmkd.models.classifier import Classifier, ClassifierConfig
from vlmkd.models.heads import DualHead, LinearHead, Projector, TextClassifier
from vlmkd.results import read_results

ROOT = Path(__file__).parents[2]
NAMES = ["red", "green", "dark blue", "white"]


def make(kind: str, backbone: str = "timm:test_resnet") -> tuple[Classifier, ClassifierConfig]:
    """A classifier of random weights whose head is named by `kind`."""
    trunk: Backbone = load_backbone(backbone, pretrained=False, image_size=32, seed=0)
    torch.manual_seed(1)
    projector, head = None, None
    if kind in ("text", "text_two_layers"):
        projector = Projector(trunk.dim, 12, layers=1 + (kind == "text_two_layers"))
        head = TextClassifier(F.normalize(torch.randn(4, 12), dim=-1), 20.0)
    elif kind == "dual":
        head = DualHead(trunk.dim, 4, kd="scaled_linear")
    else:
        head = LinearHead(trunk.dim, 4)
    mix = (0.3, 2.0) if kind == "dual" else None
    config = ClassifierConfig.of(trunk, head, projector, class_names=NAMES, templates=["a {}"], mix=mix)
    return Classifier(trunk.module, head, projector).eval(), config


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def difference(folder: Path, module: torch.nn.Module, config: ClassifierConfig) -> str:
    """What the checking process would say, without starting one."""
    probe = classifier_export.probe_of(module, config)
    return compare(classifier_export.reloaded_outputs(folder, probe), probe.outputs)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "dual", "text", "text_two_layers"])
@pytest.mark.parametrize("backbone", ["timm:test_resnet", "timm:test_vit", "torchvision:resnet18"])
def test_round_trip(kind: str, backbone: str, tmp_path: Path) -> None:
    module, config = make(kind, backbone)
    export_classifier(tmp_path / "out", config, module.state_dict(), provenance={"method": "test"})
    again = load_classifier(tmp_path / "out")
    output = module(pixels())
    if kind == "dual":
        output = (0.3 * output.ce.softmax(1) + 0.7 * (output.kd / 2.0).softmax(1)).log()
    torch.testing.assert_close(again.classify(pixels()), output, rtol=1e-4, atol=1e-5)
    assert (again.class_names, again.image_spec) == (NAMES, config.image_spec)
    assert classifier_export.read_config(tmp_path / "out") == config
    facts = json.loads((tmp_path / "out/provenance.json").read_text())
    assert facts["method"] == "test" and facts["parameters"] == sum(p.numel() for p in module.parameters())
    assert not list(tmp_path.glob(".out*"))
    assert difference(tmp_path / "out", module, config) == ""


def test_check_finds_a_changed_head(tmp_path: Path) -> None:
    module, config = make("dual")
    export_classifier(tmp_path / "out", config, module.state_dict())
    with torch.no_grad():
        module.head.kd_head.bias[2] += 0.01
    assert "kd differs" in difference(tmp_path / "out", module, config)
    mixed = dataclasses.replace(config, mix=(0.31, 2.0))
    module = load_classifier(tmp_path / "out").module
    assert "prediction differs" in difference(tmp_path / "out", module, mixed)


def test_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, config = make("text")
    export_classifier(
        tmp_path / "out", config, module.bfloat16().state_dict()
    )  # half weights are stored as fp32
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} <= {
        torch.float32,
        torch.int64,
    }
    other, linear = make("linear")
    export_classifier(tmp_path / "iid", linear, other.state_dict())
    started = []
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **options: started.append(args) or run(*args, **options)
    )
    verify_classifiers({tmp_path / "out": module, tmp_path / "iid": other})
    assert len(started) == 1  # for both
    other.head.bias.data += 1
    with pytest.raises(UserError, match="/out or .*/iid does not reproduce the model: iid: logits differs"):
        verify_classifiers({tmp_path / "out": module, tmp_path / "iid": other})


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("kind", ["linear", "text"])
def test_timm_weights(kind: str, backbone: str, tmp_path: Path) -> None:
    module, config = make(kind, f"timm:{backbone}")
    export_classifier(tmp_path / "out", config, module.state_dict())
    path = tmp_path / "out/timm.safetensors"
    with safe_open(path, "pt") as stream:
        facts = stream.metadata()
    model = timm.create_model(pretrained=False, **json.loads(facts["create_model"]))
    model.load_state_dict(load_file(path))
    found, expected = model.eval()(pixels()), module(pixels())
    if kind == "linear":
        assert facts["logits"] == "equal"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert facts["logits"] == "same order"
        embeds = module.projector(module.backbone(pixels()))
        lengths = embeds.norm(dim=1, keepdim=True)  # what folding leaves out
        torch.testing.assert_close(found, expected * lengths, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "backbone"),
    [("dual", "timm:test_vit"), ("text_two_layers", "timm:test_vit"), ("linear", "torchvision:resnet18")],
)
def test_no_timm_weights_where_a_linear_layer_is_not_enough(kind: str, backbone: str, tmp_path: Path) -> None:
    module, config = make(kind, backbone)
    export_classifier(tmp_path / "out", config, module.state_dict())
    assert not (tmp_path / "out/timm.safetensors").exists()


def test_refusals(tmp_path: Path) -> None:
    module, config = make("linear")
    with pytest.raises(UserError, match="head of 4 classes, but 1 class names"):
        dataclasses.replace(config, class_names=["a"])
    with pytest.raises(UserError, match="mix is"):
        dataclasses.replace(config, mix=(0.5, 0.5))
    with pytest.raises(UserError, match="of another classifier: 1 missing: head.bias"):
        weights = {name: tensor for name, tensor in module.state_dict().items() if name != "head.bias"}
        export_classifier(tmp_path / "out", config, weights)
    assert not (tmp_path / "out").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is no model export"):
        export_classifier(tmp_path / "foreign", config, module.state_dict())
    with pytest.raises(UserError, match="has no classifier.json"):
        load_classifier(tmp_path / "foreign")
    export_classifier(tmp_path / "out", config, module.state_dict())
    path = tmp_path / "out/classifier.json"
    content = json.loads(path.read_text())
    for change, message in (({"format": 2}, "another format"), ({"colour": 1}, "unknown field")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            load_classifier(tmp_path / "out")


@pytest.mark.parametrize("kind", ["dual", "text"])
def test_onnx(kind: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is missing (pip install 'vlmkd[export]')")
    import onnxruntime

    module, config = make(kind, "timm:test_vit")
    export_classifier(tmp_path / "out", config, module.state_dict())
    path = to_onnx(tmp_path / "out")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = load_classifier(tmp_path / "out").classify(pixels(5))
    found = torch.from_numpy(session.run(["logits"], {"images": pixels(5).numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert sorted(entry.name for entry in path.parent.glob("*.onnx*")) == ["model.onnx"]


def test_onnx_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else real(name, *rest)
    )
    with pytest.raises(UserError, match=r"onnxruntime.*vlmkd\[export\]"):
        to_onnx(tmp_path)


def test_eval_zero_shot_takes_a_folder(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-1 on class folders, by the script; a set of other classes is refused."""
    module, config = make("dual")
    export_classifier(tmp_path / "run/export", config, module.state_dict())
    colours = {"dark_blue": (0, 0, 90), "green": (0, 200, 0), "red": (220, 0, 0), "white": (250, 250, 250)}
    for name, colour in colours.items():
        folder = tmp_path / "data/val" / name
        folder.mkdir(parents=True)
        for shade in range(3):
            Image.new("RGB", (32, 32), tuple(max(part - 40 * shade, 0) for part in colour)).save(
                folder / f"{shade}.png"
            )
    (tmp_path / "names.txt").write_text("dark_blue\ngreen\nred\nwhite\n")
    script = runpy.run_path(str(ROOT / "scripts/eval_zero_shot.py"))
    options = [
        "--data",
        str(tmp_path / "data"),
        "--quiet",
        "--device",
        "cpu",
        "--results",
        str(tmp_path / "r.jsonl"),
    ]
    monkeypatch.setattr(sys, "argv", ["eval_zero_shot.py"])
    assert script["main"](["--model", f"classifier:{tmp_path / 'run/export'}", *options]) == 2
    assert "class 0 is 'red', but 'dark blue' is asked for" in capsys.readouterr().err

    ordered = dataclasses.replace(config, class_names=["Dark_blue", "green", "red", "white"])
    export_classifier(tmp_path / "run/export", ordered, module.state_dict())
    assert script["main"](["--model", str(tmp_path / "run"), "--cost", *options]) == 0
    table = capsys.readouterr().out
    found = {one.metric: one for one in read_results(tmp_path / "r.jsonl")}
    predictor, hits = load_classifier(tmp_path / "run/export"), 0
    for label, name in enumerate(sorted(colours)):
        for path in sorted((tmp_path / "data/val" / name).iterdir()):
            from vlmkd.data.transforms import eval_transform

            image = eval_transform(predictor.image_spec)(Image.open(path))[None]
            hits += int(predictor.classify(image).argmax()) == label
    assert found["top1"].value == hits / 12 and found["top1"].count == 12
    assert found["parameters"].value * 1e6 == pytest.approx(sum(p.numel() for p in module.parameters()))
    assert found["multiply-adds"].value > 0 and "top-1" in table
