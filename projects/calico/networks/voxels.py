"""SECOND's sparse convolutions over voxels, in plain PyTorch; spconv behind the same function where it is installed.

Letters: B frames, n occupied voxels (or points) of all frames together, C channels, X, Y, Z voxels, K places of a kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.networks.parts import BN_EPS, BN_MOMENTUM, RowNorm
from projects.calico.networks.pillars import place_in_group

Three = tuple[int, int, int]
Backend = Literal["torch", "spconv"]


@dataclass
class SparseMap:
    """The occupied voxels of a batch, in ascending order of `key`."""

    rows: Tensor
    """[n, C]."""
    coords: Tensor
    """int64 [n, 4]: frame, x, y, z."""
    shape: Three
    frames: int

    @cached_property
    def key(self) -> Tensor:
        """int64 [n], one number for each place."""
        return _key(self.coords, self.shape)

    @cached_property
    def neighbours(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a 3x3x3 kernel that keeps the places."""
        return pairs(self, self.coords, (3, 3, 3), (1, 1, 1), (1, 1, 1))

    def with_rows(self, rows: Tensor) -> SparseMap:
        """The same places, and what is known of them, with other rows."""
        out = copy(self)
        out.rows = rows
        return out

    def dense(self) -> Tensor:
        """[B, C, X, Y, Z], zero where nothing is."""
        canvas = self.rows.new_zeros(self.frames, *self.shape, self.rows.shape[1])
        canvas[tuple(self.coords.T)] = self.rows
        return canvas.permute(0, 4, 1, 2, 3)


def voxelise(points: Tensor, frame: Tensor, frames: int, grid: Grid, max_points: int = 0) -> SparseMap:
    """Mean of the numbers of the points [n, F] in each voxel: of all of them, or of the first `max_points`.

    The map has one more layer of voxels on top, where nothing is, as SECOND's has.
    """
    shape = (*grid.shape[:2], grid.shape[2] + 1)
    index, inside = grid.index(points[:, :3])
    coords = torch.cat([frame[:, None], index], 1)[inside]
    rows, key = points[inside], _key(coords, shape)
    if max_points:
        first = place_in_group(key) < max_points
        rows, key = rows[first], key[first]
    key, place, counts = key.unique(return_inverse=True, return_counts=True)
    total = rows.new_zeros(len(key), rows.shape[1]).index_add(0, place, rows)
    return SparseMap(total / counts[:, None], _coords(key, shape), shape, frames)


def pairs(
    given: SparseMap, wanted: Tensor, kernel: Three, stride: Three, padding: Three
) -> list[tuple[Tensor, Tensor]]:
    """For each place of the kernel, which rows of `wanted` [m, 4] read which rows of `given`."""
    place = wanted.new_tensor(given.shape)
    base = wanted[:, 1:] * wanted.new_tensor(stride) - wanted.new_tensor(padding)
    found = []
    for offset in product(*map(range, kernel)):
        xyz = base + base.new_tensor(offset)
        inside = ((xyz >= 0) & (xyz < place)).all(1).nonzero()[:, 0]
        key = _key(torch.cat([wanted[inside, :1], xyz[inside]], 1), given.shape)
        at = torch.searchsorted(given.key, key).clamp(max=max(len(given.key) - 1, 0))
        hit = given.key[at] == key if len(given.key) else torch.zeros_like(key, dtype=torch.bool)
        found.append((inside[hit], at[hit]))
    return found


def sparse_conv(
    given: SparseMap,
    weight: Tensor,
    kernel: Three,
    stride: Three = (1, 1, 1),
    padding: Three = (1, 1, 1),
    submanifold: bool = True,
    backend: Backend = "torch",
) -> SparseMap:
    """Convolution of the occupied voxels with `weight` [K, C, C'], K in the order x, y, z.

    `submanifold` keeps the places; else every place whose kernel touches an occupied one is occupied.
    """
    if backend == "spconv":
        return _spconv(given, weight, kernel, stride, padding, submanifold)
    if submanifold:
        out, found = given, given.neighbours
    else:
        out = _strided(given, kernel, stride, padding)
        found = pairs(given, out.coords, kernel, stride, padding)
    rows = given.rows.new_zeros(len(out.coords), weight.shape[2])
    for (target, source), part in zip(found, weight, strict=True):
        rows = rows.index_add(
            0, target, given.rows[source] @ part
        )  # a target comes once: the sum has one order
    return out.with_rows(rows)


