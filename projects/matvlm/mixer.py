"""The Mamba-2 mixer in the shape of the attention that it replaces: docs/papers/matvlm.md, eq. 1-9.

It is called as transformers' decoder layers call their attention, and takes its place there. Letters: b batch, l
tokens, h heads, g key/value heads, p head width (and state width), w taps of the convolution.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers.cache_utils import Cache

from projects.matvlm.cache import mamba_layer
from projects.matvlm.ssd import CHUNK, Backend, ssd, ssd_step
from vlmkd.errors import UserError

log = logging.getLogger(__name__)
FLOAT32 = ("A_log", "dt_bias", "D")
"""Parameters that stay in float32 in a model of half precision: A in bfloat16 is off by 0.8 %."""


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Those of an attention: h heads on g key/value heads, p wide, in a model d wide."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    taps: int = 4
    bias: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")

    @property
    def inner(self) -> int:
        """h p: rows of z, and of C."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """g p: rows of x, and of B."""
        return self.kv_heads * self.head_dim

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of `in_proj` in their order: z, x, B, C, dt."""
        return self.inner, self.shared, self.shared, self.inner, self.heads


class GatedNorm(nn.Module):
    """eq. 9: `y SiLU(z)`, divided by its root mean square within each head, times a weight."""

    def __init__(self, shape: MixerShape, **factory: Any) -> None:
        super().__init__()
        self.heads, self.eps = shape.heads, 1e-5
        self.weight = nn.Parameter(torch.ones(shape.inner, **factory))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z [b, l, h p]; computed in float32."""
        exact = _exact(z)
        y = rearrange(y.to(exact) * F.silu(z.to(exact)), "b l (h p) -> b l h p", h=self.heads)
        y = rearrange(F.rms_norm(y, y.shape[-1:], eps=self.eps), "b l h p -> b l (h p)")
        return self.weight * y.to(z.dtype)


class Mamba2Mixer(nn.Module):
    """docs/papers/matvlm.md, eq. 8: projection, causal convolution, SSD scan, gated norm, projection."""

    def __init__(
        self, shape: MixerShape, layer_idx: int, chunk: int = CHUNK, backend: Backend = "auto", **factory: Any
    ) -> None:
        super().__init__()
        self.shape, self.layer_idx, self.chunk, self.backend = shape, layer_idx, chunk, backend
        channels = shape.inner + 2 * shape.shared
        exact = factory if factory.get("dtype") == torch.float64 else {**factory, "dtype": torch.float32}
        self.in_proj = nn.utils.skip_init(nn.Linear, shape.width, sum(shape.rows), shape.bias, **factory)
        self.conv1d = nn.utils.skip_init(
            nn.Conv1d, channels, channels, shape.taps, groups=channels, **factory
        )
        self.dt_bias = nn.Parameter(torch.zeros(shape.heads, **exact))
        self.A_log = nn.Parameter(torch.zeros(shape.heads, **exact))
        self.D = nn.Parameter(torch.ones(shape.heads, **exact))
        self.norm = GatedNorm(shape, **factory)
        self.out_proj = nn.utils.skip_init(nn.Linear, shape.inner, shape.width, shape.bias, **factory)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Random weights (docs/papers/matvlm.md#from-attention-to-mamba-2), drawn on the CPU: the same on every device."""

        def uniform(low: float, high: float, shape: torch.Size) -> Tensor:
            return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)

        shape = self.shape
        fans = ((self.in_proj, shape.width), (self.conv1d, shape.taps), (self.out_proj, shape.inner))
        for module, fan in fans:
            for parameter in module.parameters():
                parameter.copy_(uniform(-(fan**-0.5), fan**-0.5, parameter.shape))
        self.A_log.copy_(uniform(1, 16, self.A_log.shape).log())
        dt = uniform(math.log(1e-3), math.log(1e-1), self.dt_bias.shape).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt back
        self.D.fill_(1)
        self.norm.weight.fill_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mamba2Mixer:
        """`.to(bfloat16)` and the like leave what has to be float32 alone, but for its device."""
        before = {name: getattr(self, name).detach() for name in FLOAT32}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.bfloat16, torch.float16):
                now.data = old.to(now.device, torch.float32)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        token_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[b, l, d] -> [b, l, d], and none for attention's weights.

        `token_mask` [b, l] is false at padding, wherever it stands; outputs there mean nothing. `seq_idx` [b, l] names
        each token's document in packed rows. `attention_mask` is not read. With a cache the
        rows go on where they were, and leave there what comes after their last true token.
        """
        cache = past_key_values if cache is None else cache
        layer = None if cache is None else mamba_layer(cache, self.layer_idx)
        kept = None if layer is None else layer.read()
        sizes = (self.shape.inner, self.shape.inner + 2 * self.shape.shared, self.shape.heads)
        z, xBC, dt = self.in_proj(hidden_states).split(sizes, dim=-1)
        dt = F.softplus(dt.to(_exact(dt)) + self.dt_bias)
        if token_mask is not None:
            dt = dt * rearrange(token_mask, "b l -> b l 1")
        xBC, window = self._convolve(xBC, kept and kept[0], token_mask, seq_idx)
        x, B, C = (
            rearrange(t, "b l (g p) -> b l g p", p=self.shape.head_dim)
            for t in xBC.split(self.shape.rows[1:4], dim=-1)
        )
        parts = (x, dt, -torch.exp(self.A_log), B, C, self.D)
        if kept is not None and len(dt[0]) == 1 and not torch.is_grad_enabled():
            state = kept[1]
            y = rearrange(self._step(state, *parts), "b h p -> b 1 (h p)")
        else:
            y, state = self._scan(*parts, state=kept and kept[1], seq_idx=seq_idx)
            y = rearrange(y, "b l h p -> b l (h p)")
        if layer is not None:
            layer.write(window, state)
        return self.out_proj(self.norm(y, z)), None

    def _convolve(
        self, xBC: Tensor, window: Tensor | None, token_mask: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """eq. 8, SiLU of the convolution [b, l, channels]; and the last w - 1 inputs [b, w - 1, channels].

        Written as w products: no slower on a CPU than conv1d between two transpositions, and a tap that reaches
        another document is one comparison. Padding is skipped: a row's tokens are moved together first.
        """
        taps, length = self.shape.taps, xBC.shape[1]
        if window is None:
            window = xBC.new_zeros(len(xBC), taps - 1, xBC.shape[2])
        if token_mask is not None:
            token_mask = token_mask.bool()
            order = torch.argsort(~token_mask, dim=1, stable=True)
            xBC = _tokens(xBC, order)
            seq_idx = None if seq_idx is None else torch.take_along_dim(seq_idx, order, 1)
        inputs = torch.cat([window.to(xBC.dtype), xBC], 1)
        if seq_idx is not None:
            ids = torch.cat([repeat(seq_idx[:, 0], "b -> b w", w=taps - 1), seq_idx], 1)
        weight = rearrange(self.conv1d.weight, "channels 1 w -> w channels")
        out = self.conv1d.bias
        for tap in range(taps):
            reached = inputs[:, tap : tap + length]
            if seq_idx is not None and tap < taps - 1:
                reached = reached * rearrange(ids[:, tap : tap + length] == seq_idx, "b l -> b l 1")
            out = torch.addcmul(out, reached, weight[tap])
        if token_mask is None:
            return F.silu(out), inputs[:, length:]
        place = (token_mask.cumsum(1) - 1).clamp(min=0)
        last = rearrange(token_mask.sum(1), "b -> b 1") + torch.arange(taps - 1, device=xBC.device)
        return F.silu(_tokens(out, place)), _tokens(inputs, last)

    def _scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
        state: Tensor | None, seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kernel = _kernel("scan", self.backend, x.device.type)
        if kernel is None:
            return ssd(x, dt, A, B, C, D, state=state, seq_idx=seq_idx, chunk=self.chunk)
        x, B = (
            repeat(t, "b l g p -> b l (g r) p", r=self.shape.heads // self.shape.kv_heads) for t in (x, B)
        )
        return kernel(
            x, dt, A, B, C, self.chunk, D=D, initial_states=state,
            seq_idx=None if seq_idx is None else seq_idx.int(), return_final_states=True,
        )  # fmt: skip

    def _step(
        self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        """One token; `state` is changed in place."""
        x, dt, B, C = (t[:, 0] for t in (x, dt, B, C))
        kernel = _kernel("step", self.backend, x.device.type)
        if kernel is None:
            return ssd_step(state, x, dt, A, B, C, D)
        size = self.shape.head_dim
        x, B = (repeat(t, "b g p -> b (g r) p", r=self.shape.heads // self.shape.kv_heads) for t in (x, B))
        dt = repeat(dt, "b h -> b h p", p=size)
        A = repeat(A, "h -> h p n", p=size, n=size)
        # It reads dt_bias's strides.
        D, zero = (repeat(t, "h -> h p", p=size) for t in (D, torch.zeros_like(D)))
        return kernel(state, x, dt, A, B, C, D=D, dt_bias=zero)


def _tokens(x: Tensor, at: Tensor) -> Tensor:
    """x [b, l, c] at places [b, k] -> [b, k, c]; copies rows, where `take_along_dim` copies numbers."""
    rows = at + x.shape[1] * torch.arange(len(x), device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, at.shape)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@cache
def kernels() -> tuple[dict[str, Callable[..., Any]], str]:
    """mamba-ssm's Triton scan and one-step kernels; or none, and why."""
    error = ""
    for _ in range(2):  # its __init__ wants the Mamba-1 extension; without it modules come at the second try
        try:
            scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
            step = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
        except (ImportError, OSError) as refused:
            error = str(refused)
            if "selective_scan_cuda" not in error:
                break
        else:
            return {"scan": scan.mamba_chunk_scan_combined, "step": step.selective_state_update}, ""
    return {}, error


@torch.compiler.assume_constant_result
def _kernel(name: str, backend: Backend, device: str) -> Callable[..., Any] | None:
    """Which path runs on such a device; none: PyTorch's. A constant to torch.compile."""
    return _chosen(name, backend, device)


@cache
def _chosen(name: str, backend: Backend, device: str) -> Callable[..., Any] | None:
    """`_kernel`'s answer, said once in the log."""
    found, why = kernels() if backend != "torch" else ({}, "backend=torch")
    if backend == "mamba_ssm" and (not found or device != "cuda"):
        raise UserError(
            f"backend=mamba_ssm: {why or f'its kernels run on a GPU, these tensors are on {device}'}"
        )
    if found and device == "cuda":
        log.info("Mamba-2 %s on %s: mamba-ssm's kernel", name, device)
        return found[name]
    log.info("Mamba-2 %s on %s: PyTorch (%s)", name, device, why or "mamba-ssm's kernels run on a GPU")
    return None
