"""Towers in half precision, with gradients that fp16 can hold.

Letters: B rows, D embedding width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlmkd.losses.precision import wide


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Matrix products compute in `dtype`; None: as the weights are."""
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def encode(tower: nn.Module, inputs: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tower(inputs)` computed in `dtype` (None: as the weights are): [B,D], fp32 (float64 stays).

    fp16 has nothing below 6e-8, where gradients on their way back through a tower would vanish. So every backward pass
    multiplies the gradient that enters the tower by the power of two that brings its largest entry to 1, and divides the
    gradients of the trained parameters by it. A gradient scaler finds its factor by skipping steps, and keeps a state that
    DeepSpeed's checkpoints leave out.
    """
    with autocast(inputs.device, dtype):
        if dtype is not torch.float16 or not torch.is_grad_enabled():
            return wide(tower(inputs))
        trained = {name: x.view_as(x) for name, x in tower.named_parameters() if x.requires_grad}
        output = wide(functional_call(tower, trained, (inputs,)))
        factor = torch.ones((), device=output.device)

        def enlarge(gradient: Tensor) -> Tensor:
            largest = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
            factor.copy_(torch.exp2(-torch.log2(largest).floor()))
            return gradient * factor

        if output.requires_grad:
            output.register_hook(enlarge)
        for parameter in trained.values():
            parameter.register_hook(lambda gradient: gradient / factor)
        return output
