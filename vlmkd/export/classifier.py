"""Exported classifiers: a folder with weights and one JSON file, loaded without any download, and as ONNX or timm weights.

`model.safetensors`, `classifier.json` (backbone, head, class names, pixel statistics), `provenance.json`, and, where
one linear layer says the same, `timm.safetensors` for `timm.create_model(NAME, num_classes=C)`.

`python -m vlmkd.export.classifier FOLDER PROBE ...` is the process that `verify_classifiers` starts.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd.errors import UserError
from vlmkd.export.folder import (
    Probe,
    check_main,
    probe_images,
    replacing,
    stored,
    verify,
    write_provenance,
    write_tensors,
)
from vlmkd.files import read_object, write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import differences
from vlmkd.models.classifier import Classifier, ClassifierConfig, ClassifierPredictor
from vlmkd.models.heads import DualLogits, LinearHead, TextClassifier, mix_heads
from vlmkd.tensor_files import read_safetensors

CONFIG, WEIGHTS = "classifier.json", "model.safetensors"
TIMM_WEIGHTS, ONNX = "timm.safetensors", "model.onnx"
_FORMAT = 1
_ONNX_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest one where that is above 1; onnxruntime fuses other operations."""


def export_classifier(
    folder: Path,
    config: ClassifierConfig,
    weights: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a classifier into `folder`, which appears complete or not at all; an older export there is replaced.

    `weights` is the state dict of `config.build()`'s module, in any precision; fp32 is stored.

    Raises:
        UserError: weights of another classifier, a foreign folder in the way, or no space.
    """
    module = _filled(config, weights, str(folder))
    with replacing(folder, [CONFIG]) as partial:
        write_tensors(partial / WEIGHTS, _as_stored(module.state_dict()))
        write_json(partial / CONFIG, {"format": _FORMAT, **dataclasses.asdict(config)})
        _write_timm(partial / TIMM_WEIGHTS, config, module)
        write_provenance(partial / WEIGHTS, config.source, module.parameters(), provenance or {})


def _as_stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: stored(tensor) for name, tensor in state.items()}


def load_classifier(folder: Path, name: str = "") -> ClassifierPredictor:
    """The ImageClassifier in an export folder, called `name` or by the folder, in eval mode on the CPU.

    Raises:
        UserError: no export there, or a damaged one.
    """
    config = read_config(folder)
    module = _filled(config, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return ClassifierPredictor.of(name or str(folder), module, config)


def read_config(folder: Path) -> ClassifierConfig:
    """The config of an export folder.

    Raises:
        UserError: no export there, one of a newer version, or an edited one with missing or unknown fields.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} has no {CONFIG}; name the folder of an exported classifier (a run's export/)"
        )
    content = read_object(folder / CONFIG, "classifier config")
    if content.pop("format", None) != _FORMAT:
        raise UserError(
            f"{folder / CONFIG} is of another format than {_FORMAT}; update vlmkd or export again"
        )
    try:
        fields: Any = {
            name: tuple(v) if isinstance(v, list) else v for name, v in content["image_spec"].items()
        }
        content["image_spec"] = ImageSpec(**fields)
        content["mix"] = tuple(content["mix"]) if content["mix"] is not None else None
        return ClassifierConfig(**content)
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder / CONFIG} lacks or has an unknown field ({error}); export again") from None


def _filled(config: ClassifierConfig, weights: Mapping[str, Tensor], origin: str) -> Classifier:
    module = config.build()
    problems = differences(module.state_dict(), weights)
    if problems:
        raise UserError(f"weights {origin} are of another classifier: {problems}")
    module.load_state_dict(dict(weights))
    return module.eval()


# ----------------------------------------------------------------------------------------------------- timm weights


def _write_timm(path: Path, config: ClassifierConfig, module: Classifier) -> None:
    """Weights that timm.create_model(NAME, num_classes=C) loads strictly, where a linear layer is enough.

    A linear head gives the same logits. Class vectors behind a one-layer projector are folded into one layer, whose
    logits have the same order but another scale in each image, because the length of the embedding is left out. Other
    heads (two mixed ones, a projector with BatchNorm and ReLU) are no linear layer: nothing is written.
    """
    folded = _folded(module)
    if config.backbone["kind"] != "timm" or folded is None:
        return
    weight, bias, exact = folded
    backbone: Any = module.backbone
    names = backbone.pretrained_cfg["classifier"]
    names = [names] if isinstance(names, str) else names
    # The distilled DeiT has two heads, whose mean on two tokens is one head on their mean.
    heads = {f"{name}.weight": weight for name in names} | {f"{name}.bias": bias for name in names}
    create: dict[str, Any] = {"model_name": config.backbone["name"], "num_classes": len(bias)}
    if config.backbone["image_size"] and backbone.pretrained_cfg.get("fixed_input_size"):
        create["img_size"] = config.backbone["image_size"]
    facts = {"create_model": json.dumps(create), "logits": "equal" if exact else "same order"}
    write_tensors(path, _as_stored(module.backbone.state_dict() | heads), facts)


