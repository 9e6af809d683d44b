"""What the axes of a CLIP's tensors mean: which units lie along them, and how to score and cut those units.

Names are open_clip.CLIP's. Every axis belongs to a group of units (hidden channels, heads of a layer, FFN channels of a
layer, ...); tensors that share a group must be cut alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = r"(?P<block>(?:visual\.)?transformer\.resblocks\.\d+)\."
_STAGE = r"visual\.(?P<stage>layer[1-4])\.(?P<index>\d+)\."
_RULES = {
    r".+\.num_batches_tracked": "",
    r"visual\.conv1\.weight": "hidden fixed fixed fixed",
    r"visual\.class_embedding|(visual\.ln_pre|visual\.ln_post|ln_final)\.\w+": "hidden",
    r"(visual\.)?positional_embedding": "positions hidden",
    r"token_embedding\.weight": "vocabulary hidden",
    r"visual\.proj|text_projection": "hidden embedding",
    _BLOCK + r"(ln_[12]\.\w+|ls_[12]\.gamma|(attn\.out|mlp\.c)_proj\.bias)": "hidden",
    _BLOCK + r"attn\.in_proj_weight": "{block}.heads hidden",
    _BLOCK + r"attn\.in_proj_bias": "{block}.heads",
    _BLOCK + r"attn\.out_proj\.weight": "hidden {block}.heads",
    _BLOCK + r"mlp\.c_fc\.weight": "{block}.mlp hidden",
    _BLOCK + r"mlp\.c_fc\.bias": "{block}.mlp",
    _BLOCK + r"mlp\.c_proj\.weight": "hidden {block}.mlp",
}
"""Pattern of a tensor's name -> the groups of its axes; `fixed` ones (colours, kernels) are never cut."""
_RESNET_RULES = _RULES | {
    r"visual\.conv1\.weight": "stem1 fixed fixed fixed",
    r"visual\.conv2\.weight": "stem2 stem1 fixed fixed",
    r"visual\.conv3\.weight": "stem3 stem2 fixed fixed",
    r"visual\.bn(?P<number>[123])\.\w+": "stem{number}",
    # The inner groups of a bottleneck are its own, the stage's stream is shared by all its blocks.
    _STAGE + r"conv1\.weight": "{stage}.{index}.conv1 {before} fixed fixed",
    _STAGE + r"conv2\.weight": "{stage}.{index}.conv2 {stage}.{index}.conv1 fixed fixed",
    _STAGE + r"conv3\.weight": "{stage} {stage}.{index}.conv2 fixed fixed",
    _STAGE + r"downsample\.0\.weight": "{stage} {before} fixed fixed",
    _STAGE + r"bn(?P<number>[12])\.\w+": "{stage}.{index}.conv{number}",
    _STAGE + r"(bn3|downsample\.1)\.\w+": "{stage}",
    r"visual\.attnpool\.positional_embedding": "positions layer4",
    r"visual\.attnpool\.[qkv]_proj\.weight": "attnpool.heads layer4",
    r"visual\.attnpool\.[qkv]_proj\.bias": "attnpool.heads",
    r"visual\.attnpool\.c_proj\.weight": "embedding attnpool.heads",
    r"visual\.attnpool\.c_proj\.bias": "embedding",
}
_BEFORE = {"layer1": "stem3", "layer2": "layer1", "layer3": "layer2", "layer4": "layer3"}


class Axis(NamedTuple):
    """One axis of a tensor: which group its units belong to, and how units lie along it."""

    group: str
    parts: int = 1
    """Equal consecutive parts that are cut alike (3 for fused q, k, v)."""
    unit: int = 1
    """Consecutive entries of one unit (the head width for heads)."""


def tensor_axes(name: str, head_width: int, *, resnet: bool) -> tuple[Axis, ...] | None:
    """The groups of the axes of tensor `name` (with the teacher's layer numbers); None if unknown."""
    for pattern, groups in (_RESNET_RULES if resnet else _RULES).items():
        match = re.fullmatch(pattern, name)
        if match:
            found = match.groupdict()
            stage = found.get("stage")
            before = _BEFORE[stage] if stage and found["index"] == "0" else stage
            parts = 3 if ".in_proj_" in name else 1
            return tuple(
                Axis(group, parts, head_width) if group.endswith("heads") else Axis(group)
                for group in groups.format(**found, before=before).split()
            )
    return None


def magnitude_scores(state: Mapping[str, Tensor], axes: Mapping[str, tuple[Axis, ...]]) -> dict[str, Tensor]:
    """Score of every unit u of every group: |W_u|^2 / mean_v |W_v|^2, summed over the weight matrices W that touch it.

    So every matrix counts alike whatever its scale. Vectors (biases, norms) and positional tables do not count.
    """
    scores: dict[str, Tensor] = {}
    for name, groups in axes.items():
        if state[name].ndim < 2 or name.endswith("positional_embedding"):
            continue
        squares = state[name].double().square()
        for dim, axis in enumerate(groups):
            if axis.group in ("fixed", "vocabulary", "embedding"):
                continue
            others = [other for other in range(squares.ndim) if other != dim]
            entries = squares.sum(dim=others).view(axis.parts, -1, axis.unit).sum(dim=(0, 2))
            if entries.sum() > 0:
                scores[axis.group] = scores.get(axis.group, 0) + entries / entries.mean()
    return scores


def cut_units(tensor: Tensor, axes: tuple[Axis, ...], units: Mapping[str, Tensor]) -> Tensor:
    """`tensor` at the chosen units along every axis."""
    for dim, axis in enumerate(axes):
        if axis.group != "fixed":
            part = torch.arange(axis.parts).view(-1, 1, 1) * (tensor.shape[dim] // axis.parts)
            index = part + units[axis.group].view(1, -1, 1) * axis.unit + torch.arange(axis.unit)
            tensor = tensor.index_select(dim, index.flatten().to(tensor.device))
    return tensor.detach().clone()
