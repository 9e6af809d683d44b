"""SECOND's two-dimensional backbone and its pyramid (Yan et al. 2018), as in BEVFusion."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn

from projects.calico.model_config import SecondConfig
from projects.calico.networks.parts import BN_EPS, conv_block


class SecondWithFpn(nn.Module):
    """Stages of 3x3 convolutions, whose maps are brought to one size and concatenated: [B, C, X, Y].

    The first convolution of a stage has its stride, `layers` more follow; a map becomes `ups` times as large (0.5 halves).
    `stride` is the size of the input's map over that of the output's.
    """

    def __init__(self, inputs: int, cfg: SecondConfig) -> None:
        super().__init__()
        sizes = {total / up for total, up in zip(accumulate(cfg.strides, mul), cfg.ups, strict=True)}
        stride = sizes.pop()
        if sizes or not stride.is_integer():
            raise ValueError(f"strides {cfg.strides} and ups {cfg.ups} give maps of different sizes")
        self.stride, self.out_channels = round(stride), sum(cfg.fpn_widths)
        stages, levels = nn.ModuleList(), nn.ModuleList()
        for count, width, step in zip(cfg.layers, cfg.widths, cfg.strides, strict=True):
            first = conv_block(inputs, width, stride=step, eps=BN_EPS)
            stages.append(nn.Sequential(first, *(conv_block(width, width, eps=BN_EPS) for _ in range(count))))
            inputs = width
        for inputs, width, up in zip(cfg.widths, cfg.fpn_widths, cfg.ups, strict=True):
            scale, layer = round(max(up, 1 / up)), nn.ConvTranspose2d if up >= 1 else nn.Conv2d
            conv = layer(inputs, width, scale, stride=scale, bias=False)
            levels.append(nn.Sequential(conv, nn.BatchNorm2d(width, BN_EPS), nn.ReLU(inplace=True)))
        # Two levels of names, as files have them.
        self.backbone, self.fpn = nn.ModuleDict({"stages": stages}), nn.ModuleDict({"levels": levels})

    def forward(self, bev: Tensor) -> Tensor:
        maps = []
        for stage, level in zip(self.backbone["stages"], self.fpn["levels"], strict=True):
            bev = stage(bev)
            maps.append(level(bev))
        return torch.cat(maps, 1)
