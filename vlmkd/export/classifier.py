"""Exported classifiers: a folder that is loaded without any download.

`model.safetensors`, `classifier.json` (backbone, head, class names, pixel statistics), `provenance.json`, and, where
one linear layer says the same, `timm.safetensors`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
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
    verify,
    write_provenance,
    write_tensors,
)
from vlmkd.files import read_object, write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import differences
from vlmkd.models.classifier import Classifier, ClassifierConfig, ClassifierPredictor
from vlmkd.models.heads import DualLogits, LinearHead, TextClassifier
from vlmkd.tensor_files import read_safetensors

CONFIG, WEIGHTS = "classifier.json", "model.safetensors"
TIMM_WEIGHTS = "timm.safetensors"
_FORMAT = 1


def export_classifier(
    folder: Path,
    config: ClassifierConfig,
    weights: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, Any] = {},
) -> None:
    """Write a classifier into `folder` by `replacing`; `weights`, in any precision, are those of `config.build()`."""
    module = _filled(config, weights, str(folder))
    with replacing(folder, [CONFIG]) as partial:
        write_tensors(partial / WEIGHTS, module.state_dict())
        write_json(partial / CONFIG, {"format": _FORMAT, **dataclasses.asdict(config)})
        _write_timm(partial / TIMM_WEIGHTS, config, module)
        write_provenance(partial / WEIGHTS, config.source, module.parameters(), provenance)


def load_classifier(folder: Path, name: str = "") -> ClassifierPredictor:
    """In eval mode on the CPU."""
    config = read_config(folder)
    module = _filled(config, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return ClassifierPredictor.of(name or str(folder), module, config)


def read_config(folder: Path) -> ClassifierConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}; name an exported classifier")
    content = read_object(path, "classifier config")
    if content.pop("format", None) != _FORMAT:
        raise UserError(f"{path} is of another format than {_FORMAT}; update vlmkd or export again")
    try:
        spec: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in content["image_spec"].items()}
        mix = content["mix"] and tuple(content["mix"])
        return ClassifierConfig(**content | {"image_spec": ImageSpec(**spec), "mix": mix})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} lacks or has an unknown field ({error}); export again") from None


def _filled(config: ClassifierConfig, weights: Mapping[str, Tensor], origin: str) -> Classifier:
    module = config.build()
    if problems := differences(module.state_dict(), weights):
        raise UserError(f"weights {origin} are of another classifier: {problems}")
    module.load_state_dict(dict(weights))
    return module.eval()


def _write_timm(path: Path, config: ClassifierConfig, module: Classifier) -> None:
    """Weights that timm.create_model(NAME, num_classes=C) loads strictly, where a linear layer is enough.

    Class vectors, behind a one-layer projector too, are folded into one whose logits have the same order, but, without the
    embedding's length, another scale in each image.
    """
    head: Any = module.head
    layers: Any = () if module.projector is None else module.projector.layers
    exact = isinstance(head, LinearHead) and not layers
    folds = isinstance(head, TextClassifier) and len(layers) < 2
    if config.backbone["kind"] != "timm" or not (exact or folds):
        return
    if exact:
        weight, bias = head.weight, head.bias
    else:
        weight = head.logit_scale * head.vectors
        bias = weight @ layers[0].bias if layers else torch.zeros(len(weight))
        weight = weight @ layers[0].weight if layers else weight
    backbone: Any = module.backbone
    names = backbone.pretrained_cfg["classifier"]
    heads: dict[str, Tensor] = {}
    # The distilled DeiT has two heads, whose mean on two tokens is one head on their mean.
    for name in [names] if isinstance(names, str) else names:
        heads |= {f"{name}.weight": weight, f"{name}.bias": bias}
    create: dict[str, Any] = {"model_name": config.backbone["name"], "num_classes": len(bias)}
    if config.backbone["image_size"] and backbone.pretrained_cfg.get("fixed_input_size"):
        create["img_size"] = config.backbone["image_size"]
    facts = {"create_model": json.dumps(create), "logits": "equal" if exact else "same order"}
    write_tensors(path, backbone.state_dict() | heads, facts)


def verify_classifiers(exports: Mapping[Path, nn.Module]) -> None:
    """Compare folders, reloaded in one fresh process, with their modules: Classifiers, or any with its forward."""
    probes = {folder: probe_of(module, read_config(folder)) for folder, module in exports.items()}
    verify("vlmkd.export.classifier", probes)


def probe_of(module: nn.Module, config: ClassifierConfig) -> Probe:
    images = probe_images(config.image_spec)
    return Probe({"images": images}, _outputs(copy.deepcopy(module).cpu().float(), config, images))


def reloaded_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    return _outputs(load_classifier(folder).module, read_config(folder), probe.inputs["images"])


def _outputs(module: nn.Module, config: ClassifierConfig, images: Tensor) -> dict[str, Tensor]:
    """Logits of every head, and the prediction."""
    with torch.no_grad():
        output = module.eval()(images)
    named = output._asdict() if isinstance(output, DualLogits) else {"logits": output}
    return {**named, "prediction": ClassifierPredictor.of("", module, config).classify(images)}


if __name__ == "__main__":
    sys.exit(check_main(reloaded_outputs, sys.argv[1:]))
