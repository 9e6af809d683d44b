"""Towers in half precision, with gradients that fp16 can hold.

Letters: B rows, D embedding width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Matrix products inside compute in `dtype`; None: as the weights are."""
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def encode(tower: nn.Module, inputs: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tower(inputs)` computed in `dtype` (None: as the weights are): [B,D], fp32 (float64 stays).

    fp16 has nothing below 6e-8, where gradients on their way back through a tower would vanish. So every backward pass
    multiplies the gradient that enters the tower by the power of two that brings its largest entry to 1, and divides the
    gradients of the trained parameters by it. A gradient scaler does the same for the whole loss, but its factor is a state
    that DeepSpeed's checkpoints leave out, and it finds the factor by skipping steps.
    """
    with autocast(inputs.device, dtype):
        if dtype is not torch.float16 or not torch.is_grad_enabled():
            return exact(tower(inputs))
        factor: list[Tensor] = []
        trained = {
            name: _Divided.apply(parameter, factor)
            for name, parameter in tower.named_parameters()
            if parameter.requires_grad
        }
        return _Multiplied.apply(exact(functional_call(tower, trained, (inputs,))), factor)


class _Multiplied(torch.autograd.Function):
    """The same values; their gradient is multiplied by a power of two, which is put into `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: list[Tensor]) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
        ctx.factor[:] = [torch.exp2(-torch.log2(largest).floor())]
        return gradient * ctx.factor[0], None


class _Divided(torch.autograd.Function):
    """The same values; their gradient is divided by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: list[Tensor]) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.factor[0], None


def exact(x: Tensor) -> Tensor:
    """fp32, whatever the towers computed in; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
