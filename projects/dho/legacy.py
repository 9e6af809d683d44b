"""Files of the released DHO code: student checkpoints, and a reader that takes their NumPy scalars for numbers.

A checkpoint is `{model_state_dict, epoch, acc, alpha, beta}` or the bare weights, with or without DDP's `module.`. The
backbone is CLIP's image tower, or the children of a torchvision network in a row without its classifier.
"""

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
from vlmkd.models.checkpoints import differences
from vlmkd.models.classifier import ClassifierConfig, ClassifierPredictor
from vlmkd.models.convert import OPENAI_MEAN, OPENAI_STD
from vlmkd.tensor_files import read_torch

_RESNET_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Position in the released Sequential -> torchvision's name; the others have no weights."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
"""A text tower that costs nothing."""
_HEADS = ("ce_head.weight", "ce_head.bias", "kd_head.weight", "kd_head.bias")


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """A torch file of tensors, plain data and NumPy scalars; its NumPy scalars come back as Python numbers.

    The fine-grained checkpoints hold alpha and beta as NumPy scalars, which torch's own restricted reader refuses.

    Raises:
        UserError: no such file, damaged, no dictionary, or a pickle that names anything else.
    """
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


def number_of(content: Mapping[str, Any], name: str, path: str | Path, default: float = math.nan) -> float:
    """The number under `name`; raises UserError when it is missing and has no default, or is no finite number."""
    value = content.get(name, default)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"weights file {path}: {name} is {value!r}, not a number; fetch it again")
    return float(value)


@dataclass(frozen=True)
class LegacyCheckpoint:
    """A released student, sorted into its parts."""

    family: str
    """`clip` (image tower), `resnet18`, `resnet50` or `mobilenet_v2`."""
    backbone: dict[str, Tensor]
    """open_clip's image-tower names, or torchvision's without the classifier; fp32."""
    ce_weight: Tensor
    """[C, d]."""
    ce_bias: Tensor
    kd_weight: Tensor
    kd_bias: Tensor
    alpha: float = 0.5
    beta: float = 0.5

    @property
    def vision_config(self) -> dict[str, Any]:
        """open_clip's vision_cfg of a `clip` backbone, read from its shapes; activation QuickGELU, heads of width 64."""
        state = self.backbone
        missing = [
            name
            for name, axes in (("conv1.weight", 4), ("positional_embedding", 2), ("class_embedding", 1))
            if name not in state or state[name].ndim != axes
        ]
        if missing:
            raise UserError(f"weights: backbone.{missing[0]} is missing or of another shape than a ViT's")
        patch, positions = state["conv1.weight"].shape[-1], len(state["positional_embedding"])
        grid = round((positions - 1) ** 0.5)
        if grid * grid != positions - 1:
            raise UserError(f"weights: {positions} positions are no square grid and a class token")
        numbers = {m[1] for name in state if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
        return {
            "image_size": grid * patch,
            "patch_size": patch,
            "width": state["class_embedding"].shape[0],
            "layers": len(numbers),
        }


def read_checkpoint(path: str | Path) -> LegacyCheckpoint:
    """A released student checkpoint, wrapped or bare.

    Raises:
        UserError: not such a file.
    """
    content = read_plain_pickle(Path(path))
    wrapped = isinstance(content.get("model_state_dict"), Mapping)
    state = {
        str(name): value for name, value in (content["model_state_dict"] if wrapped else content).items()
    }
    state = {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    missing = [name for name in _HEADS if name not in state]
    if missing:
        raise UserError(
            f"weights file {path} is no DHO student: it has no {missing[0]}; expected backbone.*, ce_head and kd_head"
        )
    plain = {
        name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")
    }
    unknown = sorted(state.keys() - set(_HEADS) - {f"backbone.{name}" for name in plain})
    if unknown:
        raise UserError(f"weights file {path}: unexpected tensor {unknown[0]}")
    family = _family(plain, path)
    return LegacyCheckpoint(
        family,
        _torchvision_names(plain, family, path),
        state["ce_head.weight"],
        state["ce_head.bias"],
        state["kd_head.weight"],
        state["kd_head.bias"],
        alpha=number_of(content, "alpha", path, 0.5) if wrapped else 0.5,
        beta=number_of(content, "beta", path, 0.5) if wrapped else 0.5,
    )


def _family(backbone: Mapping[str, Tensor], path: str | Path) -> str:
    if "class_embedding" in backbone:
        return "clip"
    if "0.18.0.weight" in backbone:
        return "mobilenet_v2"
    if "7.1.conv2.weight" in backbone:
        return "resnet50" if "7.1.conv3.weight" in backbone else "resnet18"
    raise UserError(
        f"weights file {path}: its backbone is neither CLIP's ViT nor a ResNet-18, ResNet-50 or MobileNetV2"
    )


def _torchvision_names(backbone: Mapping[str, Tensor], family: str, path: str | Path) -> dict[str, Tensor]:
    if family == "clip":
        return dict(backbone)
    if family == "mobilenet_v2":
        return {f"features.{name.removeprefix('0.')}": value for name, value in backbone.items()}
    named = {}
    for name, value in backbone.items():
        child, _, rest = name.partition(".")
        if child not in _RESNET_CHILDREN:
            raise UserError(f"weights file {path}: backbone.{name} is no tensor of a {family}")
        named[f"{_RESNET_CHILDREN[child]}.{rest}"] = value
    return named


def load_released(path: Path, class_names: list[str]) -> ClassifierPredictor:
    """A released student as an ImageClassifier in eval mode on the CPU; sizes come from the shapes in the file.

    Its KD head is `scaled_linear` for CLIP towers, which were trained so, and plain for CNNs.

    Raises:
        UserError: another number of classes, or weights of another architecture.
    """
    read = read_checkpoint(path)
    if read.ce_weight.ndim != 2:
        raise UserError(f"weights file {path}: ce_head.weight has {read.ce_weight.ndim} axes, not 2")
    classes, width = read.ce_weight.shape
    if classes != len(class_names):
        raise UserError(
            f"{path} has {classes} classes, the data set {len(class_names)}; name its own data set"
        )
    if read.family == "clip":
        vision = read.vision_config
        model = {"embed_dim": width, "vision_cfg": vision, "quick_gelu": True, "text_cfg": dict(_NO_TEXT)}
        backbone_config: dict[str, Any] = {"kind": "clip", "model": model}
        kd, size = "scaled_linear", vision["image_size"]
        spec = ImageSpec(size=(size, size), mean=OPENAI_MEAN, std=OPENAI_STD)
    else:
        backbone_config = {"kind": "torchvision", "name": read.family}
        kd = "linear"
        spec = ImageSpec(size=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear")
    config = ClassifierConfig(
        backbone=backbone_config,
        head={"kind": "dual", "width": width, "classes": classes, "kd": kd},
        class_names=class_names,
        image_spec=spec,
        source=str(path),
        mix=(read.alpha, read.beta),
    )
    module = config.build()
    state = {f"backbone.{name}": value for name, value in read.backbone.items()}
    heads = (read.ce_weight, read.ce_bias, read.kd_weight, read.kd_bias)
    state |= {f"head.{name}": value for name, value in zip(_HEADS, heads, strict=True)}
    problems = differences(module.state_dict(), state)
    if problems:
        raise UserError(f"weights {path} are of another architecture: {problems}")
    module.load_state_dict(state)
    return ClassifierPredictor.of(str(path), module.eval(), config)
