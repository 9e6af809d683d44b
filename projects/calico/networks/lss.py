"""The cameras: image backbones, the pyramid, and lift, splat, shoot to a bird's-eye map (Philion and Fidler 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.calico.geometry import Grid, frustum, in_image, lift_points, project
from projects.calico.model_config import CameraConfig
from projects.calico.networks.parts import conv_block
from vlmkd.errors import UserError, did_you_mean
from vlmkd.models.clip import downloading


class TimmBackbone(nn.Module):
    """A timm model's feature maps at `stages`, always [I, C, h, w]; images [I, 3, H, W] in ImageNet's statistics."""

    def __init__(self, cfg: CameraConfig) -> None:
        import timm  # seconds, which the toy world does not need

        super().__init__()
        self.channels_last = "swin" in cfg.encoder  # timm gives Swin's maps as [I, h, w, C]
        given: dict[str, object] = {"img_size": tuple(cfg.image_size)} if self.channels_last else {}
        given |= {"drop_path_rate": cfg.drop_path} if cfg.drop_path else {}
        if not timm.is_model(cfg.encoder):
            hint = did_you_mean(cfg.encoder, timm.list_models(), "see timm.list_models()")
            raise UserError(f"config field model.camera.encoder: timm has no model {cfg.encoder}; {hint}")
        given |= {"features_only": True, "out_indices": tuple(cfg.stages)}
        fetched = downloading(
            f"timm:{cfg.encoder}: its weights file", ", or set model.camera.pretrained=false"
        )
        with fetched if cfg.pretrained else nullcontext():
            try:
                self.model = timm.create_model(cfg.encoder, pretrained=cfg.pretrained, **given)
            except (IndexError, AssertionError):
                told = f"is {cfg.stages}, which {cfg.encoder} does not have"
                raise UserError(f"config field model.camera.stages {told}; it has fewer maps") from None
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


_BINS_AT_ONCE = 2**25
"""Numbers [bins, P, C] that a pass of the GPU materialises; the CPU is fastest with one bin."""


class LidarInput(NamedTuple):
    """Points [n, 5] of a batch (x, y, z, intensity, time lag) on the augmented map, and which of B frames [n] they are of."""

    points: Tensor
    frame: Tensor
    frames: int


class CameraInput(NamedTuple):
    """The cameras of a batch."""

    images: Tensor
    """[B, V, 3, H, W], in ImageNet's statistics."""
    intrinsics: Tensor
    """[B, V, 3, 3]."""
    cam2lidar: Tensor
    """[B, V, 4, 4]."""
    img_aug: Tensor
    """[B, V, 4, 4], from a pixel of the camera's file to the image's."""
    lidar_aug: Tensor
    """[B, 4, 4], from the sweep's frame to that of the map: the same that moved the points."""


def bev_pool(depth: Tensor, context: Tensor, cell: Tensor, cells: int, deterministic: bool = False) -> Tensor:
    """Sum [cells, C] of depth [P, D] times context [P, C] in `cell` [P, D], without all P D C products at once.

    A negative cell drops its product. `deterministic` sums each cell in the order of its pixels, where a GPU's
    `index_add` is atomic and differs in its last bits.
    """
    return _BevPool.apply(depth, context, cell, cells, deterministic)


