"""What a model costs: multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlmkd.models.towers import evaluating


@torch.no_grad()
def macs_of(module: nn.Module, encode: Callable[[Tensor], Any], inputs: Tensor) -> int:
    """Multiply-adds of `encode(inputs)`, which runs `module`, with attention unfused: the counter sees no fused products."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(module), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops()) // 2
