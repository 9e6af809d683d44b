"""Settings of a hybrid: which layers become Mamba-2, and what their mixers start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlmkd.config import Positive

Backend = Literal["auto", "torch", "mamba_ssm"]
Preset = Literal["", "12.5", "25", "50"]


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """How attention becomes Mamba-2 (docs/papers/matvlm.md#from-attention-to-mamba-2)."""

    preset: Preset = ""
    """The paper's share of replaced layers in per cent; for 32 layers its exact lists, for others the same rule."""
    layers: list[int] = field(default_factory=list)
    """The replaced layers themselves, in place of a preset."""
    start: Literal["attention", "random"] = "attention"
    """Projections from the attention that is replaced (paper), or random ones, for comparison."""
    bias: Literal["never", "auto"] = "never"
    """auto: the projections have biases where the attention has them, copied; never (paper): those are dropped."""
    conv_start: Literal["random", "identity"] = "random"
    """random (paper), or the convolution lets each token pass unchanged at the start."""
    fold_scale: bool = False
    """Multiply the queries' rows by head width^-0.5, attention's scale, which the paper leaves out."""
    chunk: Positive = 64
    """Tokens a chunk of the scan; no result depends on it. mamba-ssm's kernels are fastest with 256."""
    backend: Backend = "auto"
    """auto: mamba-ssm's kernels where they import and the tensors are on a GPU, else PyTorch."""
