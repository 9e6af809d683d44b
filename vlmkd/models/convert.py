"""transformers' CLIPModel as open_clip's CLIP: names, to and fro, sizes, activation, pooled token, pixel statistics.

scripts/export_hf.py has the other direction of configs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.models.pruned_clip import Config, State

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_VOCABULARY = 49408
"""Its last two ids are start and end of text."""
ARGMAX_EOS = 2
"""The end-of-text id with which transformers pools at the highest id, as open_clip does."""
_INTERPOLATIONS = {3: "bicubic", 2: "bilinear"}  # PIL's numbers

_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelled so by transformers
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.in_proj_": "self_attn.*_proj.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """open_clip's name -> CLIPModel's, for the layers of `state` of either kind; `*` stands for q, k and v."""
    layers = {found[1] for name in state if (found := re.search(r"\.(?:resblocks|layers)\.(\d+)\.", name))}
    parts = {f"{ours}.": f"{theirs}." for ours, theirs in _NORMS.items()} | {
        f"{ours}.{layer}.{part}": f"{theirs}.{layer}.{their_part}"
        for ours, theirs in _TOWERS.items()
        for layer in layers
        for part, their_part in _BLOCK.items()
    }
    kinds = ("weight", "bias")
    return _TOP | {ours + kind: theirs + kind for ours, theirs in parts.items() for kind in kinds}


def is_hf_state(state: Mapping[str, Tensor]) -> bool:
    return {_TOP["visual.class_embedding"], _TOP["token_embedding.weight"]} <= state.keys()


def to_hf_state(state: Mapping[str, Tensor]) -> State:
    """open_clip names -> CLIPModel names; q, k and v apart, projections transposed."""
    names, result = _names(state), State()
    for name, tensor in state.items():
        if name not in names:
            raise UserError(f"weights: transformers' CLIPModel has no place for {name}; export to open_clip")
        if "*" in names[name]:
            for letter, part in zip("qkv", rearrange(tensor, "(qkv d) ... -> qkv d ...", qkv=3), strict=True):
                result[names[name].replace("*", letter)] = part.contiguous()
        else:
            result[names[name]] = (tensor.T if name in _TRANSPOSED else tensor).contiguous()
    return result


def from_hf_state(state: Mapping[str, Tensor]) -> State:
    """The inverse of `to_hf_state`."""
    left = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    result = State()
    for name, theirs in _names(state).items():
        parts = [theirs.replace("*", letter) for letter in ("qkv" if "*" in theirs else "*")]
        if given := [left.pop(part) for part in parts if part in left]:
            tensor = torch.cat(given) if given[1:] else given[0]
            result[name] = (tensor.T if name in _TRANSPOSED else tensor).contiguous()
    if left:
        raise UserError(f"weights: open_clip's CLIP has no place for {next(iter(left))}")
    return result


SIZES: dict[str, dict[str, str]] = {
    "vision_cfg": {
        "image_size": "image_size", "layers": "num_hidden_layers", "width": "hidden_size", "patch_size": "patch_size",
    },
    "text_cfg": {
        "context_length": "max_position_embeddings", "vocab_size": "vocab_size", "width": "hidden_size",
        "heads": "num_attention_heads", "layers": "num_hidden_layers",
    },
}  # fmt: skip
"""Sizes of both towers: open_clip's name -> transformers'."""


def from_hf_config(hf: Mapping[str, Any], origin: str) -> Config:
    """The open_clip config of a CLIPModel's config.json; `origin` names it in errors."""
    from transformers import CLIPConfig

    if (kind := hf.get("model_type")) != "clip":
        raise UserError(f"{origin}: model_type is {kind!r}; hf: reads transformers' CLIPModel (clip)")
    full = CLIPConfig.from_dict(dict(hf))
    towers: dict[str, Any] = {"vision_cfg": full.vision_config, "text_cfg": full.text_config}
    acts = {tower.hidden_act for tower in towers.values()}
    if acts not in ({"gelu"}, {"quick_gelu"}):
        raise UserError(f"{origin}: hidden_act {sorted(acts)}; both towers need gelu, or both quick_gelu")
    config: Config = {"embed_dim": full.projection_dim, "quick_gelu": acts == {"quick_gelu"}}
    for section, tower in towers.items():
        config[section] = {ours: getattr(tower, theirs) for ours, theirs in SIZES[section].items()}
        if tower.intermediate_size != 4 * tower.hidden_size:
            config[section]["mlp_ratio"] = mlp_ratio(tower.intermediate_size, tower.hidden_size)
        if tower.layer_norm_eps != 1e-5:
            config[section]["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    image, text = towers.values()
    config["vision_cfg"]["head_width"] = image.hidden_size // image.num_attention_heads
    # The last id is the highest: argmax finds it.
    if text.eos_token_id not in (ARGMAX_EOS, text.vocab_size - 1):
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return config


def mlp_ratio(channels: int, width: int) -> float:
    """The ratio from which open_clip's int(width * ratio) gives exactly `channels`."""
    ratio = channels / width
    return ratio if int(width * ratio) == channels else (channels + 0.5) / width


def from_hf_processor(processor: Mapping[str, Any]) -> Config:
    """open_clip's preprocess config; absent fields have the values of OpenAI's CLIP."""
    return {
        "mean": processor.get("image_mean", OPENAI_MEAN),
        "std": processor.get("image_std", OPENAI_STD),
        "interpolation": _INTERPOLATIONS.get(processor.get("resample", 3), "bicubic"),
        "resize_mode": "shortest" if processor.get("do_center_crop", True) else "squash",
    }
