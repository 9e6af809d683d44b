"""What a CLIP costs: parameters per tower, multiply-adds, latency."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TOKEN_TABLES = ("token_embedding.weight", "word_embeddings.weight", "shared.weight", "wte.weight")
"""Endings of the names of token tables: open_clip's own, and those of Hugging Face text towers."""
WARM_UP, REPEATS = 3, 10


class ParameterCount(NamedTuple):
    """Parameters of a CLIP by part."""

    vision: int
    text: int
    """Without the token table."""
    token_table: int
    other: int
    """Logit scale and bias."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)


def count_parameters(module: nn.Module) -> ParameterCount:
    """Parameters of a module whose image tower is `visual`, as in open_clip; shared tensors count once."""
    found: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        table, scale = name.endswith(TOKEN_TABLES), name in ("logit_scale", "logit_bias")
        rest = "token_table" if table else "other" if scale else "text"
        found["vision" if name.startswith("visual.") else rest] += parameter.numel()
    return ParameterCount(*(found[part] for part in ParameterCount._fields))


def macs_of(module: nn.Module, encode: Callable[[Tensor], Any], inputs: Tensor) -> int:
    """Multiply-adds of `encode(inputs)`, which runs `module`: matrix products and convolutions.

    Attention runs unfused while counting, because fused kernels hide their products from the counter.
    """
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


@torch.no_grad()
def latency_ms(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """Median milliseconds of `encode(inputs)` over 10 calls after 3 unmeasured ones."""
    wait = torch.cuda.synchronize if inputs.is_cuda else lambda device: None
    spent = []
    for _ in range(WARM_UP + REPEATS):
        wait(inputs.device)
        start = time.perf_counter()
        encode(inputs)
        wait(inputs.device)
        spent.append(time.perf_counter() - start)
    return 1000 * statistics.median_high(spent[WARM_UP:])
