"""Tensors and config.json of other code's layouts (docs/papers/llava_mod.md#checkpoints); convert.py has the folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from projects.llava_mod.qwen1 import from_qwen1, to_qwen1
from projects.llava_mod.student import SPARSE_FACTS, surgery
from vlmkd.errors import UserError
from vlmkd.models.checkpoints import differences
from vlmkd.models.convert import from_hf_state, to_hf_state
from vlmkd.models.mllm import Projector

State = dict[str, Tensor]
Config = dict[str, Any]

LAYOUTS = ("llava_mod", "llava", "moe_llava", "qwen2_moe")
TOWER, PROJECTOR, DECODER, HEAD = "tower.backbone.", "projector.", "decoder.", "decoder.lm_head.weight"
UNUSED = f"{TOWER}proj"
"""CLIP's projection to the space of texts, which comes after the features and is in no file."""
_SHARED = 8
"""Width of the shared expert that Qwen2-MoE must have; it is zero."""
_TOWERS = {"openai/clip-vit-large-patch14-336": "clip:ViT-L-14-336@openai"}
_LLAVA = ("model.mm_projector.", "model.vision_tower.vision_tower.", "mm_vision_tower", "mm_projector_type")
MOD = (
    "model.mm_projector.image_spatial_proj.", "model.image_tower.image_tower.", "mm_image_tower", "image_projector_type"
)  # fmt: skip
"""Projector, tower, and the config's fields of both."""
_QWEN2 = ("qwen", "qwen1_5", "qwen2_moe")


@dataclass
class Whole:
    """A model under our names, whatever it was read from."""

    weights: State
    """As `Mllm.state_dict`, without `UNUSED` and a tied head; qwen2_moe brings no tower."""
    decoder: Config
    """config.json of the dense decoder, as transformers completes it."""
    sparse: Config
    """Arguments of `upcycle`; empty: dense."""
    tower: str
    """As `load_backbone` takes it."""
    tower_layer: int = -2


def layout_of(config: Mapping[str, Any]) -> str:
    """What a config.json says that its folder is."""
    kind = str(config.get("model_type"))
    if kind == "qwen2_moe":
        return kind
    if "llava_" in kind and _LLAVA[2] in config:
        return "llava"
    if "llava_" in kind and MOD[2] in config:
        return "moe_llava" if kind.endswith(("_qwen", "_stablelm")) else "llava_mod"
    raise UserError(
        f"config.json has model_type {kind!r} and neither {_LLAVA[2]} nor {MOD[2]}; known layouts: {', '.join(LAYOUTS)}"
    )


def to_layout(whole: Whole, layout: str) -> tuple[State, Config]:
    """Tensors and config.json of a layout."""
    sparse, kind, names = whole.sparse, whole.decoder["model_type"], _LLAVA if layout == "llava" else MOD
    state, config = _part(whole.weights, DECODER), _flat(whole.decoder)
    if sparse:
        allow(layout != "llava", layout, "has no sparse layers; choose llava_mod")
        _apart(state, sparse, layout)
    state |= _part(whole.weights, PROJECTOR, names[0])
    known = {ours: theirs for theirs, ours in _TOWERS.items()}
    config |= {
        names[2]: known.get(whole.tower, whole.tower), names[3]: "mlp2x_gelu", "image_aspect_ratio": "pad",
        "mm_hidden_size": whole.weights["projector.0.weight"].shape[1], "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": whole.tower_layer, "tokenizer_padding_side": "right", "torch_dtype": "float32",
    }  # fmt: skip
    if layout == "qwen2_moe":
        allow(kind == "qwen2", layout, f"is of Qwen2's type, not {kind}")
        return state | _shared(whole), config | _qwen2_moe(whole)
    tower = _part(whole.weights, TOWER, "visual.")
    allow("visual.class_embedding" in tower, layout, "has a ViT of CLIP as tower; qwen2_moe has none")
    state |= {names[1] + name: value for name, value in to_hf_state(tower).items()}
    if layout == "llava":
        kind = {"qwen2": "qwen"}.get(kind, kind)
    elif layout == "moe_llava" and kind != "stablelm":
        alike = kind == "qwen2" and config["num_key_value_heads"] == config["num_attention_heads"]
        allow(alike, layout, "has StableLM, and Qwen without grouped heads; choose llava_mod")
        kind, (state, config) = "qwen", to_qwen1(state, config)
    config |= {"model_type": f"llava_{kind}", "architectures": [f"Llava{kind.capitalize()}ForCausalLM"]}
    if sparse:
        config |= {"model_type": f"moe_llava_{kind}", "moe": {
            "moe_enable": True, "moe_layers_idx": sparse["layers"], "top_k_experts": sparse["top_k"],
            "num_experts": [sparse["experts"]] * len(sparse["layers"]), "use_residual": False, "ep_size": 1,
            "moe_mode": "sparse", "capacity_factor": 1.5, "eval_capacity_factor": 2.0, "min_capacity": 0,
            "router_aux_loss_coef": 0.01, "train_modules": [],
        }}  # fmt: skip
    return state, config


