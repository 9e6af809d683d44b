"""open_clip's CLIP to transformers' CLIPModel and back: names, sizes, activation, pooled token, pixel statistics.

Works on state dicts and plain dictionaries, so that transformers itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
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
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}


def is_hf_state(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` is named like transformers' CLIPModel."""
    return (
        "vision_model.embeddings.class_embedding" in state and "text_model.final_layer_norm.weight" in state
    )


def to_hf_state(state: Mapping[str, Tensor]) -> State:
    """open_clip names -> CLIPModel names; q, k and v apart, projections transposed.

    Raises:
        UserError: a tensor that CLIPModel has no place for; names it.
    """
    result: State = {}
    for name, tensor in state.items():
        if name in _TOP:
            result[_TOP[name]] = (tensor.T if name in _TRANSPOSED else tensor).contiguous()
            continue
        block = re.fullmatch(r"(visual\.transformer\.resblocks\.|transformer\.resblocks\.)(\d+)\.(.+)", name)
        if block is None:
            raise UserError(
                f"weights: transformers' CLIPModel has no place for {name}; export to open_clip instead"
            )
        layer = f"{_TOWERS[block[1]]}{block[2]}."
        part, _, kind = block[3].rpartition(".")
        if block[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = block[3].removeprefix("attn.in_proj_")
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{layer}self_attn.{letter}_proj.{kind}"] = piece.contiguous()
        elif part in _BLOCK:
            result[f"{layer}{_BLOCK[part]}.{kind}"] = tensor.contiguous()
        else:
            raise UserError(
                f"weights: transformers' CLIPModel has no place for {name}; export to open_clip instead"
            )
    return result


def from_hf_state(state: Mapping[str, Tensor]) -> State:
    """CLIPModel names -> open_clip names, the inverse of `to_hf_state`.

    Raises:
        UserError: a tensor that open_clip's CLIP has no place for; names it.
    """
    top = {theirs: ours for ours, theirs in _TOP.items()}
    blocks = {theirs: ours for ours, theirs in _BLOCK.items()}
    towers = {theirs: ours for ours, theirs in _TOWERS.items()}
    result: State = {}
    for name, tensor in state.items():
        if name in top:
            ours = top[name]
            result[ours] = (tensor.T if ours in _TRANSPOSED else tensor).contiguous()
            continue
        if name.endswith("position_ids"):
            continue
        block = re.fullmatch(
            r"(vision_model\.encoder\.layers\.|text_model\.encoder\.layers\.)(\d+)\.(.+)\.(\w+)", name
        )
        if block is None or (block[3] not in blocks and not re.fullmatch(r"self_attn\.[qkv]_proj", block[3])):
            raise UserError(f"weights: open_clip's CLIP has no place for {name}")
        layer = f"{towers[block[1]]}{block[2]}."
        if block[3] in blocks:
            result[f"{layer}{blocks[block[3]]}.{block[4]}"] = tensor.contiguous()
        elif block[3] == "self_attn.q_proj":
            fused = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[f"{layer}attn.in_proj_{block[4]}"] = torch.cat(fused)
    return result


# --------------------------------------------------------------------------------------------------------- configs


def to_hf_config(config: Mapping[str, Any]) -> Config:
    """The config.json of a CLIPModel that computes what open_clip's `config` computes.

    The end-of-text id is 49407 with CLIP's vocabulary; with another one it is 2, with which transformers pools at the
    highest id, as open_clip does.

    Raises:
        UserError: a part that CLIPModel does not have; names the field.
    """
    image, text = config["vision_cfg"], config["text_cfg"]
    _refuse_foreign_parts(config)
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vocabulary = text.get("vocab_size", CLIP_VOCABULARY)
    eos = vocabulary - 1 if vocabulary == CLIP_VOCABULARY else ARGMAX_EOS
    if text.get("pool_type", "argmax") == "eos":
        eos = text.get("eos_id", ARGMAX_EOS)
    vision_width, text_width = image.get("width", 768), text.get("width", 512)
    shared = {"hidden_act": act, "projection_dim": config["embed_dim"]}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision_width,
            "intermediate_size": int(vision_width * image.get("mlp_ratio", 4.0)),
            "num_hidden_layers": image.get("layers", 12),
            "num_attention_heads": vision_width // image.get("head_width", 64),
            "image_size": image.get("image_size", 224),
            "patch_size": image.get("patch_size", 16),
            "layer_norm_eps": (image.get("norm_kwargs") or {}).get("eps", 1e-5),
            **shared,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": vocabulary,
            "bos_token_id": max(vocabulary - 2, 0),
            "eos_token_id": eos,
            "pad_token_id": text.get("pad_id", 0),
            "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
            **shared,
        },
    }


