"""Files of the released DHO code (docs/papers/dho.md#checkpoints): student checkpoints, and a reader for NumPy scalars."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import (
    Backbone,
    build_backbone,
    image_tower_config,
    load_backbone,
    load_backbone_weights,
)
from vlmkd.models.checkpoints import differences
from vlmkd.models.classifier import Classifier, ClassifierConfig, ClassifierPredictor
from vlmkd.models.convert import OPENAI_MEAN, OPENAI_STD
from vlmkd.models.heads import DualHead
from vlmkd.tensor_files import read_torch

_HEADS = ("ce_head.weight", "ce_head.bias", "kd_head.weight", "kd_head.bias")


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """A torch file of tensors, plain data and NumPy scalars (alpha and beta of some), which become Python numbers."""
    scalar = np.float64(0.0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in "efdbhilqBHILQ?"}
    # Files name NumPy's private module as it was called when they were written.
    plain: list[Any] = [(scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]
    content = read_torch(path, plain=[*plain, np.dtype, *dtypes])
    if not isinstance(content, Mapping):
        raise UserError(f"weights file {path} holds a {type(content).__name__}, not a dictionary")
    return {
        str(name): value.item() if isinstance(value, np.generic) else value for name, value in content.items()
    }


def number_of(content: Mapping[str, Any], name: str, path: Path, default: float = math.nan) -> float:
    """The finite number under `name`."""
    value = content.get(name, default)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"weights file {path}: {name} is {value!r}, not a number; fetch it again")
    return float(value)


@dataclass(frozen=True)
class Checkpoint:
    """A released student, sorted into its parts; fp32."""

    family: str
    """`clip` (image tower), `resnet18`, `resnet50` or `mobilenet_v2`."""
    backbone: dict[str, Tensor]
    """Under open_clip's names, or as torchvision's children in a row (`0.weight`)."""
    heads: dict[str, Tensor]
    """The state of a DualHead."""
    alpha: float
    beta: float

    @property
    def vision_config(self) -> dict[str, Any]:
        """open_clip's vision_cfg of a `clip` backbone, read from its shapes; heads have width 64."""
        for name, axes in (("conv1.weight", 4), ("positional_embedding", 2), ("class_embedding", 1)):
            if name not in self.backbone or self.backbone[name].ndim != axes:
                raise UserError(f"weights: backbone.{name} is missing or of another shape than a ViT's")
        patch, positions = self.backbone["conv1.weight"].shape[-1], len(self.backbone["positional_embedding"])
        blocks = {m[1] for name in self.backbone if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
        return {
            "image_size": math.isqrt(max(positions - 1, 0)) * patch,
            "patch_size": patch,
            "width": self.backbone["class_embedding"].shape[0],
            "layers": len(blocks),
        }


def read_checkpoint(path: Path) -> Checkpoint:
    """A released student checkpoint, bare or under `model_state_dict`, with or without DDP's `module.`."""
    content = read_plain_pickle(path)
    wrapped = content.get("model_state_dict")
    # Bare weights have no mixture; a tensor of that name is none.
    numbers, state = (content, wrapped) if isinstance(wrapped, Mapping) else ({}, content)
    named = {
        str(name).removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if missing := [name for name in _HEADS if name not in named]:
        raise UserError(f"weights file {path} is no DHO student: it has no {missing[0]}")
    heads = {name: named.pop(name) for name in _HEADS}
    backbone = {name.removeprefix("backbone."): value for name, value in named.items()}
    alpha, beta = (number_of(numbers, name, path, 0.5) for name in ("alpha", "beta"))
    return Checkpoint(_family(backbone, path), backbone, heads, alpha, beta)


def _family(backbone: Mapping[str, Tensor], path: Path) -> str:
    if "class_embedding" in backbone:
        return "clip"
    if "0.18.0.weight" in backbone:
        return "mobilenet_v2"
    if "7.1.conv2.weight" in backbone:
        return "resnet50" if "7.1.conv3.weight" in backbone else "resnet18"
    raise UserError(f"weights file {path}: its backbone is no CLIP ViT, ResNet-18, ResNet-50 or MobileNetV2")


def load_released(path: Path, class_names: list[str]) -> ClassifierPredictor:
    """A released student on the CPU; CLIP towers were trained with a `scaled_linear` KD head, CNNs with a plain one."""
    read = read_checkpoint(path)
    weight = read.heads["ce_head.weight"]
    if weight.ndim != 2:
        raise UserError(f"weights file {path}: ce_head.weight has {weight.ndim} axes, not 2")
    classes, width = weight.shape
    if classes != len(class_names):
        raise UserError(f"{path} has {classes} classes, the data set {len(class_names)}; name its own set")
    if read.family == "clip":
        vision = read.vision_config
        config = image_tower_config({"embed_dim": width, "vision_cfg": vision, "quick_gelu": True})
        spec = ImageSpec(size=(vision["image_size"],) * 2, mean=OPENAI_MEAN, std=OPENAI_STD)
        backbone = Backbone(build_backbone(config), width, spec, config)
    else:
        backbone = load_backbone(f"torchvision:{read.family}", pretrained=False)
    load_backbone_weights(backbone, read.backbone, str(path))
    backbone.source = str(path)
    head = DualHead(width, classes, kd="scaled_linear" if read.family == "clip" else "linear")
    if problems := differences(head.state_dict(), read.heads):
        raise UserError(f"weights {path} are of another architecture: {problems}")
    head.load_state_dict(read.heads)
    described = ClassifierConfig.of(backbone, head, class_names=class_names, mix=(read.alpha, read.beta))
    return ClassifierPredictor.of(str(path), Classifier(backbone.module, head).eval(), described)
