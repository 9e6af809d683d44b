"""Qwen-1.0's names and config, as MoE-LLaVA's Qwen files have them, for Qwen2's: the same network (docs/papers/llava_mod.md#checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = (
    ("transformer.wte.", "model.embed_tokens."), ("transformer.ln_f.", "model.norm."), ("transformer.h.", "model.layers."),
    (".ln_1.", ".input_layernorm."), (".ln_2.", ".post_attention_layernorm."), (".attn.c_proj.", ".self_attn.o_proj."),
    (".w1.", ".up_proj."), (".w2.", ".gate_proj."), (".c_proj.", ".down_proj."), ("transformer.", "model."),
)  # fmt: skip
"""In this order either way; q, k and v are one matrix there."""
_FIELDS = {"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta", "seq_length": "max_position_embeddings"}  # fmt: skip
_QKV = r"(model\.layers\.\d+\.)self_attn\.([qkv])_proj(\.\w+)"


def to_qwen1(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Qwen2 without grouped heads, under Qwen-1.0's names; its `intermediate_size` counts both halves."""
    result = {}
    for name, value in state.items():
        if (found := re.fullmatch(_QKV, name)) and found[2] == "q":
            parts = [state[f"{found[1]}self_attn.{letter}_proj{found[3]}"] for letter in "qkv"]
            name, value = f"{found[1]}attn.c_attn{found[3]}", torch.cat(parts)
        if not re.fullmatch(_QKV, name):
            result[_renamed(name, [(ours, theirs) for theirs, ours in _NAMES])] = value
    fields = {theirs: config[ours] for theirs, ours in _FIELDS.items()}
    return result, {**config, **fields, "intermediate_size": 2 * config["intermediate_size"]}


def from_qwen1(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `to_qwen1`."""
    result = {}
    for name, value in state.items():
        name = _renamed(name, _NAMES)
        if ".attn.c_attn." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[name.replace("attn.c_attn", f"self_attn.{letter}_proj")] = part.contiguous()
        else:
            result[name] = value
    fields = {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    sizes = {
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
    }
    return result, {**config, **fields, **sizes}


def _renamed(name: str, pairs: Any) -> str:
    for old, new in pairs:
        name = name.replace(old, new, 1) if old.startswith(".") or name.startswith(old) else name
    return name
