"""Image backbones and the pyramid of LSS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.calico.model_config import CameraConfig
from projects.calico.networks.parts import conv_block


class TimmBackbone(nn.Module):
    """A timm model's feature maps at `stages`, always [I, C, h, w]; images [I, 3, H, W] in ImageNet's statistics."""

    def __init__(self, cfg: CameraConfig) -> None:
        import timm  # seconds, which the toy world does not need

        super().__init__()
        self.channels_last = "swin" in cfg.encoder  # timm gives Swin's maps as [I, h, w, C]
        given: dict[str, object] = {"img_size": tuple(cfg.image_size)} if self.channels_last else {}
        given |= {"drop_path_rate": cfg.drop_path} if cfg.drop_path else {}
        self.model = timm.create_model(
            cfg.encoder, pretrained=cfg.pretrained, features_only=True, out_indices=tuple(cfg.stages), **given
        )
        self.channels: list[int] = self.model.feature_info.channels()
        self.strides: list[int] = self.model.feature_info.reduction()

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model(images)
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else list(maps)


class TinyBackbone(nn.Module):
    """Stages of two 3x3 convolutions, each of which halves the size, for the toy world; returns the last two maps."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(conv_block(before, width, stride=2), conv_block(width, width))
            for before, width in zip([3, *channels], channels, strict=False)
        )
        self.channels = list(channels[-2:])
        self.strides = [2 ** (len(channels) - 1), 2 ** len(channels)]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[-2:]


class LssFpn(nn.Module):
    """BEVFusion's pyramid, down to its finest level, the only one that the view transform reads: [I, C, h, w]."""

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        above = [*[channels] * (len(inputs) - 2), inputs[-1]]
        self.laterals = nn.ModuleList(
            conv_block(own + up, channels, kernel=1) for own, up in zip(inputs[:-1], above, strict=True)
        )
        self.convs = nn.ModuleList(conv_block(channels, channels) for _ in inputs[:-1])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """`maps` from fine to coarse."""
        coarse = maps[-1]
        for own, lateral, conv in zip(maps[-2::-1], self.laterals[::-1], self.convs[::-1], strict=True):
            coarse = F.interpolate(coarse, size=own.shape[2:], mode="bilinear", align_corners=False)
            coarse = conv(lateral(torch.cat([own, coarse], 1)))
        return coarse
