"""Weights files of CLIPs, read as data: TinyCLIP's two training layouts and automatic (fused) files, plain open_clip,
transformers' CLIPModel, OpenAI's archives; half or single precision.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd.errors import UserError
from vlmkd.models.convert import from_hf_state, is_hf_state, mlp_ratio
from vlmkd.models.pruned_clip import Config, PrunedCLIP, State, config_from_state_dict
from vlmkd.tensor_files import read_torch, zip_members
from vlmkd.zoo import sha256_of

_NESTED = ("state_dict", "model_state_dict", "model_dict", "model", "module")
"""Entries of a training checkpoint that may hold the weights, first match wins."""
_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that wrappers (DDP, torch.compile, our encoder) put before every name."""
_TINYCLIP = r"^(?:(?:_image_encoder|_text_encoder|_logit_scale|\w+_without_ddp)\.)?(?:module\.)?"
"""Prefixes of TinyCLIP's training code: each part apart, and a copy of each without DDP."""
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Extra tensors of OpenAI's archives."""


def read_state_dict(path: str | Path) -> State:
    """The weights in `path` as fp32, under open_clip.CLIP's names."""
    return normalise_names(read_tensors(path))


def read_tensors(path: str | Path) -> State:
    """The weights in `path` as they are, under the file's own names."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"weights file {path} is a folder; name it local-dir:PATH (open_clip) or hf:PATH")
    plain = [argparse.Namespace]  # the `args` of training checkpoints
    content: Any = _read_openai_archive(path) if is_torchscript(path) else read_torch(path, plain=plain)
    held = content if isinstance(content, Mapping) else {}
    held = next((held[key] for key in _NESTED if isinstance(held.get(key), Mapping)), held)
    state = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"weights file {path} holds no tensors by name, bare or under `state_dict`")
    return state


def normalise_names(state: Mapping[str, Tensor]) -> State:
    """`state` of any known layout as fp32 under open_clip.CLIP's names; a foreign text tower keeps its own."""
    named = dict(state)
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in named):
            named = {name.removeprefix(wrapper): tensor for name, tensor in named.items()}
    if is_hf_state(named):
        named = from_hf_state(named)
    result = {}
    for name, tensor in sorted(named.items(), key=lambda item: "_without_ddp." not in item[0]):
        name = re.sub(_TINYCLIP, "", name).removeprefix("text.")
        if name not in _NOT_WEIGHTS:  # a copy, read first, gives way
            result[name] = tensor.float() if tensor.is_floating_point() else tensor
    return result


def is_torchscript(path: Path) -> bool:
    """Whether `path` is a TorchScript archive, as OpenAI's own downloads are."""
    names = [member.filename for member in zip_members(path) or []]
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def _read_openai_archive(path: Path) -> State:
    """Any other TorchScript program is refused unread."""
    from open_clip.pretrained import get_pretrained_url, list_pretrained_models_by_tag

    digest = sha256_of(path)
    urls = [get_pretrained_url(name, "openai") for name in list_pretrained_models_by_tag("openai")]
    if not any(f"/{digest}/" in url for url in urls):  # the digest is a part of OpenAI's addresses
        told = f"none of OpenAI's (sha256 {digest}); give its state dict as safetensors"
        raise UserError(f"weights file {path} is a TorchScript program and {told}")
    return dict(torch.jit.load(str(path), map_location="cpu").state_dict())


def load_weights(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Fill an open_clip model or PrunedCLIP strictly from `state` of any known layout."""
    from open_clip.convert import convert_state_dict

    named, wanted = normalise_names(convert_state_dict(module, dict(state))), module.state_dict()
    if isinstance(module, PrunedCLIP):
        given = module.completed(named)
    else:
        given = {f"text.{name}" if f"text.{name}" in wanted else name: value for name, value in named.items()}
        given = {name: value for name, value in given.items() if not name.endswith("embeddings.position_ids")}
    for name in ("logit_scale", "logit_bias"):  # [] or [1]; files have either
        if name in given and name in wanted:
            given[name] = given[name].reshape(wanted[name].shape)
    if problems := differences(wanted, given):
        raise UserError(f"weights {origin} are of another architecture: {problems}{_suggestion(named)}")
    module.load_state_dict(given)


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first missing, unexpected and resized tensors in words; empty: there are none."""
    want, have = ({name: list(tensor.shape) for name, tensor in held.items()} for held in (wanted, given))
    resized = {name: shape for name, shape in want.items() if have.get(name, shape) != shape}
    groups = {
        "missing": [f"{name} {shape}" for name, shape in want.items() if name not in have],
        "unexpected": [f"{name} {shape}" for name, shape in have.items() if name not in want],
        "resized": [f"{name} {have[name]} instead of {shape}" for name, shape in resized.items()],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3] + ['...'] * (len(names) > 3))}"
        for kind, names in groups.items()
        if names
    )


def _suggestion(named: State) -> str:
    """What `named` is instead, where its shapes tell."""
    try:
        config = identify(named)
    except UserError:
        return ""
    if config.get("pruned"):
        return "; they are a pruned CLIP with ragged layers: write identify()'s config as JSON and name that file"
    image, text = config["vision_cfg"], config["text_cfg"]
    vision = f"vision {image['layers']} layers x {image['width']}, patch {image['patch_size']}"
    return f"; they are {vision}, text {text['layers']} layers x {text['width']}, embedding {config['embed_dim']}"


def identify(state: Mapping[str, Tensor], *, head_width: int = 64) -> Config:
    """The config, open_clip's or the pruned one, of the ViT CLIP in `state` (any layout), read from its shapes.

    The activation is assumed to be GELU, as of every TinyCLIP; set `quick_gelu` for OpenAI's.
    """
    pruned = config_from_state_dict(normalise_names(state), head_width=head_width)
    image, text = pruned["vision_cfg"], pruned["text_cfg"]
    sections = {
        "vision_cfg": {name: image[name] for name in ("image_size", "width", "patch_size")},
        "text_cfg": {name: text[name] for name in ("context_length", "vocab_size", "width")},
    }
    for name, section in sections.items():
        heads, mlp, width = (pruned[name][field] for field in ("heads", "mlp", "width"))
        if len(set(heads)) != 1 or len(set(mlp)) != 1 or heads[0] * head_width != width or not mlp[0]:
            return pruned
        section["layers"] = len(heads)
        if mlp[0] != 4 * width:
            section["mlp_ratio"] = mlp_ratio(mlp[0], width)
    sections["text_cfg"]["heads"] = text["heads"][0]
    sections["vision_cfg"] |= {"head_width": head_width} if head_width != 64 else {}
    bias = {"init_logit_bias": -10.0} if pruned.get("logit_bias") else {}
    return {"embed_dim": pruned["embed_dim"], **sections, **bias}
