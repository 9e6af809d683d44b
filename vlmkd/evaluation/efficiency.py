"""What a CLIP costs: parameters per tower, multiply-adds, latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TOKEN_TABLES = ("token_embedding.weight", "word_embeddings.weight", "shared.weight", "wte.weight")
"""Endings of the names of token tables: open_clip's own, and those of Hugging Face text towers."""
WARM_UP, REPEATS = 3, 10


@dataclass(frozen=True)
class ParameterCount:
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
        return self.vision + self.text + self.token_table + self.other


def count_parameters(module: nn.Module) -> ParameterCount:
    """Parameters of a module whose image tower is `visual`, as in open_clip; shared tensors count once."""
    vision = text = table = other = 0
    for name, parameter in module.named_parameters():
        if name.startswith("visual."):
            vision += parameter.numel()
        elif name.endswith(TOKEN_TABLES):
            table += parameter.numel()
        elif name in ("logit_scale", "logit_bias"):
            other += parameter.numel()
        else:
            text += parameter.numel()
    return ParameterCount(vision, text, table, other)


def count_macs(module: nn.Module, images: Tensor, tokens: Tensor) -> tuple[int, int]:
    """Multiply-adds of `encode_image(images)` and of `encode_text(tokens)`."""
    towers: Any = module
    return macs_of(module, towers.encode_image, images), macs_of(module, towers.encode_text, tokens)


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


def latency_ms(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """Median milliseconds of `encode(inputs)` over 10 calls after 3 unmeasured ones."""
    spent = []
    with torch.no_grad():
        for _ in range(WARM_UP + REPEATS):
            _synchronise(inputs)
            start = time.perf_counter()
            encode(inputs)
            _synchronise(inputs)
            spent.append(time.perf_counter() - start)
    return 1000 * sorted(spent[WARM_UP:])[REPEATS // 2]


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
