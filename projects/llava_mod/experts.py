"""Sparse feed-forward layers: a router, experts that are copies of the dense layer at first, and what balances them.

S tokens of a micro-batch, E experts, K of them for each token, D width, I width inside an expert.
See docs/papers/llava_mod.md#architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vlmkd.config import require
from vlmkd.errors import UserError
from vlmkd.train.engine import all_experts, spread_experts

SecondExpert = Literal["argmax", "gumbel"]
AuxCounts = Literal["first", "all"]


class Routing(NamedTuple):
    """Which experts each token goes to; a weight of 0 is a token that an expert had no room for."""

    experts: Tensor
    """int64 [S, K], the likeliest first."""
    weights: Tensor
    """float32 [S, K], which sum to 1 over the kept ones."""
    probs: Tensor
    """float32 [S, E]: softmax over all experts, before the choice."""


def route(
    logits: Tensor,
    top_k: int,
    *,
    valid: Tensor | None = None,
    capacity: float = 0.0,
    noise: Tensor | None = None,
) -> Routing:
    """Choose `top_k` experts by float32 router `logits` [S, E] (docs/papers/llava_mod.md, eq. 1).

    Args:
        valid: bool [S]; other tokens take no room.
        capacity: an expert takes at most ceil(S / E * K * capacity) tokens, first choices before second ones, each in the
            order of the tokens; 0: all.
        noise: [S, E], added to the logits before the second and further choices (Gumbel's, as DeepSpeed does).
    """
    probs = logits.softmax(dim=-1)
    if noise is None:
        experts = logits.topk(top_k, dim=-1).indices
    else:
        first = logits.argmax(dim=-1, keepdim=True)
        rest = (logits + noise).scatter(-1, first, -math.inf).topk(top_k - 1, dim=-1).indices
        experts = torch.cat([first, rest], dim=-1)
    weights = probs.gather(-1, experts)
    if capacity:
        count = len(logits) if valid is None else int(valid.sum())
        room = math.ceil(count / logits.shape[1] * top_k * capacity)
        weights = weights * _kept(experts, logits.shape[1], room, valid)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
    return Routing(experts, weights, probs)


def _kept(experts: Tensor, count: int, room: int, valid: Tensor | None) -> Tensor:
    """bool [S, K]: the choices that an expert has room for."""
    chosen = F.one_hot(experts, count)
    if valid is not None:
        chosen = chosen * valid[:, None, None]
    in_turn = rearrange(chosen, "s k e -> (k s) e")
    place = (in_turn.cumsum(dim=0) - 1).gather(1, rearrange(experts, "s k -> (k s) 1"))
    return rearrange(place < room, "(k s) 1 -> s k", s=len(experts))


def balance_loss(routing: Routing, valid: Tensor | None = None, counts: AuxCounts = "first") -> Tensor:
    """E * sum_e f_e P_e over the valid tokens: 1 (K with `counts` all) where all experts are alike.

    f_e: share of tokens whose first choice, or any, is e; P_e: mean probability (docs/papers/llava_mod.md, eq. 2).
    """
    experts, probs = routing.experts, routing.probs
    if valid is not None:
        experts, probs = experts[valid], probs[valid]
    count = probs.shape[-1]
    chosen = F.one_hot(experts if counts == "all" else experts[:, :1], count).sum(dim=1)
    return count * (chosen.float().mean(dim=0) * probs.mean(dim=0)).sum()


class Experts(nn.Module):
    """E gated feed-forward networks in the layout of transformers: gate rows before up rows."""

    def __init__(self, count: int, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, dim))
        self.down_proj = nn.Parameter(torch.empty(count, dim, inner))

    def forward(self, x: Tensor, routing: Routing, act: Any) -> Tensor:
        """x [S, D] -> [S, D]: the weighted sum over each token's experts. Tokens are sorted by expert, none is padded."""
        count = len(self.gate_up_proj)
        top_k = routing.experts.shape[1]
        order = routing.experts.flatten().argsort(stable=True)
        token = order // top_k
        sizes = torch.bincount(routing.experts.flatten(), minlength=count)
        inside = grouped(x[token], self.gate_up_proj, sizes)
        gate, up = inside.chunk(2, dim=-1)
        out = grouped(act(gate) * up, self.down_proj, sizes)
        weights = routing.weights.flatten()[order].to(out.dtype)
        return torch.zeros_like(x).index_add(0, token, out * weights[:, None])


class Expert(nn.Module):
    """One of `Experts`, for a rank that has not all of them."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, act: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_proj.detach(), gate_up_proj.requires_grad)
        self.down_proj = nn.Parameter(down_proj.detach(), down_proj.requires_grad)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return F.linear(self.act(gate) * up, self.down_proj)


def grouped(x: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """Rows of `x` [n, D], the first sizes[0] of them by weights[0] [O, D], and so on: [n, O].

    torch's grouped matrix product where it takes the tensors; else a loop over the groups, which gives the same.
    """
    fits = all(width * x.element_size() % 16 == 0 for width in weights.shape[1:])
    fits = fits and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if hasattr(F, "grouped_mm") and fits and len(x):
        offsets = sizes.cumsum(0).to(torch.int32)
        product: Tensor = _Contiguous.apply(F.grouped_mm(x, weights.transpose(1, 2), offs=offsets))
        return product
    parts = x.split(sizes.tolist())
    return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])


class _Contiguous(torch.autograd.Function):
    """Identity; the grouped product's backward pass takes no gradient that is an expanded scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class Router(nn.Linear):
    """Logits [S, E] in float32; a call of its own, around which ZeRO 3 gathers the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class SparseFfn(nn.Module):
    """Takes the place of a decoder layer's gated feed-forward network."""

    def __init__(
        self,
        experts: int,
        dim: int,
        inner: int,
        act: nn.Module,
        *,
        top_k: int = 2,
        second: SecondExpert = "argmax",
        capacity: float = 0.0,
    ) -> None:
        """`second` gumbel and `capacity` act in training only; evaluation is deterministic and drops nothing."""
        super().__init__()
        self.gate = Router(dim, experts, bias=False)
        self.experts: nn.Module = Experts(experts, dim, inner)
        self.act, self.top_k, self.second, self.capacity = act, top_k, second, capacity
        self.valid: Tensor | None = None
        """Of the batch at hand; counts in training alone."""
        self.routing: Routing | None = None
        """Of the last forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        flat = rearrange(x, "b t d -> (b t) d")
        logits = self.gate(flat)
        noise = None
        if self.training and self.second == "gumbel":
            noise = -torch.empty_like(logits).exponential_().log()
        capacity = self.capacity if self.training else 0.0
        valid = self.valid if capacity else None
        self.routing = route(logits, self.top_k, valid=valid, capacity=capacity, noise=noise)
        if isinstance(self.experts, Experts):
            return self.experts(flat, self.routing, self.act).view_as(x)
        return self.experts(flat, (self.routing.experts, self.routing.weights))[0].view_as(x)

    def spread(self, ranks: int) -> None:
        """Leave each of `ranks` ranks its share of the experts; DeepSpeed-MoE sends the tokens to them."""
        whole = self.experts
        parts = zip(whole.gate_up_proj, whole.down_proj, strict=True)
        dim = whole.down_proj.shape[1]
        self.experts = spread_experts([Expert(*part, self.act) for part in parts], ranks, dim)

    @contextmanager
    def whole_experts(self) -> Iterator[None]:
        """Inside, all experts are on this rank, and a call is its own business; a collective."""
        spread = self.experts
        if not isinstance(spread, Experts):
            self.experts = Experts(0, 0, 0)
            for name, value in all_experts(spread).items():
                setattr(self.experts, name, nn.Parameter(value, requires_grad=False))
        try:
            yield
        finally:
            self.experts = spread


def sparse_layers(model: nn.Module) -> list[SparseFfn]:
    """The sparse feed-forward layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, SparseFfn)]


