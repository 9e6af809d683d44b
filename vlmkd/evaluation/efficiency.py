"""What a model costs: multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def macs_of(module: nn.Module, encode: Callable[[Tensor], Any], inputs: Tensor) -> int:
    """Multiply-adds of `encode(inputs)`, which runs `module`, with attention unfused: the counter sees no fused products."""
    was_training, fast_path = module.training, torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        module.train(was_training)
    return int(counter.get_total_flops()) // 2