class SparseConv(nn.Module):
    """`sparse_conv`, BatchNorm over the occupied voxels, ReLU (which `relu=False` leaves to the caller)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Three = (3, 3, 3),
        stride: Three = (1, 1, 1),
        padding: Three = (1, 1, 1),
        submanifold: bool = True,
        relu: bool = True,
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.shape = (kernel, stride, padding, submanifold)
        self.relu, self.backend = relu, backend
        places = kernel[0] * kernel[1] * kernel[2]
        self.weight = nn.Parameter(torch.randn(places, inputs, outputs) * (2 / (places * inputs)) ** 0.5)
        self.norm = RowNorm(outputs, eps=BN_EPS, momentum=BN_MOMENTUM)

    def forward(self, given: SparseMap) -> SparseMap:
        out = sparse_conv(given, self.weight, *self.shape, self.backend)
        rows = self.norm(out.rows)
        return out.with_rows(rows.relu() if self.relu else rows)


class SparseBlock(nn.Module):
    """Two submanifold convolutions and the way around them."""

    def __init__(self, channels: int, backend: Backend = "torch") -> None:
        super().__init__()
        self.first = SparseConv(channels, channels, backend=backend)
        self.second = SparseConv(channels, channels, relu=False, backend=backend)

    def forward(self, given: SparseMap) -> SparseMap:
        out = self.second(self.first(given))
        return out.with_rows((out.rows + given.rows).relu())


class VoxelEncoder(nn.Module):
    """Points -> voxels -> sparse convolutions -> [B, C Z', X', Y'].

    Each stage but the last has residual blocks of its width and then a strided convolution to the last number of the
    stage; the last stage has blocks only. One more convolution of stride 2 along z follows, and z joins the channels.
    """

    def __init__(
        self,
        grid: Grid,
        stages: Sequence[Sequence[int]] = ((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
        channels: int = 128,
        features: int = 5,
        max_points: int = 0,
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.grid, self.max_points, self.stride = grid, max_points, 2 ** (len(stages) - 1)
        layers: list[nn.Module] = [SparseConv(features, stages[0][0], backend=backend)]
        depth = grid.shape[2] + 1
        for number, widths in enumerate(stages):
            last = number + 1 == len(stages)
            blocks = widths if last else widths[:-1]
            layers += [SparseBlock(width, backend) for width in blocks]
            if not last:
                # The third stage of the released encoder has no padding along z.
                padding = (1, 1, 0 if number == 2 else 1)
                down = SparseConv(
                    widths[-2], widths[-1], (3, 3, 3), (2, 2, 2), padding, False, backend=backend
                )
                layers.append(down)
                depth = (depth + 2 * padding[2] - 3) // 2 + 1
        layers.append(
            SparseConv(stages[-1][-1], channels, (1, 1, 3), (1, 1, 2), (0, 0, 0), False, backend=backend)
        )
        depth = (depth - 3) // 2 + 1
        if depth < 1:
            raise ValueError(f"{grid} has {grid.shape[2]} cells along z, too few for {len(stages)} stages")
        self.layers, self.out_channels = nn.Sequential(*layers), channels * depth

    def forward(self, points: Tensor, frame: Tensor, frames: int) -> Tensor:
        """`points` [n, F] start with x, y, z; `frame` int64 [n] is which of the `frames` each belongs to."""
        voxels = voxelise(points, frame, frames, self.grid, self.max_points)
        voxels = voxels.with_rows(voxels.rows.to(next(self.parameters()).dtype))
        return self.layers(voxels).dense().permute(0, 1, 4, 2, 3).flatten(1, 2)


def _key(coords: Tensor, shape: Three) -> Tensor:
    frame, x, y, z = coords.unbind(1)
    return ((frame * shape[0] + x) * shape[1] + y) * shape[2] + z


def _coords(key: Tensor, shape: Three) -> Tensor:
    z, y, x = key % shape[2], key // shape[2] % shape[1], key // (shape[2] * shape[1]) % shape[0]
    return torch.stack([key // (shape[0] * shape[1] * shape[2]), x, y, z], 1)


def _strided(given: SparseMap, kernel: Three, stride: Three, padding: Three) -> SparseMap:
    """The places, without rows, whose kernel touches an occupied one."""
    sizes = zip(given.shape, padding, kernel, stride, strict=True)
    x, y, z = ((size + 2 * pad - width) // step + 1 for size, pad, width, step in sizes)
    offsets = given.coords.new_tensor(list(product(*map(range, kernel))))
    reach = given.coords[None, :, 1:] + given.coords.new_tensor(padding) - offsets[:, None]
    step = reach.new_tensor(stride)
    place = reach.div(step, rounding_mode="floor")
    valid = ((place * step == reach) & (place >= 0) & (place < place.new_tensor((x, y, z)))).all(2)
    frame = given.coords[:, 0].expand(len(offsets), -1)[valid]
    key = _key(torch.cat([frame[:, None], place[valid]], 1), (x, y, z)).unique()
    return SparseMap(given.rows[:0], _coords(key, (x, y, z)), (x, y, z), given.frames)


def _spconv(
    given: SparseMap, weight: Tensor, kernel: Three, stride: Three, padding: Three, submanifold: bool
) -> SparseMap:
    """The same by spconv 2, whose CPU wheel has no backward pass; its rows are put into our order."""
    spconv = importlib.import_module("spconv.pytorch")

    # A tensor that is not contiguous gives wrong sums without a word.
    tensor = spconv.SparseConvTensor(
        given.rows, given.coords.int().contiguous(), list(given.shape), given.frames
    )
    channels = weight.shape[1:]
    if submanifold:
        conv = spconv.SubMConv3d(*channels, kernel, bias=False)
    else:
        conv = spconv.SparseConv3d(*channels, kernel, stride=stride, padding=padding, bias=False)
    kernels = weight.permute(2, 0, 1).reshape(-1, *kernel, weight.shape[1])
    found = torch.func.functional_call(conv.to(weight.device), {"weight": kernels.contiguous()}, (tensor,))
    shape = tuple(found.spatial_shape)
    coords = found.indices.long()
    order = _key(coords, shape).argsort()
    return SparseMap(found.features[order], coords[order], shape, given.frames)
