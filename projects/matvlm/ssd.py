"""The scan of Mamba-2 (state-space duality, SSD) in plain PyTorch: docs/papers/matvlm.md, eq. 1-7.

Letters: b batch, l tokens, h heads, g groups of r = h / g heads, p head width, n state width, c chunks of q tokens.
Head i reads group i // r. The keys B always come by group; x and C by group or by head, so that both layouts are
served without a repeated tensor: Mamba-2's (x by head, B and C by group) and the one that grouped-query attention
leaves behind (x and B by group, C by head).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, einsum
from torch.autograd.function import once_differentiable

Backend = Literal["auto", "torch", "mamba_ssm"]
"""Whose scan: mamba-ssm's kernels where they run, else this one; or one of the two."""
CHUNK = 64
"""Tokens a chunk. The result does not depend on it; on a CPU 64 was the fastest of 32 to 256 (benchmarks/ssd.py)."""
_BLOCK = {"cpu": 2**19}
"""Elements of the [q, q] tables of chunks computed together: what stays in a core's cache."""
_BLOCK_ELSEWHERE = 2**26


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`y_t = S_t C_t + D x_t` with `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T` (eq. 1), and the last `S`.

    x [b, l, g or h, p], dt [b, l, h] (after softplus; 0 at padding: neither decay nor input, exactly), A [h] (negative),
    B [b, l, g, n], C [b, l, g or h, n], D [h], state [b, h, p, n] (none: zeros). y has the type of x; everything is
    computed in float32 (float64 for float64), and the state comes back so, whatever autocast says.

    `seq_idx` [b, l] names each token's document, equal numbers side by side: a document starts from zeros, the first
    one from `state`, and the last one's state is returned.
    """
    if x.shape[2] not in (B.shape[2], dt.shape[2]) or C.shape[2] not in (B.shape[2], dt.shape[2]):
        raise ValueError(
            f"{x.shape[2]} heads of x and {C.shape[2]} of C; {B.shape[2]} groups, {dt.shape[2]} heads"
        )
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads = dt.shape
    with torch.autocast(x.device.type, enabled=False):
        if state is None:
            state = x.new_zeros(batch, heads, x.shape[3], B.shape[3], dtype=exact)
        state = rearrange(state.to(exact), "b (g r) p n -> b g r p n", g=B.shape[2])
        at_once = _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // (batch * heads * chunk**2) or 1
        before = None if seq_idx is None else seq_idx[:, 0]
        outputs = []
        start = 0
        while start < length:
            # What is left at the end is one short chunk.
            chunks = min(at_once, (length - start) // chunk) or 1
            end = min(start + chunks * chunk, length)
            part = [t[:, start:end].to(exact) for t in (x, dt, B, C)]
            ids = None if seq_idx is None else seq_idx[:, start:end]
            y, state = _block(*part, A.to(exact), D, state, ids, before, chunks)
            outputs.append(y.to(x.dtype))
            before = None if ids is None else ids[:, -1]
            start = end
        return torch.cat(outputs, 1), rearrange(state, "b g r p n -> b (g r) p n")


def _block(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None,
    state: Tensor, ids: Tensor | None, before: Tensor | None, chunks: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of `chunks` chunks of equal length, and the state behind them; `before` is the state's document."""
    groups = B.shape[2]
    by_group = "b (c q) (g r) n -> b c g r q n"
    x, B, C = (rearrange(t, by_group, c=chunks, g=groups).contiguous() for t in (x, B, C))
    dt = rearrange(dt, "b (c q) (g r) -> b c g r q", c=chunks, g=groups)
    # Differences of float64 sums are as exact in float32 as masked cumulative sums of [q, q] tables (4e-8 in the
    # exponentials; differences of float32 sums: 3e-6) at a third of their time. Apple's GPUs have no float64.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    sums = (dt * rearrange(A, "(g r) -> g r 1", g=groups)).to(wide).cumsum(-1)
    decay, left = sums.to(x.dtype).exp(), (sums[..., -1:] - sums).to(x.dtype).exp()
    keep = decay[..., -1]
    hidden = torch.ones(2 * dt.shape[-1:], dtype=torch.bool, device=x.device).triu(1)
    if ids is not None and before is not None:
        ids = rearrange(ids, "b (c q) -> b c 1 1 q", c=chunks)
        last = ids[..., -1:]
        before = torch.cat([rearrange(before, "b -> b 1 1 1 1"), last[:, :-1]], 1)
        hidden = hidden | (rearrange(ids, "... q -> ... q 1") != rearrange(ids, "... s -> ... 1 s"))
        decay, left, keep = decay * (ids == before), left * (ids == last), keep * (last == before)[..., 0]

    # eq. 4: within a chunk. D stands on the diagonal, which saves a pass over x.
    scores = einsum("bcgrqn,bcgrsn->bcgrqs", C, B)
    skip = (
        x.new_zeros(groups, dt.shape[3]) if D is None else rearrange(D.to(x.dtype), "(g r) -> g r", g=groups)
    )
    y = einsum("bcgrqs,bcgrsp->bcgrqp", _Table.apply(scores, sums, dt, skip, hidden), x)

    # eq. 5 and 6: what each chunk adds to the state, and the state before each chunk.
    added = einsum("bcgrqp,bcgrqn->bcgrpn", x * rearrange(left * dt, "b c g r q -> b c g r q 1"), B)
    states = []
    for kept, new in zip(rearrange(keep, "b c g r -> c b g r 1 1"), added.unbind(1), strict=True):
        states.append(state)
        state = torch.addcmul(new, kept, state)

    # eq. 7: the past, decayed to each token.
    past = C * rearrange(decay, "b c g r q -> b c g r q 1")
    y, past, before_chunk = (
        rearrange(t, "b c g r q n -> (b c g r) q n") for t in (y, past, torch.stack(states, 1))
    )
    y = torch.baddbmm(y, past, before_chunk.mT)
    y = rearrange(y, "(b c g r) q p -> b (c q) (g r) p", c=chunks, g=groups, r=dt.shape[3])
    return y, state


