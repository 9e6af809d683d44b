"""Image backbones of classifiers: timm, torchvision, CLIP image towers and EfficientNet-Lite0, by name.

A backbone gives pooled features without a head. Its `config` rebuilds the same module later without any download.

Letters: B batch, d feature width.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import http.client
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd.errors import UserError
from vlmkd.files import one_line
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import differences, read_tensors
from vlmkd.models.clip import build_clip, load_clip
from vlmkd.models.prompted import PromptedImageTower
from vlmkd.zoo import hub_or_cache, weights_file

Config = dict[str, Any]

LITE0 = "efficientnet-lite0"
_LITE0_TIMM = "tf_efficientnet_lite0"
_TORCHVISION_WEIGHTS = "IMAGENET1K_V1"
"""The first release of torchvision's weights, which the papers used; another one is NAME@TAG."""
_HELP = f"write timm:NAME, torchvision:NAME, clip:NAME@TAG, or {LITE0}"
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
_NO_PRUNED_TEXT = {
    "context_length": 1,
    "vocab_size": 1,
    "width": 8,
    "heads": [],
    "mlp": [],
    "head_width": 8,
}
"""Text towers that cost next to nothing, for CLIPs of which only the image tower is wanted."""
_PREFIXES = ("backbone.", "featurizer.network.", "visual.")
"""Where training checkpoints (ours and DHO's; VL2V-ADiP's; CLIP's) keep the backbone."""
_DOWNLOAD_ERRORS = (OSError, http.client.HTTPException)


@dataclass
class Backbone:
    """A pooled image encoder."""

    module: nn.Module
    """images [B, 3, h, w] in `image_spec`'s statistics -> features [B, d], not normalised; every parameter trains."""
    dim: int
    """d."""
    image_spec: ImageSpec
    """Size and statistics of the weights. A crop share (timm's crop_pct) is not kept: size is what is cropped."""
    source: str
    """What the user named."""
    config: Config
    """What `build_backbone` takes; plain data."""


def load_backbone(
    name: str,
    pretrained: bool = True,
    *,
    weights: str = "",
    image_size: int | None = None,
    seed: int | None = None,
) -> Backbone:
    """The image backbone that a user names.

    `timm:NAME` (pin the weights: `timm:vit_base_patch16_224.augreg_in21k_ft_in1k`), `torchvision:NAME` or
    `torchvision:NAME@TAG` (ResNets and MobileNetV2; the tag is IMAGENET1K_V1 where none is given), `clip:` and what
    load_clip takes (`clip:ViT-B-16-quickgelu@openai`, `clip:model.json@weights.safetensors`, `clip:zoo:NAME`,
    `clip:local-dir:PATH`), or `efficientnet-lite0`, whose weights come inside a package.

    Args:
        name: see above.
        pretrained: False leaves the weights random, drawn from `seed` where it is given.
        weights: a file or `zoo:NAME` instead of the library's weights; the backbone of a training checkpoint is found
            in it, and layers of a head are left out.
        image_size: input size instead of the weights' own; a CLIP has its own only.
        seed: see `pretrained`.

    Raises:
        UserError: an unknown name, weights that cannot be fetched or are of another architecture.
    """
    kind, _, rest = name.partition(":")
    download = pretrained and not weights
    if name == LITE0:
        backbone = _timm(_LITE0_TIMM, False, image_size, seed, name)
        if download:
            from vlmkd.models.emoji_oracle import load_image_backbone

            backbone.module.load_state_dict(load_image_backbone().state_dict())
    elif kind == "timm" and rest:
        backbone = _timm(rest, download, image_size, seed, name)
    elif kind == "torchvision" and rest:
        backbone = _torchvision(rest, download, image_size, seed, name)
    elif kind == "clip" and rest:
        backbone = _clip(rest, download, image_size, seed, name)
    else:
        raise UserError(f"backbone {name!r} is unknown; {_HELP}")
    if weights:
        load_backbone_weights(backbone, read_tensors(weights_file(weights)), f"{weights} ({name})")
        backbone.source = f"{name}@{weights}"
    backbone.module.requires_grad_(True)
    return backbone


def build_backbone(config: Mapping[str, Any]) -> nn.Module:
    """The module of a `Backbone.config`, with random weights; nothing is downloaded.

    Raises:
        UserError: a kind or name that this version does not know.
    """
    kind = config.get("kind")
    if kind == "timm":
        return _create_timm(config["name"], False, config["image_size"])
    if kind == "torchvision":
        return _create_torchvision(config["name"], None)
    if kind == "clip":
        return _image_tower(build_clip(config["model"]))
    if kind == "prompted_clip":
        return PromptedImageTower(
            _image_tower(build_clip(config["model"])), config["depth"], config["length"]
        )
    raise UserError(f"backbone config: unknown kind {kind!r}; it is timm, torchvision, clip or prompted_clip")


