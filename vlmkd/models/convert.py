"""open_clip's CLIP to transformers' CLIPModel and back: names, sizes, activation, pooled token, pixel statistics.

Works on state dicts and plain dictionaries, so that transformers itself is not needed: it has a converter of OpenAI's
archives only, which builds both models.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

Config = dict[str, Any]
State = dict[str, Tensor]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_VOCABULARY = 49408
"""Size of CLIP's own vocabulary; its last two ids are start and end of text."""
ARGMAX_EOS = 2
"""The end-of-text id with which transformers pools at the highest id, as open_clip does."""
_RESAMPLE = {"bicubic": 3, "bilinear": 2}
"""PIL's numbers."""

# ----------------------------------------------------------------------------------------------------------- weights

_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled so by transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("visual.proj", "text_projection")
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
    """open_clip's name -> CLIPModel's, for as many layers as `state` of either kind has; `*` stands for q, k and v."""
    layers = {found[1] for name in state if (found := re.search(r"\.(?:resblocks|layers)\.(\d+)\.", name))}
    return _TOP | {
        f"{ours}.{layer}.{part}{kind}": f"{theirs}.{layer}.{their_part}{kind}"
        for ours, theirs in _TOWERS.items()
        for layer in layers
        for part, their_part in _BLOCK.items()
        for kind in ("weight", "bias")
    }