def from_layout(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Whole:
    """A model out of tensors and config.json of any layout."""
    layout, rest, given = layout_of(config), dict(state), dict(config)
    names, kind = _LLAVA if layout == "llava" else MOD, re.sub(r"^(moe_)?llava_", "", given["model_type"])
    for name, only in ((names[3], "mlp2x_gelu"), ("mm_vision_select_feature", "patch")):
        allow(given.get(name, only) == only, layout, f"is not read with {name}={given.get(name)}")
    try:
        if layout == "moe_llava" and kind == "qwen":
            rest, given = from_qwen1(rest, given)
        if layout == "qwen2_moe":
            sparse = _from_qwen2_moe(rest, given)
        else:
            sparse = _sparse(layout, given.get("moe") or {})
    except KeyError as error:
        raise UserError(f"config.json lacks {error} of layout {layout}") from None
    _stack(rest, sparse, layout)
    weights = _part(rest, names[0], PROJECTOR)
    tower = from_hf_state(_part(rest, names[1]))
    weights |= {TOWER + name.removeprefix("visual."): value for name, value in tower.items()}
    lm = {n: v for n, v in rest.items() if not n.startswith(names[:2]) and not n.endswith("inv_freq")}
    weights |= {DECODER + name: value for name, value in lm.items()}
    source = str(given.get(names[2], ""))
    decoder = _decoder_config("qwen2" if kind in _QWEN2 else kind, given)
    layer = given.get("mm_vision_select_layer", -2)
    whole = Whole(weights, decoder, sparse, _TOWERS.get(source, source), layer)
    if decoder["tie_word_embeddings"] and (head := weights.pop(HEAD, None)) is not None:
        same = torch.equal(head, weights.get(f"{DECODER}model.embed_tokens.weight", head))
        allow(same, layout, "says tie_word_embeddings, but head and embeddings differ")
    towerless = {name: value for name, value in weights.items() if not name.startswith(TOWER)}
    if problems := differences(_wanted(whole, given.get("mm_hidden_size", 0)), towerless):
        raise UserError(f"the tensors are not those of config.json ({layout}): {problems}")
    return whole


def allow(condition: bool, layout: str, message: str) -> None:
    """Refuse what a layout cannot say, by its name, unless `condition` holds."""
    if not condition:
        raise UserError(f"layout {layout} {message}")


def _part(state: Mapping[str, Tensor], old: str, new: str = "") -> State:
    return {new + name.removeprefix(old): value for name, value in state.items() if name.startswith(old)}


def _places(layout: str) -> tuple[str, str]:
    """Router and experts in a layer."""
    if layout == "qwen2_moe":
        return "mlp.gate.weight", "mlp.experts."
    return "mlp.deepspeed_moe.gate.wg.weight", "mlp.deepspeed_moe.experts.deepspeed_experts."


def _apart(state: State, sparse: Config, layout: str) -> None:
    """Stacked experts -> one matrix each, in place."""
    router, experts = _places(layout)
    for layer in (f"model.layers.{index}." for index in sparse["layers"]):
        state[layer + router] = state.pop(f"{layer}mlp.gate.weight")
        gate, up = state.pop(f"{layer}mlp.experts.gate_up_proj").chunk(2, dim=1)
        stacks = {"gate": gate, "up": up, "down": state.pop(f"{layer}mlp.experts.down_proj")}
        for name, stack in stacks.items():
            state |= {f"{layer}{experts}{e}.{name}_proj.weight": one.clone() for e, one in enumerate(stack)}


def _stack(state: State, sparse: Config, layout: str) -> None:
    """The inverse of `_apart`; transformers' own stacks stay."""
    router, experts = _places(layout)
    for layer in (f"model.layers.{index}." for index in sparse.get("layers", ())):
        if f"{layer}mlp.experts.gate_up_proj" in state:
            continue
        numbers, parts = range(sparse["experts"]), ("gate", "up", "down")
        each = [[f"{layer}{experts}{e}.{name}_proj.weight" for e in numbers] for name in parts]
        if absent := [name for name in (layer + router, *sum(each, [])) if name not in state]:
            raise UserError(
                f"config.json says that {layer[:-1]} is sparse, but {len(absent)} tensors are missing, {absent[0]} first"
            )
        state[f"{layer}mlp.gate.weight"] = state.pop(layer + router)
        gate, up, down = (torch.stack([state.pop(name) for name in names]) for names in each)
        state[f"{layer}mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{layer}mlp.experts.down_proj"] = down


def _sparse(layout: str, moe: Mapping[str, Any]) -> Config:
    """Facts of LLaVA-MoD's and MoE-LLaVA's `moe`."""
    if not moe.get("moe_enable"):
        return {}
    count = moe["num_experts"]
    counts = set(count if isinstance(count, list) else [count])
    plain = not moe.get("use_residual") and len(counts) == 1
    allow(plain, layout, f"is not read with use_residual, or {counts} experts")
    return {"layers": moe["moe_layers_idx"], "experts": counts.pop(), "top_k": moe["top_k_experts"]}


def _shared(whole: Whole) -> State:
    """Shared experts that give nothing."""
    dim, found = whole.decoder["hidden_size"], State()
    for index in whole.sparse.get("layers", ()):
        name = f"model.layers.{index}.mlp.shared_expert"
        found |= {f"{name}.{part}_proj.weight": torch.zeros(_SHARED, dim) for part in ("gate", "up")}
        found[f"{name}.down_proj.weight"] = torch.zeros(dim, _SHARED)
        found[f"{name}_gate.weight"] = torch.zeros(1, dim)
    return found


def _qwen2_moe(whole: Whole) -> Config:
    layers, config = whole.sparse.get("layers", []), whole.decoder
    return {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index in range(config["num_hidden_layers"]) if index not in layers],
        "num_experts": whole.sparse.get("experts", 0), "num_experts_per_tok": whole.sparse.get("top_k", 1),
        "norm_topk_prob": True, "moe_intermediate_size": config["intermediate_size"], "qkv_bias": True,
        "shared_expert_intermediate_size": _SHARED,
    }  # fmt: skip