class _BevPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, depth: Tensor, context: Tensor, cell: Tensor, cells: int, deterministic: bool
    ) -> Tensor:
        ctx.save_for_backward(depth, context, cell)
        if deterministic:
            pixel, bins = (cell >= 0).nonzero(as_tuple=True)
            target, order = cell[pixel, bins].sort(stable=True)
            counts, share, pixel = torch.bincount(target, minlength=cells), depth[pixel, bins], pixel[order]
            rows = (share[order, None] * part[pixel] for part in context.split(16, 1))
            return torch.cat(
                [torch.segment_reduce(r, "sum", lengths=counts, axis=0, initial=0) for r in rows], 1
            )
        out = context.new_zeros(cells + 1, context.shape[1])  # the last one takes what lies outside
        for bins in _bins(depth, context):
            index = cell[:, bins].remainder(cells + 1)  # -1 becomes the last
            out.index_add_(0, index.flatten(), (depth[:, bins, None] * context[:, None]).flatten(0, 1))
        return out[:-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        depth, context, cell = ctx.saved_tensors
        # Row -1, which is the last, for what lies outside.
        grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        depth_grad, context_grad = torch.empty_like(depth), torch.zeros_like(context)
        for bins in _bins(depth, context):
            rows = grad[cell[:, bins]]
            depth_grad[:, bins] = torch.einsum("pdc,pc->pd", rows, context)
            context_grad += torch.einsum("pdc,pd->pc", rows, depth[:, bins])
        return depth_grad, context_grad, None, None, None


def _bins(depth: Tensor, context: Tensor) -> list[slice]:
    step = max(_BINS_AT_ONCE // max(context.numel(), 1), 1) if depth.is_cuda else 1
    return [slice(start, start + step) for start in range(0, depth.shape[1], step)]


class LSSTransform(nn.Module):
    """Feature maps [B V, C', h, w] of cameras -> bird's-eye map [B, C, X', Y'], X' = X / `cfg.downsample`.

    A 1x1 convolution gives each pixel a distribution over the depth bins and C channels; their products are summed in
    `grid`, which has one cell along z; three convolutions follow where the map is made smaller. `depth_lss` also reads
    the LiDAR's depths in the images. Geometry, softmax and sums are in float32 whatever the precision of the run.
    """

    def __init__(self, cfg: CameraConfig, stride: int, grid: Grid) -> None:
        super().__init__()
        self.cfg, self.grid, inputs, channels = cfg, grid, cfg.neck, cfg.channels
        features = [size // stride for size in cfg.image_size]
        # Not a buffer, which a run in half precision would round.
        self.frustum = frustum(cfg.image_size, features, cfg.depth, cfg.pixel_grid)
        outputs = len(self.frustum) + channels
        self.depth_in: nn.Module | None = None
        if cfg.view == "lss":
            self.depth_net: nn.Module = nn.Conv2d(inputs, outputs, 1)
        else:
            self.depth_in = nn.Sequential(_block(1, 8, 1, 1), _block(8, 32, 5, 4), _block(32, 64, 5, 2))
            blocks = _block(inputs + 64, inputs, 3, 1), _block(inputs, inputs, 3, 1)
            self.depth_net = nn.Sequential(*blocks, nn.Conv2d(inputs, outputs, 1))
        strides = (1, cfg.downsample, 1) if cfg.downsample > 1 else ()
        self.downsample = nn.Sequential(*(conv_block(channels, channels, stride=step) for step in strides))

    def cells(self, cameras: CameraInput) -> Tensor:
        """Cell of every pixel and depth bin, counted through all frames: int64 [B, V, D, h, w], -1 outside the grid."""
        self.frustum = self.frustum.to(cameras.cam2lidar.device)
        places = lift_points(self.frustum.reshape(1, 1, -1, 3), *cameras[1:])
        index, inside = self.grid.index(places, self.cfg.rounding)
        frame = torch.arange(len(places), device=places.device).reshape(-1, 1, 1)
        cell = (frame * self.grid.shape[0] + index[..., 0]) * self.grid.shape[1] + index[..., 1]
        return cell.where(inside, -1).unflatten(2, self.frustum.shape[:3])

    def splat(self, depth: Tensor, context: Tensor, cameras: CameraInput) -> Tensor:
        """Depth distributions [B V, D, h, w] and context [B V, C, h, w] summed in their cells: [B, C, X, Y]."""
        frames, (x, y, _) = len(cameras.images), self.grid.shape
        cell = self.cells(cameras).permute(0, 1, 3, 4, 2).flatten(0, 3)
        rows = (part.float().permute(0, 2, 3, 1).flatten(0, 2) for part in (depth, context))
        bev = bev_pool(*rows, cell, frames * x * y, self.cfg.deterministic)
        return bev.reshape(frames, x, y, -1).permute(0, 3, 1, 2)

    def forward(self, features: Tensor, cameras: CameraInput, lidar: LidarInput | None = None) -> Tensor:
        if self.depth_in is not None:
            if lidar is None:
                raise UserError(
                    "config field model.camera.view is depth_lss, which needs the LiDAR's points; use lss"
                )
            seen = depth_images(lidar, cameras).flatten(0, 1).to(features.dtype)
            features = torch.cat([self.depth_in(seen), features], 1)
        depth, context = self.depth_net(features).split([len(self.frustum), self.cfg.channels], 1)
        bev = self.splat(depth.float().softmax(1), context, cameras)
        return self.downsample(bev.to(features.dtype))


def _block(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def depth_images(lidar: LidarInput, cameras: CameraInput) -> Tensor:
    """Depth [B, V, 1, H, W] of the nearest of the points that fall on a pixel, 0 without one."""
    frames, views, _, height, width = cameras.images.shape
    far = lidar.points.new_full((frames, views, height * width), torch.inf)
    for row in range(frames):
        mine = lidar.points[lidar.frame == row][None, :, :3]
        _, intrinsics, cam2lidar, *augs = (part[row, None] for part in cameras)
        pixels, depth = project(mine, torch.linalg.inv(cam2lidar.double()), intrinsics, *augs)
        seen = in_image(pixels, depth, (height, width))[0]
        place = (pixels[0, ..., 1].long() * width + pixels[0, ..., 0].long()).where(seen, 0)
        far[row].scatter_reduce_(1, place, depth[0].where(seen, torch.inf), "amin")
    return far.where(far.isfinite(), 0).reshape(frames, views, 1, height, width)
