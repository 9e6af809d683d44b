"""The LiDAR's encoders: points to a bird's-eye map by pillars (Lang et al. 2019) or by SECOND's sparse convolutions.

All plain PyTorch; spconv stands behind the same function where it is installed.
"""

from __future__ import annotations

import importlib.util
import math
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from projects.calico.geometry import Grid
from projects.calico.model_config import POINT, LidarConfig
from projects.calico.networks.parts import BN_EPS, RowNorm
from vlmkd.config import require

MOST_PILLARS = (30_000, 60_000)
"""Of a frame in `hard` mode, in training and else (BEVFusion)."""


def scatter_max(rows: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Maximum [cells, C] of the rows [n, C] of each cell, 0 for a cell without any; equal maxima share the gradient."""
    return _ScatterMax.apply(rows, cell, cells)


class _ScatterMax(torch.autograd.Function):
    """The backward pass of `scatter_reduce` takes two to four times as long (benchmarks/calico_bev.py)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cell: Tensor, cells: int) -> Tensor:
        index = cell[:, None].expand_as(rows)
        out = rows.new_zeros(cells, rows.shape[1]).scatter_reduce(0, index, rows, "amax", include_self=False)
        ctx.save_for_backward(rows, cell, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, cell, out = ctx.saved_tensors
        # Of a ReLU's zeros more may be equal than half precision can count.
        hit = (rows == out[cell]).to(torch.promote_types(grad.dtype, torch.float32))
        equal = hit.new_zeros(out.shape).index_add_(0, cell, hit)
        return hit.mul_(grad[cell]).div_(equal[cell].clamp_(min=1)).to(grad.dtype), None, None


def scatter_mean(rows: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Mean [cells, C] of the rows [n, C] of each cell, 0 for a cell without any."""
    total = rows.new_zeros(cells, rows.shape[1]).index_add(0, cell, rows)
    return total / torch.bincount(cell, minlength=cells).clamp(min=1)[:, None]


def place_in_group(group: Tensor) -> Tensor:
    """How many earlier rows [n] belong to the same group."""
    ordered, order = group.sort(stable=True)
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group), device=group.device) - torch.searchsorted(ordered, ordered)
    return place


class PillarEncoder(nn.Module):
    """Points -> PFN layers -> maximum of each pillar: [B, C, X, Y].

    A point's numbers are followed by its offset from the mean of its pillar (3) and from the pillar's centre (2). Every
    layer but the last has half its channels for the point and half for the pillar's maximum.

    `dynamic` takes all points, in any order. `hard` is for released weights: the first `max_points` of the first
    `MOST_PILLARS` of a frame; rows of zeros, to which the reference pads, take part in the maximum of a pillar that is
    not full, and in training in the statistics of BatchNorm.
    """

    def __init__(self, grid: Grid, cfg: LidarConfig) -> None:
        super().__init__()
        self.grid, self.hard, self.max_points = grid, cfg.mode == "hard", cfg.max_points
        self.out_channels, inputs = cfg.channels[-1], POINT + 5
        self.linears, self.norms = nn.ModuleList(), nn.ModuleList()
        for width in [*(width // 2 for width in cfg.channels[:-1]), cfg.channels[-1]]:
            self.linears.append(nn.Linear(inputs, width, bias=False))
            self.norms.append(RowNorm(width, BN_EPS))
            inputs = 2 * width

    def forward(self, points: Tensor, frame: Tensor, frames: int) -> Tensor:
        """`points` [n, F] start with x, y, z; `frame` int64 [n] is which of the `frames` each belongs to."""
        index, inside = self.grid.index(points[:, :3])
        points, index, frame = points[inside], index[inside], frame[inside]
        x, y, _ = self.grid.shape
        cell = (frame * x + index[:, 0]) * y + index[:, 1]
        if self.hard:
            kept = self._first(cell, frame)
            points, index, cell = points[kept], index[kept], cell[kept]
        local = points[:, :3] - self.grid.centre(index, points.dtype)
        mean = scatter_mean(local, cell, frames * x * y)
        rows = torch.cat([points, local - mean[cell], local[:, :2]], 1)
        if (
            self.hard
        ):  # a row of zeros for each free place; one a pillar is enough where no statistics are taken
            pillars, counts = cell.unique(return_counts=True)
            free = (self.max_points - counts).clamp(max=self.max_points if self.training else 1)
            padding = pillars.repeat_interleave(free)
            rows, cell = F.pad(rows, (0, 0, 0, len(padding))), torch.cat([cell, padding])
        canvas = rows
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            rows = torch.cat([rows, canvas[cell]], 1) if layer else rows
            # In float32: half precision would round metres to quarters.
            rows = F.linear(rows.float(), linear.weight.float()).to(linear.weight.dtype)
            rows = norm(rows).relu()
            canvas = scatter_max(rows, cell, frames * x * y)
        # Convolutions of the CPU take rows of channels, as they lie here, faster than planes.
        return canvas.reshape(frames, x, y, -1).permute(0, 3, 1, 2)

    def _first(self, cell: Tensor, frame: Tensor) -> Tensor:
        """bool [n]: the first points of the first pillars of each frame."""
        place = place_in_group(cell)
        heads = (place == 0).nonzero()[:, 0]
        early = place_in_group(frame[heads]) < MOST_PILLARS[0 if self.training else 1]
        return (place < self.max_points) & torch.isin(cell, cell[heads[early]])


Three = tuple[int, int, int]
ONE: Three = (1, 1, 1)


@dataclass
class SparseMap:
    """The occupied voxels of a batch."""

    rows: Tensor
    """[n, C]."""
    key: Tensor
    """int64 [n], ascending: a number for each frame and place, see `_key`."""
    shape: Three
    frames: int

    @cached_property
    def coords(self) -> Tensor:
        """int64 [n, 4]: frame, x, y, z."""
        return torch.stack(torch.unravel_index(self.key, (self.frames, *self.shape)), 1)

    @cached_property
    def neighbours(self) -> list[tuple[Tensor, Tensor]]:
        """`pairs` of a 3x3x3 kernel that keeps the places."""
        return pairs(self, (3, 3, 3), ONE, ONE)[1]

    def with_rows(self, rows: Tensor) -> SparseMap:
        """The same places, and what is known of them, with other rows."""
        out = copy(self)
        out.rows = rows
        return out

    def dense(self) -> Tensor:
        """[B, C, X, Y, Z], zero where nothing is."""
        canvas = self.rows.new_zeros(self.frames * math.prod(self.shape), self.rows.shape[1])
        canvas[self.key] = self.rows
        return canvas.reshape(self.frames, *self.shape, -1).permute(0, 4, 1, 2, 3)


def _key(frame: Tensor, place: Tensor, shape: Three) -> Tensor:
    x, y, z = place.unbind(-1)
    return ((frame * shape[0] + x) * shape[1] + y) * shape[2] + z


def voxelise(points: Tensor, frame: Tensor, frames: int, grid: Grid, max_points: int = 0) -> SparseMap:
    """Mean of the numbers of the points [n, F] in each voxel: of all of them, or of the first `max_points`.

    The map has one more layer of voxels on top, where nothing is, as SECOND's has.
    """
    x, y, z = grid.shape
    index, inside = grid.index(points[:, :3])
    rows, key = points[inside], _key(frame, index, (x, y, z + 1))[inside]
    if max_points:
        first = place_in_group(key) < max_points
        rows, key = rows[first], key[first]
    key, place, counts = key.unique(return_inverse=True, return_counts=True)
    total = rows.new_zeros(len(key), rows.shape[1]).index_add(0, place, rows)
    return SparseMap(total / counts[:, None], key, (x, y, z + 1), frames)


def pairs(
    given: SparseMap, kernel: Three, stride: Three, padding: Three
) -> tuple[SparseMap, list[tuple[Tensor, Tensor]]]:
    """The places of a convolution's output, and for each place of its kernel which of them read which rows of `given`.

    Stride 1 keeps the places ("submanifold"); else every place whose kernel touches an occupied one is occupied.
    """
    sizes = zip(given.shape, padding, kernel, stride, strict=True)
    x, y, z = ((size + 2 * pad - width) // step + 1 for size, pad, width, step in sizes)
    offsets, pad, step, shape = (
        given.key.new_tensor(v) for v in (list(product(*map(range, kernel))), padding, stride, (x, y, z))
    )
    reach = given.coords[:, 1:] + pad - offsets[:, None]
    place = reach.div(step, rounding_mode="floor")
    hit = ((place * step == reach) & (place >= 0) & (place < shape)).all(2)
    key = _key(given.coords[:, 0], place, (x, y, z))
    out = given.key if stride == ONE else key[hit].unique()
    target = torch.searchsorted(out, key)
    hit &= F.pad(out, (0, 1), value=-1)[target] == key
    found = [(to[own], own.nonzero()[:, 0]) for to, own in zip(target, hit, strict=True)]
    return SparseMap(given.rows[:0], out, (x, y, z), given.frames), found


class SparseConv(nn.Module):
    """Convolution of the occupied voxels, BatchNorm over them, ReLU (which `relu=False` leaves to the caller)."""

    backend = "torch"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Three = (3, 3, 3),
        stride: Three = ONE,
        padding: Three = ONE,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.relu = (kernel, stride, padding), relu
        places = math.prod(kernel)  # in the order x, y, z
        self.weight = nn.Parameter(torch.randn(places, inputs, outputs) * (2 / (places * inputs)) ** 0.5)
        self.norm = RowNorm(outputs, BN_EPS)

    def forward(self, given: SparseMap) -> SparseMap:
        if self.backend == "spconv":
            out = self._spconv(given)
        else:
            keeps = self.shape[1] == ONE
            out, found = (given, given.neighbours) if keeps else pairs(given, *self.shape)
            rows = given.rows.new_zeros(len(out.key), self.weight.shape[2])
            for (target, source), part in zip(found, self.weight.to(rows.dtype), strict=True):
                # A target comes once: the sum has one order.
                rows = rows.index_add(0, target, given.rows[source] @ part)
            out = out.with_rows(rows)
        rows = self.norm(out.rows).to(self.weight.dtype)
        return out.with_rows(rows.relu() if self.relu else rows)

    def _spconv(self, given: SparseMap) -> SparseMap:
        """The same by spconv 2, whose CPU wheel has no backward pass; its rows are put into our order."""
        spconv = importlib.import_module("spconv.pytorch")
        kernel, stride, padding = self.shape
        _, inputs, outputs = self.weight.shape
        # A tensor that is not contiguous gives wrong sums without a word.
        places = given.coords.int().contiguous()
        tensor = spconv.SparseConvTensor(given.rows, places, list(given.shape), given.frames)
        conv = (
            spconv.SubMConv3d(inputs, outputs, kernel, bias=False)
            if stride == ONE
            else spconv.SparseConv3d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        ).to(self.weight.device)
        weight = (
            self.weight.to(given.rows.dtype).permute(2, 0, 1).reshape(outputs, *kernel, inputs).contiguous()
        )
        found = torch.func.functional_call(conv, {"weight": weight}, (tensor,))
        frame, place = found.indices.long().split([1, 3], 1)
        key, order = _key(frame[:, 0], place, found.spatial_shape).sort()
        return SparseMap(found.features[order], key, tuple(found.spatial_shape), given.frames)


class SparseBlock(nn.Module):
    """Two submanifold convolutions and the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = SparseConv(channels, channels), SparseConv(channels, channels, relu=False)

    def forward(self, given: SparseMap) -> SparseMap:
        out = self.second(self.first(given))
        return out.with_rows((out.rows + given.rows).relu())


class VoxelEncoder(nn.Module):
    """Points -> voxels -> sparse convolutions -> [B, C Z', X / 8, Y / 8].

    Four stages of two residual blocks, each twice as wide as the one before; a strided convolution leads from one to the
    next. One more of stride 2 along z follows, and z joins the channels.
    """

    def __init__(self, grid: Grid, cfg: LidarConfig) -> None:
        super().__init__()
        self.grid, self.max_points, self.stride = grid, cfg.max_points, 8
        width, last = cfg.channels
        layers: list[nn.Module] = [SparseConv(POINT, width)]
        depth = grid.shape[2] + 1
        for stage in range(4):
            layers += [SparseBlock(width), SparseBlock(width)]
            if stage < 3:
                high = (
                    0 if stage == 2 else 1
                )  # the third stage of the released encoder has no padding along z
                layers.append(SparseConv(width, 2 * width, (3, 3, 3), (2, 2, 2), (1, 1, high)))
                width, depth = 2 * width, (depth + 2 * high - 3) // 2 + 1
        layers.append(SparseConv(width, last, (1, 1, 3), (1, 1, 2), (0, 0, 0)))
        depth = (depth - 3) // 2 + 1
        told = f"is {cfg.cell}; {grid.shape[2]} cells along z are too few for 4 stages"
        require(depth > 0, "model.lidar.cell", told)
        there = cfg.backend == "torch" or importlib.util.find_spec("spconv") is not None
        require(there, "model.lidar.backend", "is spconv, which is not installed; install it, or use torch")
        self.layers, self.out_channels = nn.Sequential(*layers), last * depth
        for layer in self.modules():
            if isinstance(layer, SparseConv):
                layer.backend = cfg.backend

    def forward(self, points: Tensor, frame: Tensor, frames: int) -> Tensor:
        """`points` [n, F] start with x, y, z; `frame` int64 [n] is which of the `frames` each belongs to."""
        # The first layer reads float32: half precision would round metres to quarters.
        voxels = voxelise(points, frame, frames, self.grid, self.max_points)
        return self.layers(voxels).dense().permute(0, 1, 4, 2, 3).flatten(1, 2)