def _from_qwen2_moe(state: State, config: Config) -> Config:
    """Facts; the shared experts, which must give nothing, leave `state`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = [n for n in range(config["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0]
    if not config["num_experts"] or not layers:
        return {}
    plain = config["norm_topk_prob"] and config["moe_intermediate_size"] == config["intermediate_size"]
    allow(plain, "qwen2_moe", "is read with norm_topk_prob and experts as wide as dense layers only")
    for name in [name for name in state if ".mlp.shared_expert" in name]:
        gives = state.pop(name).any() and name.endswith("down_proj.weight")
        allow(not gives, "qwen2_moe", f"is read without a shared expert only; {name} is not zero")
    return {"layers": layers, "experts": config["num_experts"], "top_k": config["num_experts_per_tok"]}


def _decoder_config(kind: str, config: Config) -> Config:
    """The dense decoder's part of a config.json."""
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise UserError(f"config.json: transformers has no decoder {kind}, of type {config['model_type']}")
    known = CONFIG_MAPPING[kind]().to_dict().keys() | {"rope_theta", "rope_scaling"}
    kept = {name: value for name, value in config.items() if name in known - {"model_type"}}
    return plain_config(CONFIG_MAPPING[kind](**kept))


def plain_config(config: Any) -> Config:
    """A config of transformers without what does not change the model."""
    said = ("architectures", "dtype", "transformers_version", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in said}


def _flat(config: Config) -> Config:
    """A config.json that older transformers read too."""
    rope = dict(config.get("rope_parameters") or {"rope_theta": 10_000.0})
    flat = {name: value for name, value in config.items() if name != "rope_parameters"}
    flat["rope_theta"] = rope.pop("rope_theta")
    return flat | ({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})


def _wanted(whole: Whole, width: int) -> State:
    """Projector and decoder as the config has them, without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width = width or whole.weights.get("projector.0.weight", torch.empty(0, 0)).shape[1]
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**whole.decoder))
        surgery(decoder, {SPARSE_FACTS: whole.sparse} if whole.sparse else {})
        projector = Projector(width, decoder.config.hidden_size)
    wanted = {DECODER + name: value for name, value in decoder.state_dict().items()}
    if whole.decoder["tie_word_embeddings"]:
        wanted.pop(HEAD)
    return wanted | {PROJECTOR + name: value for name, value in projector.state_dict().items()}