def prompted_config(clip_config: Mapping[str, Any], tower: PromptedImageTower) -> Config:
    """What `build_backbone` takes to make the image tower of a CLIP with visual prompts (PromptKD's student)."""
    return {
        "kind": "prompted_clip",
        "model": _image_config(clip_config),
        "depth": tower.depth,
        "length": tower.length,
    }


@contextlib.contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Random initialisation from `seed`, the global random state left as it was; nothing special without a seed."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------------------------------- timm


def _timm(name: str, download: bool, image_size: int | None, seed: int | None, source: str) -> Backbone:
    with _drawn_from(seed):
        module: Any = _create_timm(name, download, image_size)
    defaults = module.pretrained_cfg
    height, width = (image_size, image_size) if image_size else defaults["input_size"][-2:]
    interpolation = defaults.get("interpolation")
    modes = {"squash": "squash", "border": "longest"}
    spec = ImageSpec(
        size=(height, width),
        mean=tuple(defaults["mean"]),
        std=tuple(defaults["std"]),
        interpolation=interpolation if interpolation in ("bicubic", "bilinear") else "bicubic",
        resize_mode=modes.get(defaults.get("crop_mode"), "shortest"),
    )
    tag = defaults.get("tag")
    pinned = f"{defaults['architecture']}.{tag}" if tag else defaults["architecture"]
    config = {"kind": "timm", "name": pinned, "image_size": image_size}
    return Backbone(module, module.head_hidden_size, spec, source, config)


