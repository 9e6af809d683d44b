"""SECOND's two-dimensional backbone and its pyramid (Yan et al. 2018), as in BEVFusion.

Letters: B frames, C channels, X, Y cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from projects.calico.networks.parts import BN_EPS, BN_MOMENTUM, conv_block


class Second(nn.Module):
    """Stages of 3x3 convolutions: the first of a stage has its stride, `layers` more follow. Returns every stage's map."""

    def __init__(
        self, inputs: int, layers: Sequence[int], channels: Sequence[int], strides: Sequence[int]
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for count, width, stride in zip(layers, channels, strides, strict=True):
            sizes = [(inputs, stride), *[(width, 1)] * count]
            blocks = [conv_block(i, width, stride=s, eps=BN_EPS, momentum=BN_MOMENTUM) for i, s in sizes]
            self.stages.append(nn.Sequential(*blocks))
            inputs = width

    def forward(self, bev: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            bev = stage(bev)
            maps.append(bev)
        return maps


class SecondFpn(nn.Module):
    """Brings the maps of all stages to one size, `ups` times theirs (0.5 halves), and concatenates them: [B, C, X, Y]."""

    def __init__(self, inputs: Sequence[int], channels: Sequence[int], ups: Sequence[float]) -> None:
        super().__init__()
        self.out_channels = sum(channels)
        self.levels = nn.ModuleList()
        for before, width, up in zip(inputs, channels, ups, strict=True):
            scale = round(max(up, 1 / up))
            layer = nn.ConvTranspose2d if up >= 1 else nn.Conv2d
            norm = nn.BatchNorm2d(width, eps=BN_EPS, momentum=BN_MOMENTUM)
            conv = layer(before, width, scale, stride=scale, bias=False)
            self.levels.append(nn.Sequential(conv, norm, nn.ReLU(inplace=True)))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat([level(bev) for level, bev in zip(self.levels, maps, strict=True)], 1)


class SecondWithFpn(nn.Module):
    """Both. `stride` is the size of the input's map over that of the output's."""

    def __init__(
        self,
        inputs: int,
        layers: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        fpn_channels: Sequence[int],
        ups: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = Second(inputs, layers, channels, strides)
        self.fpn = SecondFpn(channels, fpn_channels, ups)
        self.out_channels = self.fpn.out_channels
        total, found = 1, set()
        for stride, up in zip(strides, ups, strict=True):
            total *= stride
            found.add(total / up)
        if len(found) > 1 or not found.copy().pop().is_integer():
            raise ValueError(
                f"strides {list(strides)} and ups {list(ups)} give maps of different sizes: 1/{found}"
            )
        self.stride = round(found.pop())

    def forward(self, bev: Tensor) -> Tensor:
        return self.fpn(self.backbone(bev))
