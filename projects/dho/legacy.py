"""Files of the released DHO code: student checkpoints, and the reader that runs nothing that a pickle carries.

A checkpoint is `{model_state_dict, epoch, acc, alpha, beta}` or the bare weights, with or without DDP's `module.`. The
backbone is CLIP's image tower, or the children of a torchvision network in a row without its classifier.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import differences
from vlmkd.models.classifier import ClassifierConfig, ClassifierPredictor
from vlmkd.models.convert import OPENAI_MEAN, OPENAI_STD

_RESNET_CHILDREN = {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"}
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
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    scalar = np.float64(0.0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in "efdbhilqBHILQ?"}
    # Files name NumPy's private module as it was called when they were written.
    allowed: list[Any] = [(scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]
    allowed += [np.dtype, *sorted(dtypes, key=repr)]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"weights file {path} is not plain data ({reason}); it is not read: save its tensors from a program you trust"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"weights file {path} holds a {type(content).__name__}, not a dictionary")
    return {
        str(name): value.item() if isinstance(value, np.generic) else value for name, value in content.items()
    }


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
        _torchvision_names(plain, family),
        state["ce_head.weight"],
        state["ce_head.bias"],
        state["kd_head.weight"],
        state["kd_head.bias"],
        alpha=float(content.get("alpha", 0.5)) if wrapped else 0.5,
        beta=float(content.get("beta", 0.5)) if wrapped else 0.5,
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


def _torchvision_names(backbone: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    if family == "clip":
        return dict(backbone)
    if family == "mobilenet_v2":
        return {f"features.{name.removeprefix('0.')}": value for name, value in backbone.items()}
    named = {}
    for name, value in backbone.items():
        child, _, rest = name.partition(".")
        named[f"{_RESNET_CHILDREN[int(child)]}.{rest}"] = value
    return named


def load_released(path: Path, class_names: list[str]) -> ClassifierPredictor:
    """A released student as an ImageClassifier in eval mode on the CPU; sizes come from the shapes in the file.

    Its KD head is `scaled_linear` for CLIP towers, which were trained so, and plain for CNNs.

    Raises:
        UserError: another number of classes, or weights of another architecture.
    """
    read = read_checkpoint(path)
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