def is_hf_state(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` is named like transformers' CLIPModel."""
    return {_TOP["visual.class_embedding"], _TOP["ln_final.weight"]} <= state.keys()


def to_hf_state(state: Mapping[str, Tensor]) -> State:
    """open_clip names -> CLIPModel names; q, k and v apart, projections transposed.

    Raises:
        UserError: a tensor that CLIPModel has no place for; names it.
    """
    names, result = _names(state), State()
    for name, tensor in state.items():
        if name not in names:
            raise UserError(
                f"weights: transformers' CLIPModel has no place for {name}; export to open_clip instead"
            )
        if "*" in names[name]:
            for letter, part in zip("qkv", rearrange(tensor, "(qkv d) ... -> qkv d ...", qkv=3), strict=True):
                result[names[name].replace("*", letter)] = part.contiguous()
        else:
            result[names[name]] = (tensor.T if name in _TRANSPOSED else tensor).contiguous()
    return result


def from_hf_state(state: Mapping[str, Tensor]) -> State:
    """CLIPModel names -> open_clip names, the inverse of `to_hf_state`.

    Raises:
        UserError: a tensor that open_clip's CLIP has no place for; names it.
    """
    left = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    result = State()
    for name, theirs in _names(state).items():
        parts = [theirs.replace("*", letter) for letter in ("qkv" if "*" in theirs else "*")]
        if given := [left.pop(part) for part in parts if part in left]:
            result[name] = (
                given[0].T if name in _TRANSPOSED else torch.cat(given) if given[1:] else given[0]
            ).contiguous()
    if left:
        raise UserError(f"weights: open_clip's CLIP has no place for {next(iter(left))}")
    return result


# ----------------------------------------------------------------------------------------------------------- configs

_SIZES = {
    "vision_cfg": (
        ("image_size", 224, "image_size", 224),
        ("layers", 12, "num_hidden_layers", 12),
        ("width", 768, "hidden_size", 768),
        ("patch_size", 16, "patch_size", 32),
    ),
    "text_cfg": (
        ("context_length", 77, "max_position_embeddings", 77),
        ("vocab_size", CLIP_VOCABULARY, "vocab_size", CLIP_VOCABULARY),
        ("width", 512, "hidden_size", 512),
        ("heads", 8, "num_attention_heads", 8),
        ("layers", 12, "num_hidden_layers", 12),
    ),
}
"""Sizes of both towers: open_clip's name and default, transformers' name and default."""
_SAID_OTHERWISE = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "head_width", "mlp_ratio",
    "norm_kwargs", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id",
}  # fmt: skip
"""Fields that CLIPModel says in another way, or that do not change what is computed."""


def to_hf_config(config: Mapping[str, Any]) -> Config:
    """The config.json of a CLIPModel that computes what open_clip's `config` computes.

    The end-of-text id is 49407 with CLIP's vocabulary; with another one it is 2, with which transformers pools at the
    highest id, as open_clip does.

    Raises:
        UserError: a part that CLIPModel does not have; names the field.
    """
    _refuse_foreign_parts(config)
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    towers: dict[str, Config] = {}
    for section, sizes in _SIZES.items():
        given = config[section]
        tower = {theirs: given.get(ours, default) for ours, default, theirs, _ in sizes}
        towers[section] = {
            **tower,
            "model_type": f"clip_{section.removesuffix('_cfg')}_model",
            "intermediate_size": int(tower["hidden_size"] * given.get("mlp_ratio", 4.0)),
            "layer_norm_eps": (given.get("norm_kwargs") or {}).get("eps", 1e-5),
            "hidden_act": act,
            "projection_dim": config["embed_dim"],
        }
    image, text = towers.values()
    image["num_attention_heads"] = image["hidden_size"] // config["vision_cfg"].get("head_width", 64)
    vocabulary = text["vocab_size"]
    eos = vocabulary - 1 if vocabulary == CLIP_VOCABULARY else ARGMAX_EOS
    if config["text_cfg"].get("pool_type") == "eos":
        eos = config["text_cfg"].get("eos_id", ARGMAX_EOS)
    ends = {"bos_token_id": max(vocabulary - 2, 0), "eos_token_id": eos}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "vision_config": image,
        "text_config": {**text, **ends, "pad_token_id": config["text_cfg"].get("pad_id", 0)},
    }


def _refuse_foreign_parts(config: Mapping[str, Any]) -> None:
    """Refuse whatever differs from open_clip's defaults in a field that CLIPModel has no place for."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    absent: dict[str, Config] = {"": {}} | {
        section: {item.name: item.default for item in dataclasses.fields(kind)}
        for section, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg))
    }
    for section, defaults in absent.items():
        for field, value in (config[section] if section else config).items():
            known = _SAID_OTHERWISE | {ours for ours, *_ in _SIZES.get(section, ())}
            allowed = (False, None, defaults.get(field), "default" if field == "block_type" else None)
            if field not in known and value not in allowed and (field, value) != ("pool_type", "eos"):
                name = f"{section}.{field}".lstrip(".")
                raise UserError(
                    f"model config: transformers' CLIPModel cannot have {name}={value!r}; export to open_clip"
                )
    image = config["vision_cfg"]
    if isinstance(image.get("layers", 12), (list, tuple)):
        raise UserError("model config: transformers' CLIPModel has no ResNet tower; export to open_clip")
    if not isinstance(image.get("image_size", 224), int):
        raise UserError(
            "model config: transformers' CLIPModel needs a square image_size; export to open_clip"
        )


def from_hf_config(hf: Mapping[str, Any], origin: str) -> Config:
    """The open_clip config of a CLIPModel's config.json; absent fields have transformers' defaults.

    Raises:
        UserError: another model type, or an activation that open_clip's CLIP does not have.
    """
    if hf.get("model_type") != "clip":
        raise UserError(
            f"{origin}: model_type is {hf.get('model_type')!r}; hf: reads transformers' CLIPModel (clip)"
        )
    towers = {"vision_cfg": hf.get("vision_config") or {}, "text_cfg": hf.get("text_config") or {}}
    acts = {tower.get("hidden_act", "quick_gelu") for tower in towers.values()}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        raise UserError(
            f"{origin}: hidden_act {sorted(acts)}; both towers need the same one, gelu or quick_gelu"
        )
    config: Config = {"embed_dim": hf.get("projection_dim", 512), "quick_gelu": acts == {"quick_gelu"}}
    for section, tower in towers.items():
        sizes = {ours: tower.get(theirs, default) for ours, _, theirs, default in _SIZES[section]}
        if section == "vision_cfg":
            sizes["head_width"] = sizes["width"] // tower.get("num_attention_heads", 12)
        channels = tower.get("intermediate_size", 3072 if section == "vision_cfg" else 2048)
        if channels != 4 * sizes["width"]:
            sizes["mlp_ratio"] = mlp_ratio(channels, sizes["width"])
        if tower.get("layer_norm_eps", 1e-5) != 1e-5:
            sizes["norm_kwargs"] = {"eps": tower["layer_norm_eps"]}
        config[section] = sizes
    eos = towers["text_cfg"].get("eos_token_id", CLIP_VOCABULARY - 1)
    last = config["text_cfg"]["vocab_size"] - 1
    if eos not in (ARGMAX_EOS, last):  # the last id is the highest: argmax finds it
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": eos}
    return config


def mlp_ratio(channels: int, width: int) -> float:
    """The ratio from which open_clip's int(width * ratio) gives exactly `channels`."""
    ratio = channels / width
    return ratio if int(width * ratio) == channels else (channels + 0.5) / width


# --------------------------------------------------------------------------------------------------- pixel statistics


def to_hf_processor(spec: ImageSpec) -> Config:
    """preprocessor_config.json of transformers' CLIPImageProcessor.

    Raises:
        UserError: a resize that it cannot do.
    """
    height, width = spec.size
    if spec.resize_mode == "longest":
        raise UserError(
            "image spec: transformers' CLIPImageProcessor cannot pad (resize_mode longest); export to open_clip"
        )
    squash = spec.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        "resample": _RESAMPLE[spec.interpolation],
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def from_hf_processor(processor: Mapping[str, Any]) -> Config:
    """open_clip's preprocess config of a preprocessor_config.json; absent fields have the values of OpenAI's CLIP."""
    interpolations = {number: name for name, number in _RESAMPLE.items()}
    return {
        "mean": processor.get("image_mean", OPENAI_MEAN),
        "std": processor.get("image_std", OPENAI_STD),
        "interpolation": interpolations.get(processor.get("resample", 3), "bicubic"),
        "resize_mode": "shortest" if processor.get("do_center_crop", True) else "squash",
    }