def _folded(module: Classifier) -> tuple[Tensor, Tensor, bool] | None:
    """Weight [C,d] and bias [C] of a linear layer with the classifier's predictions, and whether its logits are equal."""
    head, projector = module.head, module.projector
    if isinstance(head, LinearHead) and projector is None:
        return head.weight, head.bias, True
    if isinstance(head, TextClassifier):
        vectors = head.logit_scale * head.vectors
        if projector is None:
            return vectors, torch.zeros(len(vectors)), False
        layers: Any = projector.layers
        if len(layers) == 1:
            return vectors @ layers[0].weight, vectors @ layers[0].bias, False
    return None


# ------------------------------------------------------------------------------------------------------------ check


def verify_classifiers(exports: Mapping[Path, nn.Module]) -> None:
    """Reload folders in one fresh process without the network and compare their outputs with those of their modules.

    A module is the exported Classifier, or any with the same forward.

    Raises:
        UserError: a reloaded classifier differs, or cannot be loaded.
    """
    probes = {folder: probe_of(module, read_config(folder)) for folder, module in exports.items()}
    verify("vlmkd.export.classifier", probes)


def probe_of(module: nn.Module, config: ClassifierConfig) -> Probe:
    """Pixels and what `module` makes of them, in fp32 on the CPU."""
    images = probe_images(config.image_spec)
    return Probe({"images": images}, _outputs(copy.deepcopy(module).cpu().float(), config, images))


def reloaded_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """What the classifier in `folder` makes of a probe's pixels."""
    return _outputs(load_classifier(folder).module, read_config(folder), probe.inputs["images"])


def _outputs(module: nn.Module, config: ClassifierConfig, images: Tensor) -> dict[str, Tensor]:
    """Logits of every head, and the prediction."""
    with torch.no_grad():
        output = module.eval()(images)
    named = output._asdict() if isinstance(output, DualLogits) else {"logits": output}
    return {**named, "prediction": ClassifierPredictor.of("", module, config).classify(images)}


# ------------------------------------------------------------------------------------------------------------- ONNX


class _Prediction(nn.Module):
    """images -> logits as one tensor, those of a dual head mixed."""

    def __init__(self, predictor: ClassifierPredictor) -> None:
        super().__init__()
        self.module = predictor.module
        self.mix = predictor.mix

    def forward(self, images: Tensor) -> Tensor:
        output = self.module(images)
        return output if self.mix is None else mix_heads(output, *self.mix)


def missing_for_onnx() -> list[str]:
    """Packages of the extra `export` that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def to_onnx(folder: Path, path: Path | None = None) -> Path:
    """Write an exported classifier as ONNX (`images` [B,3,H,W] -> `logits` [B,C], any B), and compare it with onnxruntime.

    The input is in the statistics of classifier.json's image_spec. Default file: FOLDER/model.onnx. Returns its path.

    Raises:
        UserError: the extra `export` is not installed, or onnxruntime computes something else.
    """
    if missing := missing_for_onnx():
        raise UserError(f"ONNX export needs {', '.join(missing)}; run: pip install 'vlmkd[export]'")
    predictor = load_classifier(folder)
    model = _Prediction(predictor).eval()
    path = path or folder / ONNX
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    spec = predictor.image_spec
    torch.onnx.export(
        model,
        (probe_images(spec),),
        str(partial),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    difference = _onnx_difference(partial, model, spec)
    if difference:
        partial.unlink()
        raise UserError(
            f"ONNX export of {folder} does not reproduce the classifier: {difference}; report this"
        )
    os.replace(partial, path)
    return path


def _onnx_difference(path: Path, model: nn.Module, spec: ImageSpec) -> str:
    """What onnxruntime makes different, for batches of one and of three; empty when nothing is."""
    onnxruntime = importlib.import_module("onnxruntime")  # of the extra `export`
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = probe_images(spec, count)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        difference = (found - expected).abs().max().item()
        if not difference <= _ONNX_TOLERANCE * max(1.0, expected.abs().max().item()):  # also true for NaN
            return f"logits of {count} images differ by {difference:.2e}"
    return ""


if __name__ == "__main__":
    sys.exit(check_main(reloaded_outputs, sys.argv[1:]))