class _Table(torch.autograd.Function):
    """What token s gives to token q of its chunk (eq. 4): `scores exp(sums_q - sums_s) dt_s`, plus D on the diagonal.

    Exponentials of sums of dt A <= 0 alone: the rest is masked before the exponential (exp-then-mask has NaN gradients
    as soon as a masked sum exceeds 88). Its own backward pass, since autograd's takes twice as many over the tables.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sums: Tensor, dt: Tensor, skip: Tensor, hidden: Tensor) -> Tensor:
        between = rearrange(sums, "... q -> ... q 1") - rearrange(sums, "... s -> ... 1 s")
        between = between.to(dt.dtype).masked_fill_(hidden, -math.inf).exp_()
        dt = rearrange(dt, "... s -> ... 1 s")
        kept = any(ctx.needs_input_grad)
        table = between * scores if kept or scores.shape != between.shape else scores.mul_(between)
        table.mul_(dt).diagonal(dim1=-2, dim2=-1).add_(rearrange(skip, "g r -> g r 1"))
        if kept:
            ctx.save_for_backward(scores, between, dt)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, between, dt = ctx.saved_tensors
        skip = grad.diagonal(dim1=-2, dim2=-1).sum((0, 1, 4))
        grad = grad * between
        through = grad * scores
        of_dt = through.sum(-2)
        of_sums = (through @ dt.mT)[..., 0] - of_dt * dt[..., 0, :]
        return grad.mul_(dt).sum_to_size(scores.shape), of_sums, of_dt, skip, None


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """One token of eq. 1 for decoding; `state` [b, h, p, n] is changed in place, at a fixed address, without gradients.

    x [b, g or h, p], dt [b, h], B [b, g, n], C [b, g or h, n], D [h] -> y [b, h, p] in the type of x.
    """
    groups = B.shape[1]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        grouped = rearrange(state, "b (g r) p n -> b g r p n", g=groups)
        wide, B, C = (rearrange(t.to(state.dtype), "b (g r) n -> b g r n", g=groups) for t in (x, B, C))
        dt = rearrange(dt.to(state.dtype), "b (g r) -> b g r 1", g=groups)
        decay = (dt * rearrange(A.to(state.dtype), "(g r) -> g r 1", g=groups)).exp()
        grouped.mul_(rearrange(decay, "b g r 1 -> b g r 1 1"))
        grouped.addcmul_(rearrange(dt * wide, "b g r p -> b g r p 1"), rearrange(B, "b g r n -> b g r 1 n"))
        y = einsum("bgrpn,bgrn->bgrp", grouped, C.expand(*dt.shape[:3], -1))
        if D is not None:
            y = y + wide * rearrange(D.to(state.dtype), "(g r) -> g r 1", g=groups)
        return rearrange(y, "b g r p -> b (g r) p").to(x.dtype)
