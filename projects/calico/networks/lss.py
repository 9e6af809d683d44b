"""Lift, splat, shoot: image features to a bird's-eye map by a depth distribution (Philion and Fidler 2020).

Letters: B frames, V cameras, P pixels of all feature maps together, D depth bins, C channels, h, w rows and columns of a
feature map, H, W of an image, X, Y cells, n rows.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from projects.calico.geometry import Grid, PixelGrid, Rounding, frustum, in_image, lift_points, project
from projects.calico.networks.parts import conv_block

PoolMethod = Literal["index_add", "sparse", "sorted"]
_BINS_AT_ONCE = 2**25
"""Numbers [bins, P, C] that a pass of the GPU materialises; the CPU is fastest with one bin."""


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


def bev_pool(rows: Tensor, cell: Tensor, cells: int, deterministic: bool = False) -> Tensor:
    """Sum [cells, C] of the rows [n, C] of each cell; a negative cell drops its row.

    `deterministic` sums in the order of the rows, where a GPU's `index_add` is atomic and differs in its last bits.
    """
    kept = cell >= 0
    rows, cell = rows[kept], cell[kept]
    if not deterministic:
        return rows.new_zeros(cells, rows.shape[1]).index_add(0, cell, rows)
    order = cell.argsort(stable=True)
    return _segment_sum(rows[order], torch.bincount(cell, minlength=cells))


def lift_pool(
    depth: Tensor, context: Tensor, cell: Tensor, cells: int, method: PoolMethod = "index_add"
) -> Tensor:
    """`bev_pool` of depth [P, D] times context [P, C] into `cell` [P, D], without all P D C products: [cells, C].

    `index_add` goes through the depth bins, `sparse` multiplies by a matrix of cells by pixels, `sorted` sums each
    cell in the order of its pixels, bit for bit the same on every run. Gradients are the same gather for all.
    """
    return _LiftPool.apply(depth, context, cell, cells, method)


class _LiftPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, depth: Tensor, context: Tensor, cell: Tensor, cells: int, method: PoolMethod
    ) -> Tensor:
        ctx.save_for_backward(depth, context, cell)
        if method == "index_add":
            out = context.new_zeros(cells + 1, context.shape[1])  # the last one takes what lies outside
            for bins in _bins(depth, context):
                index = cell[:, bins].remainder(cells + 1)  # -1 becomes the last
                rows = depth[:, bins, None] * context[:, None]
                out.index_add_(0, index.flatten(), rows.flatten(0, 1))
            return out[:-1]
        pixel, bins = (cell >= 0).nonzero(as_tuple=True)
        target, share = cell[pixel, bins], depth[pixel, bins]
        if method == "sparse":
            size = (cells, len(context))
            return (
                torch.sparse_coo_tensor(torch.stack([target, pixel]), share, size, check_invariants=True)
                @ context
            )
        target, order = target.sort(stable=True)
        counts, share, pixel = torch.bincount(target, minlength=cells), share[order, None], pixel[order]
        parts = [_segment_sum(share * part[pixel], counts) for part in context.split(16, 1)]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        depth, context, cell = ctx.saved_tensors
        grad = torch.cat(
            [grad, grad.new_zeros(1, grad.shape[1])]
        )  # row -1, which is the last, for what lies outside
        depth_grad, context_grad = torch.empty_like(depth), torch.zeros_like(context)
        for bins in _bins(depth, context):
            rows = grad[cell[:, bins]]
            depth_grad[:, bins] = torch.einsum("pdc,pc->pd", rows, context)
            context_grad += torch.einsum("pdc,pd->pc", rows, depth[:, bins])
        return depth_grad, context_grad, None, None, None


def _bins(depth: Tensor, context: Tensor) -> list[slice]:
    step = max(_BINS_AT_ONCE // max(context.numel(), 1), 1) if depth.is_cuda else 1
    return [slice(start, start + step) for start in range(0, depth.shape[1], step)]


def _segment_sum(rows: Tensor, counts: Tensor) -> Tensor:
    """Sum of the first counts[0] rows, of the next counts[1], and so on."""
    return torch.segment_reduce(rows, "sum", lengths=counts, axis=0, initial=0)


class LSSTransform(nn.Module):
    """Feature maps of cameras -> bird's-eye map [B, C, X', Y'] over `grid`, X' = X / `downsample`.

    A 1x1 convolution gives each pixel a distribution over `depth_bins` (first, end, step) and C channels; their products
    are summed in `grid`, which has one cell along z; three convolutions follow where the map is made smaller.
    Geometry, softmax and sums are in float32 whatever the precision of the run.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        image_size: tuple[int, int],
        feature_size: tuple[int, int],
        depth_bins: tuple[float, float, float],
        grid: Grid,
        downsample: int = 2,
        pixel_grid: PixelGrid = "corner",
        rounding: Rounding = "floor",
        method: PoolMethod = "index_add",
    ) -> None:
        super().__init__()
        if grid.shape[2] != 1:
            raise ValueError(f"{grid} has {grid.shape[2]} cells along z; the camera's map has one")
        self.grid, self.rounding, self.method = grid, rounding, method
        self.image_size, self.out_channels, self.stride = image_size, channels, downsample
        # Not a buffer, which a run in half precision would round.
        self.frustum = frustum(image_size, feature_size, depth_bins, pixel_grid)
        self.depth_net = self._depth_net(inputs, len(self.frustum) + channels)
        strides = (1, downsample, 1) if downsample > 1 else ()
        self.downsample = nn.Sequential(
            *(conv_block(channels, channels, stride=stride) for stride in strides)
        )

    def _depth_net(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 1)

    def cells(self, cameras: CameraInput) -> Tensor:
        """Cell of every pixel and depth bin, counted through all frames: int64 [B, V, D, h, w], -1 outside the grid."""
        self.frustum = self.frustum.to(cameras.cam2lidar.device)
        places = lift_points(self.frustum, *cameras[1:])
        index, inside = self.grid.index(places, self.rounding)
        frame = torch.arange(len(places), device=places.device).reshape(-1, 1, 1, 1, 1)
        cell = (frame * self.grid.shape[0] + index[..., 0]) * self.grid.shape[1] + index[..., 1]
        return cell.where(inside, -1)

    def splat(self, depth: Tensor, context: Tensor, cameras: CameraInput) -> Tensor:
        """Depth distributions [B V, D, h, w] and context [B V, C, h, w] summed in their cells: [B, C, X, Y]."""
        frames, (x, y, _) = len(cameras.images), self.grid.shape
        cell = self.cells(cameras).permute(0, 1, 3, 4, 2).flatten(0, 3)
        rows = (part.float().permute(0, 2, 3, 1).flatten(0, 2) for part in (depth, context))
        bev = lift_pool(*rows, cell, frames * x * y, self.method)
        return bev.reshape(frames, x, y, -1).permute(0, 3, 1, 2).contiguous()

    def lift(
        self, features: Tensor, cameras: CameraInput, sparse_depth: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Depth distributions [B V, D, h, w] and context [B V, C, h, w] of feature maps [B V, C', h, w]."""
        depth, context = self.depth_net(features).split([len(self.frustum), self.out_channels], 1)
        return depth.float().softmax(1), context

    def forward(self, features: Tensor, cameras: CameraInput, sparse_depth: Tensor | None = None) -> Tensor:
        bev = self.splat(*self.lift(features, cameras, sparse_depth), cameras)
        return self.downsample(bev.to(features.dtype))


class DepthLSS(LSSTransform):
    """LSSTransform that also reads the LiDAR's depths in the images; never a student, which must not see the LiDAR."""

    def _depth_net(self, inputs: int, outputs: int) -> nn.Module:
        def block(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(before, after, kernel, stride, kernel // 2)
            return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

        self.depth_in = nn.Sequential(block(1, 8, 1, 1), block(8, 32, 5, 4), block(32, 64, 5, 2))
        return nn.Sequential(
            block(inputs + 64, inputs, 3, 1), block(inputs, inputs, 3, 1), nn.Conv2d(inputs, outputs, 1)
        )

    def lift(
        self, features: Tensor, cameras: CameraInput, sparse_depth: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert sparse_depth is not None, "DepthLSS reads the depths of depth_images"
        seen = self.depth_in(sparse_depth.flatten(0, 1).to(features.dtype))
        return super().lift(torch.cat([seen, features], 1), cameras, None)


def depth_images(points: Tensor, frame: Tensor, cameras: CameraInput) -> Tensor:
    """Depth [B, V, 1, H, W] of the nearest of the points [n, 3+] that fall on a pixel, 0 without one.

    `points` are in the frame of the map (augmented), `frame` int64 [n] is the row of the batch that each belongs to.
    """
    frames, views, _, height, width = cameras.images.shape
    far = points.new_full((frames, views, height * width), torch.inf)
    for row in range(frames):
        mine = points[frame == row][None, :, :3]
        calibration = [part[row, None] for part in (cameras.intrinsics, cameras.img_aug, cameras.lidar_aug)]
        pixels, depth = project(mine, torch.linalg.inv(cameras.cam2lidar[row, None].double()), *calibration)
        seen = in_image(pixels, depth, (height, width))[0]
        place = (pixels[0, ..., 1].long() * width + pixels[0, ..., 0].long()).where(seen, 0)
        far[row].scatter_reduce_(1, place, depth[0].where(seen, torch.inf), "amin")
    return far.where(far.isfinite(), 0).reshape(frames, views, 1, height, width)
