"""The published layout of teacher and hybrids (TinyLLaVA's) -> an export of this code, and back; or for transformers.

    python -m projects.matvlm.convert PUBLISHED EXPORT --tower timm:vit_so400m_patch14_siglip_384 --decoder hf:microsoft/phi-2
    python -m projects.matvlm.convert --back EXPORT PUBLISHED
    python -m projects.matvlm.convert --transformers EXPORT FOLDER

Tower and decoder are what the published model was made of; the export holds the tensors that differ from theirs. Which
layers are Mamba-2 is told by the tensors, and by `attn_layers` of mamba_config.json, and both have to agree. A file of
text alone (MambaInLlama) has no such export; `from_published` and `to_hybrid` load it.

The third is the language model alone: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) loads it where
this code is not installed. Features of images go in as `inputs_embeds`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import vlmkd
from projects.matvlm.config import HybridConfig
from projects.matvlm.mixer import Mamba2Mixer
from projects.matvlm.student import HYBRID_FACTS, surgery
from projects.matvlm.surgery import mixers_of, to_hybrid
from vlmkd.chat_config import MllmConfig
from vlmkd.errors import UserError, run_tool
from vlmkd.export.folder import replacing, write_tensors
from vlmkd.export.mllm import ChatParts, build_mllm, export_mllm, load_mllm
from vlmkd.files import read_object, read_text, write_json, write_text
from vlmkd.models.checkpoints import differences
from vlmkd.tensor_files import read_safetensors

CONFIG, MAMBA_CONFIG, WEIGHTS, INDEX = (
    "config.json", "mamba_config.json", "model.safetensors", "model.safetensors.index.json",
)  # fmt: skip
TOWER, DECODER = "timm:vit_so400m_patch14_siglip_384", "hf:microsoft/phi-2"
MODELING = "modeling_hybrid"
CODE = [
    *(Path(__file__).with_name(f"{name}.py") for name in (MODELING, "surgery", "mixer", "cache", "ssd")),
    *(Path(vlmkd.__file__).parent / name for name in ("errors.py", "models/lora.py")),
]
"""What a folder for transformers has of this code."""
_TOWER, _CONNECTOR, _DECODER = "vision_tower._vision_tower.", "connector._connector.", "language_model."
_LAYER = re.compile(r"layers\.(\d+)\.(mamba|self_attn)\.")
# transformers' SigLIP -> timm's, but for the projections that timm joins.
_SIGLIP = [
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".self_attn.", ".attn."),
    ("post_layernorm.", "norm."),
    ("head.probe", "attn_pool.latent"),
    ("head.attention.out_proj.", "attn_pool.proj."),
    ("head.attention.in_proj_", "attn_pool.in_proj_"),
    ("head.layernorm.", "attn_pool.norm."),
    ("head.mlp.", "attn_pool.mlp."),
]

State = dict[str, Tensor]


def from_published(state: Mapping[str, Tensor]) -> State:
    """A published state dict under the names of `Mllm`; a text model's under those of its decoder's part."""
    found: State = {}
    tower: State = {}
    for name, value in state.items():
        if name.startswith(_TOWER):
            tower[name.removeprefix(_TOWER).removeprefix("vision_model.")] = value
        elif name.startswith(_CONNECTOR):
            found[f"projector.{name.removeprefix(_CONNECTOR)}"] = value
        else:
            found[f"decoder.{name.removeprefix(_DECODER).replace('.mamba.', '.self_attn.')}"] = value
    return found | {f"tower.backbone.{name}": value for name, value in _to_timm(tower).items()}


def to_published(state: Mapping[str, Tensor], mamba: list[int]) -> State:
    """The other way: `mamba` are the layers that are."""
    found: State = {}
    tower: State = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "tower":
            tower[rest.removeprefix("backbone.")] = value
        elif part == "projector":
            found[_CONNECTOR + rest] = value
        else:
            if (layer := _LAYER.search(rest)) and int(layer[1]) in mamba:
                rest = rest.replace(".self_attn.", ".mamba.")
            found[_DECODER + rest] = value
    return found | {f"{_TOWER}vision_model.{name}": value for name, value in _from_timm(tower).items()}


def _to_timm(state: Mapping[str, Tensor]) -> State:
    """transformers' SigLIP under timm's names, query, key and value joined."""
    found: State = {}
    for name, value in state.items():
        for theirs, ours in _SIGLIP:
            name = name.replace(theirs, ours)
        found[name] = rearrange(value, "n d -> 1 n d") if name == "pos_embed" else value
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace(".q_proj.", f".{one}_proj.")) for one in "qkv"]
        found[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    for kind in ("weight", "bias"):
        joined = found.pop(f"attn_pool.in_proj_{kind}", None)
        if joined is not None:
            query, *key_value = joined.chunk(3)
            found[f"attn_pool.q.{kind}"], found[f"attn_pool.kv.{kind}"] = query, torch.cat(key_value)
    return found


def _from_timm(state: Mapping[str, Tensor]) -> State:
    """The other way."""
    found: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for one, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{one}_proj.")] = part
        elif name.startswith("attn_pool.q."):
            joined = torch.cat([value, state[name.replace(".q.", ".kv.")]])
            found[name.replace(".q.", ".in_proj_")] = joined
        elif not name.startswith("attn_pool.kv."):
            found[name] = rearrange(value, "1 n d -> n d") if name == "pos_embed" else value
    named: State = {}
    for name, value in found.items():
        for theirs, ours in _SIGLIP:
            whole = ours in ("norm.", "blocks.")  # which end other names too
            name = re.sub(rf"^{re.escape(ours)}", theirs, name) if whole else name.replace(ours, theirs)
        named[name] = value
    return named


def read_published(folder: Path) -> tuple[State, list[int], bool]:
    """The weights of a published folder, its Mamba-2 layers, and whether their projections have biases."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        content = read_object(folder / INDEX, "index of the weights").get("weight_map")
        if not isinstance(content, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; download the folder again")
        names = sorted({Path(str(name)).name for name in content.values()})
    state: State = {}
    for name in names:
        state |= read_safetensors(folder / name)
    kinds: dict[int, set[str]] = {}
    for name in state:
        if (found := _LAYER.search(name)) and not name.startswith(_TOWER):
            kinds.setdefault(int(found[1]), set()).add(found[2])
    if both := sorted(layer for layer, kind in kinds.items() if len(kind) > 1):
        raise UserError(f"{folder}: layers {both} have attention and a mixer; download the folder again")
    mamba = sorted(layer for layer, kind in kinds.items() if kind == {"mamba"})
    for name, value in state.items():  # the convolution runs over x, B and C; z and dt are beside them
        if name.endswith(".mamba.conv1d.weight"):
            mixer, parts = name.removesuffix("conv1d.weight"), ("in_proj.weight", "norm.weight", "A_log")
            rows, inner, heads = (len(state[mixer + part]) for part in parts)
            if len(value) != rows - inner - heads:
                raise UserError(
                    f"{folder}: {name} has {len(value)} channels, not {rows - inner - heads}: keys and values are repeated "
                    "before the convolution (repeat_kv_before_conv), which this mixer does after it"
                )
    biased = any(".mamba.in_proj.bias" in name for name in state)
    if (folder / MAMBA_CONFIG).is_file():
        told = read_object(folder / MAMBA_CONFIG, "hybrid's config")
        attention = sorted(kinds.keys() - set(mamba))
        given = told.get("attn_layers")
        same = (
            isinstance(given, list)
            and len(given) == len(attention)
            and all(one in given for one in attention)
        )
        if not same or bool(told.get("is_bias", biased)) != biased:
            raise UserError(
                f"{folder / MAMBA_CONFIG}: attn_layers and is_bias are {given} and {told.get('is_bias')}, "
                f"the weights have attention in {attention} and is_bias={biased}; correct the file"
            )
    elif mamba:
        raise UserError(f"{folder} has mixers and no {MAMBA_CONFIG}; download the whole folder")
    return state, mamba, biased


def fill(parts: ChatParts, folder: Path) -> None:
    """Make `parts`, of stock tower and decoder, the model of a published folder."""
    published, mamba, biased = read_published(folder)
    stock = parts.module.state_dict()
    if mamba:
        options = HybridConfig(layers=mamba, bias="auto" if biased else "never")
        decoder: Any = to_hybrid(parts.module.decoder, options)  # type: ignore[arg-type]
        parts.facts = parts.facts | {HYBRID_FACTS: decoder.config.matvlm}
    state, own = from_published(published), parts.module.state_dict()
    if problems := differences(own, state):
        raise UserError(f"{folder} does not fit ({problems}); name its own --tower and --decoder")
    # What was drawn here, mixers and projector, is no stock, whatever it equals.
    drawn = {name for name in state if name not in stock or name.startswith("projector.")}
    changed = {n for n in state.keys() - drawn if not torch.equal(state[n].to(own[n].dtype), stock[n])}
    parts.trained = drawn | changed
    parts.module.load_state_dict(state)


def write_published(folder: Path, parts: ChatParts) -> None:
    """Write a model as the published code lays it out: weights, both configs, the tokenizer."""
    decoder: Any = parts.module.decoder
    tower: Any = parts.module.tower
    cfg = parts.config
    if not hasattr(tower.backbone, "attn_pool") or len(cfg.tower_layers) > 1 or cfg.grid or cfg.tower_norm:
        raise UserError(
            f"the published layout has one layer of a SigLIP of timm as it is, not {cfg.tower} with tower_layers="
            f"{cfg.tower_layers}, grid={cfg.grid}, tower_norm={cfg.tower_norm}; --transformers writes the language model alone"
        )
    mixers = {
        index: layer.self_attn for index, layer in enumerate(decoder.model.layers)
        if isinstance(layer.self_attn, Mamba2Mixer)
    }  # fmt: skip
    text = decoder.config.to_dict()
    with replacing(folder, [WEIGHTS]) as partial:
        write_tensors(partial / WEIGHTS, to_published(parts.module.state_dict(), list(mixers)))
        write_json(
            partial / CONFIG,
            {
                "model_type": "tinyllava", "llm_model_name_or_path": cfg.decoder.removeprefix("hf:"),
                "vision_model_name_or_path": cfg.tower, "connector_type": "mlp2x_gelu",
                "vision_feature_layer": cfg.tower_layers[0],
                "vision_feature_select_strategy": "patch" if cfg.drop_first else "cls_patch",
                "image_aspect_ratio": {"squash": "square", "longest": "pad"}.get(cfg.resize, cfg.resize),
                "text_config": {name: value for name, value in text.items() if name not in ("matvlm", "layer_types")},
            },
        )  # fmt: skip
        if mixers:
            write_json(partial / MAMBA_CONFIG, mamba_config(decoder, mixers))
        parts.tokenizer.save_pretrained(partial)


def mamba_config(decoder: Any, mixers: Mapping[int, Mamba2Mixer]) -> dict[str, Any]:
    config, shape = decoder.config, next(iter(mixers.values())).shape
    eps = "layer_norm_eps" if hasattr(config, "layer_norm_eps") else "rms_norm_eps"
    return {
        "d_model": shape.width,
        "ssm_cfg": {"expand": 1, "ngroups": shape.heads, "d_state": shape.head_dim},
        eps: getattr(config, eps),
        "vocab_size": None,
        "d_inner": shape.inner,
        "d_xb": shape.shared,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "n_layer": len(decoder.model.layers),
        "attn_layers": sorted({*range(len(decoder.model.layers))} - mixers.keys()),
        "resid_pdrop": getattr(config, "resid_pdrop", 0.0),
        "bidirectional": False,
        "is_bias": shape.bias,
    }


def write_transformers(folder: Path, decoder: Any, tokenizer: Any) -> None:
    """Write a hybrid as a folder that transformers loads by the code in it."""
    if not mixers_of(decoder):
        raise UserError("the model has no Mamba-2 layers; transformers loads its decoder as it is")
    kind = type(decoder).__name__.removesuffix("ForCausalLM")
    with replacing(folder, [f"{MODELING}.py"]) as partial:
        for path in CODE:
            write_text(partial / path.name, portable(read_text(path, "source"), kind))
        decoder.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        config = read_object(partial / CONFIG, "config")
        classes = {"AutoConfig": f"Hybrid{kind}Config", "AutoModelForCausalLM": f"Hybrid{kind}ForCausalLM"}
        config |= {
            "model_type": f"matvlm_{kind.lower()}", "architectures": [classes["AutoModelForCausalLM"]],
            "auto_map": {name: f"{MODELING}.{one}" for name, one in classes.items()},
        }  # fmt: skip
        write_json(partial / CONFIG, config)


def portable(source: str, kind: str) -> str:
    """A module of this code for a folder of its own: beside those that it imports, and Llama by the name of `kind`."""
    source = re.sub(r"\nif TYPE_CHECKING:\n( .*\n)+", "", source)
    source = re.sub(r"from (projects\.matvlm|vlmkd(\.models)?)\.(\w+) import", r"from .\3 import", source)
    if "class HybridLlama" in source:
        source = source.replace("Llama", kind).replace("llama", kind.lower())
    return f"# Part of vlmkd {vlmkd.__version__}, Apache License 2.0: copied, and only its imports changed.\n{source}"


def main(argv: list[str]) -> int:
    """Parse arguments and convert; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, ways = parser.add_argument, parser.add_mutually_exclusive_group()
    add("source", type=Path)
    add("target", type=Path)
    ways.add_argument("--back", action="store_true", help="from an export to the published layout")
    ways.add_argument("--transformers", action="store_true", help="from an export, for transformers")
    add("--tower", help=f"stock tower ({TOWER})")
    add("--decoder", help=f"stock decoder ({DECODER})")
    add("--keep-first", action="store_true", help="729 features an image; published: 728")
    args = parser.parse_args(argv)
    if (args.back or args.transformers) and (args.tower or args.decoder or args.keep_first):
        parser.error("--tower, --decoder and --keep-first are for a published model; an export names its own")
    if args.back or args.transformers:
        parts = load_mllm(args.source, surgery=surgery)
        if args.back:
            write_published(args.target, parts)
        else:
            write_transformers(args.target, parts.module.decoder, parts.tokenizer)
        return 0
    tower, decoder = args.tower or TOWER, args.decoder or DECODER
    cfg = MllmConfig(tower=tower, decoder=decoder, resize="squash", drop_first=not args.keep_first)
    parts = replace(build_mllm(cfg), project="matvlm")
    fill(parts, args.source)
    export_mllm(args.target, parts, parts.module.state_dict())
    print(f"wrote {args.target}: {len(parts.trained)} tensors that are not {cfg.tower}'s or {cfg.decoder}'s")
    return 0


if __name__ == "__main__":
    run_tool(main)