_PLAIN: dict[str, dict[str, Any]] = {
    "": {"pruned": False, "multimodal_cfg": None, "init_logit_bias": None, "nonscalar_logit_scale": False},
    "vision_cfg": {
        "timm_model_name": None,
        "ls_init_value": None,
        "patch_dropout": 0.0,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "pool_type": "tok",
        "act_kwargs": None,
        "block_type": None,
    },
    "text_cfg": {
        "hf_model_name": None,
        "ls_init_value": None,
        "embed_cls": False,
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "proj_bias": False,
        "proj_type": "linear",
        "act_kwargs": None,
        "block_type": None,
    },
}
"""open_clip options that CLIPModel lacks, with the value at which they are absent."""


def _refuse_foreign_parts(config: Mapping[str, Any]) -> None:
    image = config["vision_cfg"]
    for section, plain in _PLAIN.items():
        values = config[section] if section else config
        for field, absent in plain.items():
            if values.get(field, absent) not in (absent, "default" if field == "block_type" else absent):
                name = f"{section}.{field}".lstrip(".")
                raise UserError(
                    f"model config: transformers' CLIPModel cannot have {name}={values[field]!r}; export to open_clip"
                )
    if isinstance(image.get("layers", 12), (list, tuple)):
        raise UserError("model config: transformers' CLIPModel has no ResNet tower; export to open_clip")
    if not isinstance(image.get("image_size", 224), int):
        raise UserError(
            "model config: transformers' CLIPModel needs a square image_size; export to open_clip"
        )
    if config["text_cfg"].get("pool_type", "argmax") not in ("argmax", "eos"):
        raise UserError(
            f"model config: transformers' CLIPModel cannot pool text by {config['text_cfg']['pool_type']}"
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
    image, text = hf.get("vision_config") or {}, hf.get("text_config") or {}
    acts = {image.get("hidden_act", "quick_gelu"), text.get("hidden_act", "quick_gelu")}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        raise UserError(
            f"{origin}: hidden_act {sorted(acts)}; both towers need the same one, gelu or quick_gelu"
        )
    width = image.get("hidden_size", 768)
    config: Config = {
        "embed_dim": hf.get("projection_dim", 512),
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": image.get("image_size", 224),
            "layers": image.get("num_hidden_layers", 12),
            "width": width,
            "head_width": width // image.get("num_attention_heads", 12),
            "patch_size": image.get("patch_size", 32),
            **_tower_extras(image, width, 3072),
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", CLIP_VOCABULARY),
            "width": text.get("hidden_size", 512),
            "heads": text.get("num_attention_heads", 8),
            "layers": text.get("num_hidden_layers", 12),
            **_tower_extras(text, text.get("hidden_size", 512), 2048),
        },
    }
    eos = text.get("eos_token_id", CLIP_VOCABULARY - 1)
    if eos not in (
        ARGMAX_EOS,
        config["text_cfg"]["vocab_size"] - 1,
    ):  # the last id is the highest: argmax finds it
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": eos}
    return config


def _tower_extras(tower: Mapping[str, Any], width: int, default_channels: int) -> Config:
    """mlp_ratio and norm_kwargs of a CLIPModel tower, where they are not open_clip's defaults."""
    extras: Config = {}
    channels = tower.get("intermediate_size", default_channels)
    if channels != 4 * width:
        extras["mlp_ratio"] = mlp_ratio(channels, width)
    if tower.get("layer_norm_eps", 1e-5) != 1e-5:
        extras["norm_kwargs"] = {"eps": tower["layer_norm_eps"]}
    return extras


def mlp_ratio(channels: int, width: int) -> float:
    """The ratio from which open_clip's int(width * ratio) gives exactly `channels`."""
    ratio = channels / width
    return ratio if int(width * ratio) == channels else (channels + 0.5) / width


# --------------------------------------------------------------------------------------------- pixel statistics


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


def from_hf_processor(processor: Mapping[str, Any], image_size: int) -> ImageSpec:
    """ImageSpec of a preprocessor_config.json; absent fields have the values of OpenAI's CLIP."""
    interpolations = {number: name for name, number in _RESAMPLE.items()}
    mean, std = processor.get("image_mean", OPENAI_MEAN), processor.get("image_std", OPENAI_STD)
    return ImageSpec(
        size=(image_size, image_size),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=interpolations.get(processor.get("resample", 3), "bicubic"),
        resize_mode="shortest" if processor.get("do_center_crop", True) else "squash",
    )