def _create_timm(name: str, download: bool, image_size: int | None) -> nn.Module:
    """A timm model without its classifier; ViTs are built for `image_size`, others take any size."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=2)
        raise UserError(
            f"timm has no model {name}; "
            + (f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()")
        )
    try:
        size: Config = {}
        if image_size and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
            size = {"img_size": image_size}
        with hub_or_cache() if download else contextlib.nullcontext("") as trouble:
            module: nn.Module = timm.create_model(name, pretrained=download, num_classes=0, **size)
    except RuntimeError as error:  # timm's for an unknown tag, and for an architecture without weights
        raise UserError(
            f"timm:{name}: {one_line(error)} (published weights: {_timm_tags(name)}); "
            "pin one of them, give a weights file, or use pretrained=false"
        ) from None
    except _DOWNLOAD_ERRORS as error:
        raise UserError(_unreachable(f"timm:{name}", trouble or one_line(error))) from None
    return module


def _timm_tags(name: str) -> str:
    import timm

    found = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    return ", ".join(found) or "none"


# ------------------------------------------------------------------------------------------------------ torchvision


def _torchvision(
    text: str, download: bool, image_size: int | None, seed: int | None, source: str
) -> Backbone:
    from torchvision import models

    name, _, tag = text.partition("@")
    tag = tag or _TORCHVISION_WEIGHTS
    if name not in models.list_models(module=models):
        near = difflib.get_close_matches(name, models.list_models(module=models), n=2)
        raise UserError(
            f"torchvision has no model {name}; "
            + (f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()")
        )
    published = models.get_model_weights(name)
    if tag not in published.__members__:
        raise UserError(
            f"torchvision:{name} has no weights {tag}; choose one of {', '.join(published.__members__)}"
        )
    with _drawn_from(seed):
        module = _create_torchvision(name, tag if download else None)
    preset = published[tag].transforms()
    (size,) = preset.crop_size
    size = image_size or size
    spec = ImageSpec(
        size=(size, size),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
    # The width is that of the last weight: a ResNet's last BatchNorm, MobileNetV2's last one.
    dim = [parameter for parameter in module.parameters()][-1].shape[0]
    return Backbone(module, dim, spec, source, {"kind": "torchvision", "name": name})


def _create_torchvision(name: str, tag: str | None) -> nn.Module:
    from torchvision import models

    try:
        module: Any = models.get_model(name, weights=tag)
    except _DOWNLOAD_ERRORS as error:
        raise UserError(_unreachable(f"torchvision:{name}", one_line(error))) from None
    if isinstance(module, models.ResNet):
        module.fc = nn.Identity()
    elif isinstance(module, models.MobileNetV2):
        module.classifier = nn.Identity()
    else:
        raise UserError(
            f"torchvision:{name} is neither a ResNet nor MobileNetV2; use a timm model of this family"
        )
    return module


# ------------------------------------------------------------------------------------------------------------- CLIP


def _clip(text: str, download: bool, image_size: int | None, seed: int | None, source: str) -> Backbone:
    whole = text.partition(":")[0] in ("zoo", "local-dir", "hf") and ":" in text
    model, _, pretrained = (text, "", "") if whole else text.partition("@")
    if download and not whole and not pretrained:
        raise UserError(f"backbone {source} names no weights; write {source}@TAG, or use pretrained=false")
    clip = load_clip(model, pretrained if download else "", seed=seed)
    if image_size and clip.image_spec.size != (image_size, image_size):
        raise UserError(
            f"backbone {source} sees {clip.image_spec.size[0]} px, not {image_size}: a CLIP has its own size only; leave "
            "image_size out"
        )
    config = _image_config(clip.config)
    # Folders and zoo entries bring their weights, so that a random start builds the tower anew.
    module = build_clip(config, seed=seed) if whole and not download else clip.module
    return Backbone(
        _image_tower(module),
        clip.config["embed_dim"],
        clip.image_spec,
        source,
        {"kind": "clip", "model": config},
    )


def _image_config(config: Mapping[str, Any]) -> Config:
    """A CLIP config with the same image tower and next to no text tower."""
    parts = ("embed_dim", "vision_cfg", "quick_gelu", "pruned", "activation")
    kept = {name: copy.deepcopy(config[name]) for name in parts if name in config}
    return kept | {"text_cfg": dict(_NO_PRUNED_TEXT if config.get("pruned") else _NO_TEXT)}


def _image_tower(clip: nn.Module) -> nn.Module:
    """The tower of a CLIP: images -> pooled, projected features."""
    tower: Any = clip.visual
    if hasattr(tower, "output_tokens"):  # CoCa's tower gives its tokens too
        tower.output_tokens = False
    return tower


# ---------------------------------------------------------------------------------------------------------- weights


def load_backbone_weights(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Fill `backbone` strictly from `state`: its own names, or a training checkpoint around them.

    Prefixes of wrappers and of the places where checkpoints keep the backbone are taken off, layers of a head are
    left out, and torchvision's children by number (`0.weight`, DHO's CNN files) get their names.

    Raises:
        UserError: weights of another architecture; lists the first missing, unexpected and resized tensors.
    """
    wanted = backbone.module.state_dict()
    named = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for prefix in _PREFIXES:
        inside = {
            name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)
        }
        if inside:
            named = inside
            break
    if all(re.match(r"\d+\.", name) for name in named):
        children = [name for name, _ in backbone.module.named_children()]
        named = {_by_number(name, children): tensor for name, tensor in named.items()}
    heads = tuple(f"{name}." for name in _head_names(backbone.module))
    named = {name: tensor for name, tensor in named.items() if not name.startswith(heads)}
    problems = differences(wanted, named)
    if problems:
        raise UserError(f"weights {origin} are of another architecture: {problems}")
    backbone.module.load_state_dict(named)


def _by_number(name: str, children: Sequence[str]) -> str:
    number, _, rest = name.partition(".")
    return f"{children[int(number)]}.{rest}" if int(number) < len(children) else name


def _head_names(module: Any) -> list[str]:
    """Names of the classifier layers that a backbone's library puts into its files."""
    named = getattr(module, "pretrained_cfg", {}).get("classifier", ())
    own = [named] if isinstance(named, str) else list(named)
    return [*own, "fc", "classifier", "ce_head", "kd_head"]


def _unreachable(what: str, reason: str) -> str:
    return (
        f"cannot get the weights of {what}: not in the local cache, nor from the net ({reason}); go online "
        "once (unset HF_HUB_OFFLINE), set HF_ENDPOINT to a mirror, give a weights file, or use pretrained=false"
    )


# --------------------------------------------------------------------------------------------------------- training


def freeze_batch_norm(module: nn.Module) -> int:
    """Keep every BatchNorm of `module` in eval mode for good, whatever `train` says; returns their number.

    Their statistics never move and are what normalises, while their affine parameters still train (VL2V-ADiP b.4).
    """
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.eval()
        norm.train = types.MethodType(_stay_in_eval, norm)  # type: ignore[method-assign]
    return len(norms)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def with_spec(backbone: Backbone, **changes: Any) -> Backbone:
    """The same backbone with some fields of its ImageSpec changed (VL2V-ADiP evaluates with resize_mode squash)."""
    return replace(backbone, image_spec=replace(backbone.image_spec, **changes))
