"""Points to a bird's-eye map by pillars, straight into the dense canvas (docs/papers/calico.md; Lang et al. 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.model_config import POINT, LidarConfig
from projects.calico.networks.parts import BN_EPS, RowNorm

MOST_PILLARS = (30_000, 60_000)
"""Of a frame in `hard` mode, in training and else (BEVFusion)."""


def scatter_max(rows: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Maximum [cells, C] of the rows [n, C] of each cell, 0 for a cell without any; equal maxima share the gradient."""
    index = cell[:, None].expand_as(rows)
    return rows.new_zeros(cells, rows.shape[1]).scatter_reduce(0, index, rows, "amax", include_self=False)


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
        if grid.shape[2] != 1:
            raise ValueError(f"{grid} has {grid.shape[2]} cells along z; a pillar is one")
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
        return canvas.reshape(frames, x, y, -1).permute(0, 3, 1, 2).contiguous()

    def _first(self, cell: Tensor, frame: Tensor) -> Tensor:
        """bool [n]: the first points of the first pillars of each frame."""
        place = place_in_group(cell)
        heads = (place == 0).nonzero()[:, 0]
        early = place_in_group(frame[heads]) < MOST_PILLARS[0 if self.training else 1]
        return (place < self.max_points) & torch.isin(cell, cell[heads[early]])