def mark_valid(model: nn.Module, valid: Tensor) -> None:
    """From now on positions of `valid` [B, T] that are False take no expert's room, also where a layer is recomputed."""
    for layer in sparse_layers(model):
        layer.valid = valid.flatten()


def balance(model: nn.Module, valid: Tensor, counts: AuxCounts = "first") -> Tensor:
    """Sum of the balance losses of all sparse layers in their last forward pass; a scalar in float32."""
    routings = [layer.routing for layer in sparse_layers(model) if layer.routing is not None]
    losses = [balance_loss(routing, valid.flatten(), counts) for routing in routings]
    return torch.stack(losses).sum() if losses else torch.zeros((), device=valid.device)


def moe_layers(mode: str, count: int, chosen: Sequence[int] = ()) -> list[int]:
    """Layers of a decoder of `count` that become sparse: `sparse` (even ones), `dense` (all), halves, or a list."""
    named = {
        "sparse": range(0, count, 2),
        "dense": range(count),
        "first_half": range(count // 2),
        "second_half": range(count // 2, count),
        "list": chosen,
    }
    layers = list(named[mode])
    require(
        all(0 <= layer < count for layer in layers) and len(set(layers)) == len(layers) > 0,
        "moe.layers",
        f"is {layers}; the decoder has layers 0 to {count - 1}",
    )
    return layers


@torch.no_grad()
def upcycle(decoder: nn.Module, layers: Sequence[int], experts: int = 4, **options: Any) -> None:
    """Make the feed-forward networks of these layers sparse; every expert is a copy, so the outputs stay what they were.

    The router is drawn from torch's random state as any Linear layer. `options` go to `SparseFfn`.
    """
    for index in layers:
        layer: Any = decoder.model.layers[index]  # type: ignore[union-attr, index]
        dense = layer.mlp
        if not all(hasattr(dense, name) for name in ("gate_proj", "up_proj", "down_proj")):
            raise UserError(
                f"{type(dense).__name__} of layer {index} is no gated feed-forward network; up-cycling takes decoders of the "
                "Llama and Qwen2 type"
            )
        inner, dim = dense.gate_proj.weight.shape
        sparse = SparseFfn(experts, dim, inner, dense.act_fn, **options)
        gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        sparse.experts.gate_up_proj.copy_(repeat(gate_up, "o d -> e o d", e=experts))
        sparse.experts.down_proj.copy_(repeat(dense.down_proj.weight, "d i -> e d i", e=experts))
        layer.mlp = sparse.to(dense.gate_proj.weight)
