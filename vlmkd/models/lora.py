"""Low-rank updates of a decoder's linear layers (Hu et al. 2022, arXiv:2106.09685): W + B A, with A [r, in], B [out, r]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank update, zero at first; the paper's scale alpha / r is 1."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_A), self.lora_B)


def add_lora(body: nn.Module, rank: int) -> None:
    """Give every linear layer inside `body` an update of `rank`, drawn from torch's random state."""
    for parent in list(body.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, LoraLinear(layer, rank))


@torch.no_grad()
def merge_lora(body: nn.Module) -> list[str]:
    """Make plain linear layers of those with updates; returns the names of the weights that the updates went into."""
    merged = []
    for prefix, parent in list(body.named_modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoraLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                delta = (layer.lora_B.float() @ layer.lora_A.float()).to(layer.weight)
                plain.weight = nn.Parameter(layer.weight + delta, requires_grad=layer.weight.requires_grad)
                plain.bias = layer.bias
                setattr(parent, name, plain)
                merged.append(".".join(filter(None, (prefix, name, "weight"))))
    return merged
