"""What the axes of a CLIP's tensors mean: which units lie along them, and how to score and cut those units.

Names are open_clip.CLIP's. Every axis belongs to a group of units; tensors that share a group must be cut alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

STACKS = re.compile(
    r"(?P<stack>(?:visual\.)?transformer\.resblocks|visual\.layer[1-4])\.(?P<index>\d+)\.(?P<rest>.+)"
)


class Axis(NamedTuple):
    """One axis of a tensor: which group its units belong to, and how units lie along it."""

    group: str
    parts: int = 1
    """Equal consecutive parts that are cut alike (3 for fused q, k, v)."""
    unit: int = 1
    """Consecutive entries of one unit (the head width for heads)."""


def tensor_axes(name: str, head_width: int, *, resnet: bool) -> tuple[Axis, ...] | None:
    """The groups of the axes of tensor `name` (open_clip.CLIP naming, teacher's layer numbers); None if unknown.

    `fixed` axes (colours, kernels) are never cut.
    """
    if name.endswith("num_batches_tracked"):
        return ()
    match = STACKS.fullmatch(name)
    if match and ".layer" in match["stack"]:
        return _bottleneck_axes(match["stack"], int(match["index"]), match["rest"])
    if match:
        return _block_axes(f"{match['stack']}.{match['index']}.", match["rest"], head_width)
    if name.startswith("visual.attnpool."):
        return _pool_axes(name.removeprefix("visual.attnpool."), head_width)
    hidden, embedding, fixed = Axis("hidden"), Axis("embedding"), Axis("fixed")
    stem = re.fullmatch(r"visual\.(conv|bn)([123])\.(.+)", name)
    if stem and resnet:
        return _stem_axes(stem[1], int(stem[2]))
    return {
        "visual.conv1.weight": (hidden, fixed, fixed, fixed),
        "visual.class_embedding": (hidden,),
        "visual.positional_embedding": (Axis("positions"), hidden),
        "visual.proj": (hidden, embedding),
        "token_embedding.weight": (Axis("vocabulary"), hidden),
        "positional_embedding": (Axis("positions"), hidden),
        "text_projection": (hidden, embedding),
        **{
            f"visual.{norm}.{leaf}": (hidden,)
            for norm in ("ln_pre", "ln_post")
            for leaf in ("weight", "bias")
        },
        **{f"ln_final.{leaf}": (hidden,) for leaf in ("weight", "bias")},
    }.get(name)


def _block_axes(block: str, rest: str, head_width: int) -> tuple[Axis, ...] | None:
    """A transformer block's tensor: q, k and v keep whole heads each."""
    hidden, channels = Axis("hidden"), Axis(f"{block}mlp")
    heads = Axis(f"{block}heads", 1, head_width)
    qkv = heads._replace(parts=3)
    return {
        "attn.in_proj_weight": (qkv, hidden),
        "attn.in_proj_bias": (qkv,),
        "attn.out_proj.weight": (hidden, heads),
        "attn.out_proj.bias": (hidden,),
        "mlp.c_fc.weight": (channels, hidden),
        "mlp.c_fc.bias": (channels,),
        "mlp.c_proj.weight": (hidden, channels),
        "mlp.c_proj.bias": (hidden,),
        **{f"{norm}.{leaf}": (hidden,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")},
        **{f"{scale}.gamma": (hidden,) for scale in ("ls_1", "ls_2")},
    }.get(rest)


def _stem_axes(kind: str, number: int) -> tuple[Axis, ...]:
    """The three convolutions before a ResNet's stages."""
    out, fixed = Axis(f"stem{number}"), Axis("fixed")
    return (out,) if kind == "bn" else (out, Axis(f"stem{number - 1}") if number > 1 else fixed, fixed, fixed)


def _bottleneck_axes(stack: str, block: int, rest: str) -> tuple[Axis, ...] | None:
    """A ResNet bottleneck: two inner groups of its own, and the stage's stream shared by all its blocks."""
    stage = stack.removeprefix("visual.")
    number = int(stage[-1])
    stream, fixed = Axis(stage), Axis("fixed")
    before = stream if block else Axis(f"layer{number - 1}" if number > 1 else "stem3")
    first, second = Axis(f"{stage}.{block}.conv1"), Axis(f"{stage}.{block}.conv2")
    out = {"1": first, "2": second, "3": stream}
    norm = re.fullmatch(r"(?:bn([123])|downsample\.1)\..+", rest)
    if norm:
        return (out[norm[1] or "3"],)
    return {
        "conv1.weight": (first, before, fixed, fixed),
        "conv2.weight": (second, first, fixed, fixed),
        "conv3.weight": (stream, second, fixed, fixed),
        "downsample.0.weight": (stream, before, fixed, fixed),
    }.get(rest)


def _pool_axes(rest: str, head_width: int) -> tuple[Axis, ...] | None:
    """A ResNet's attention pool, whose q, k and v are matrices of their own."""
    stream, heads, embedding = Axis("layer4"), Axis("attnpool.heads", 1, head_width), Axis("embedding")
    if rest == "positional_embedding":
        return (Axis("positions"), stream)
    into, outof = (embedding, heads) if rest.startswith("c_proj") else (heads, stream)
    return {"weight": (into, outof), "bias": (into,)}.get(rest.partition(".")[2])


def magnitude_scores(state: Mapping[str, Tensor], axes: Mapping[str, tuple[Axis, ...]]) -> dict[str, Tensor]:
    """Score of every unit of every group: its share of each weight matrix's squared norm, summed over the matrices.

    A matrix of n units gives them n points altogether. Vectors (biases, norms) and positional tables do not count.
    """
    scores: dict[str, Tensor] = {}
    for name, groups in axes.items():
        if state[name].ndim < 2 or name.endswith("positional_embedding"):
            continue
        squares = state[name].double().square()
        for dim, axis in enumerate(groups):
            if axis.group in ("fixed", "vocabulary", "embedding", "positions"):
                continue
            others = [other for other in range(squares.ndim) if other != dim]
            entries = squares.sum(dim=others).view(axis.parts, -1, axis.unit).sum(dim=(0, 2))
            if entries.sum() > 0:
                scores[axis.group] = scores.get(axis.group, 0) + entries / entries.mean()
    return scores


def cut_units(tensor: Tensor, axes: tuple[Axis, ...], units: Mapping[str, Tensor]) -> Tensor:
    """`tensor` at the chosen units along every axis."""
    for dim, axis in enumerate(axes):
        if axis.group == "fixed":
            continue
        chosen = units[axis.group].view(1, -1, 1)
        per_part = tensor.shape[dim] // axis.parts
        index = (
            torch.arange(axis.parts).view(-1, 1, 1) * per_part + chosen * axis.unit + torch.arange(axis.unit)
        )
        tensor = tensor.index_select(dim, index.flatten().to(tensor.device))
    return tensor.detach().clone()
