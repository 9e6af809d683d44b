"""Image backbones and the pyramid of LSS.

Letters: I images (frames times cameras), C channels, H, W rows and columns of an image, h, w of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.calico.networks.parts import conv_block


class TimmBackbone(nn.Module):
    """A timm model's feature maps at `stages`, always [I, C, h, w]; images [I, 3, H, W] in ImageNet's statistics."""

    def __init__(
        self,
        name: str,
        image_size: tuple[int, int],
        stages: Sequence[int],
        pretrained: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        import timm  # seconds, which the toy world does not need

        super().__init__()
        swin = {"img_size": image_size} if "swin" in name else {}
        drop = {"drop_path_rate": drop_path} if drop_path else {}
        self.model = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=tuple(stages), **swin, **drop
        )
        self.channels: list[int] = self.model.feature_info.channels()
        self.strides: list[int] = self.model.feature_info.reduction()
        self.channels_last = "swin" in name  # timm gives Swin's maps as [I, h, w, C]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model(images)
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else list(maps)


class TinyBackbone(nn.Module):
    """Stages of two 3x3 convolutions, each of which halves the size, for the toy world; returns the last two maps."""

    def __init__(self, channels: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        pairs = zip([3, *channels], channels, strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(conv_block(before, width, stride=2), conv_block(width, width))
            for before, width in pairs
        )
        self.channels = list(channels[-2:])
        self.strides = [2 ** (len(channels) - 1), 2 ** len(channels)]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps[-2:]


class LssFpn(nn.Module):
    """BEVFusion's pyramid, down to its finest level, the only one that the view transform reads: [I, C, h, w]."""

    def __init__(self, inputs: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        above = [*[channels] * (len(inputs) - 2), inputs[-1]]
        self.laterals = nn.ModuleList(
            conv_block(own + up, channels, kernel=1) for own, up in zip(inputs[:-1], above, strict=True)
        )
        self.convs = nn.ModuleList(conv_block(channels, channels) for _ in inputs[:-1])
        self.out_channels = channels

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """`maps` from fine to coarse."""
        coarse = maps[-1]
        for own, lateral, conv in zip(maps[-2::-1], self.laterals[::-1], self.convs[::-1], strict=True):
            coarse = F.interpolate(coarse, size=own.shape[2:], mode="bilinear", align_corners=False)
            coarse = conv(lateral(torch.cat([own, coarse], 1)))
        return coarse
