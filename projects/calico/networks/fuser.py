"""Camera and LiDAR maps to one, and the projectors of the contrastive stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.networks.parts import RowNorm, conv_block


class ConvFuser(nn.Module):
    """One 3x3 convolution over the concatenated maps [B, C, X, Y] of all modalities."""

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.conv = conv_block(sum(inputs), channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.conv(torch.cat(list(maps), 1))


class PointProjector(nn.Module):
    """Samples [n, C] of a map -> unit vectors [n, D]: linear, BatchNorm, ReLU, linear."""

    def __init__(self, inputs: int, hidden: int = 256, outputs: int = 64) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(inputs, hidden), RowNorm(hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, samples: Tensor) -> Tensor:
        hidden = self.norm(self.first(samples.to(self.first.weight.dtype))).relu()
        return F.normalize(self.last(hidden).float(), dim=-1)


class BoxProjector(nn.Module):
    """Boxes of a map -> unit vectors [k, D] (the author's prototype): RoIAlign 7x7, two convolutions, maximum, linear."""

    def __init__(self, inputs: int, outputs: int = 64) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(inputs, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1), nn.ReLU()
        )
        self.last = nn.Linear(64, outputs)

    def forward(self, bev: Tensor, boxes: Sequence[Tensor], grid: Grid) -> Tensor:
        """`bev` [B, C, X, Y] over `grid`, `boxes` of each frame (x1, y1, x2, y2) [k, 4] in metres."""
        from torchvision.ops import roi_align

        # RoIAlign calls the last axis x, and that is y; n in [-1, 1] is (n + 1) / 2 of the map.
        size = torch.tensor([bev.shape[2:]], device=bev.device) / 2
        corners = [(grid.normalised(box.float().unflatten(1, (2, 2))) + 1) * size for box in boxes]
        crops = roi_align(
            bev.float(), [c.flip(2).flatten(1) for c in corners], 7, sampling_ratio=2, aligned=True
        )
        hidden = self.convs(crops.to(self.last.weight.dtype)).amax((2, 3))
        return F.normalize(self.last(hidden).float(), dim=-1)


def region_boxes(xy: Tensor, region: Tensor, limit: int = 50) -> Tensor:
    """Axis-aligned boxes (x1, y1, x2, y2) [k, 4] of the first `limit` regions among points [n, 2]."""
    rich = (region >= 0) & (region < limit)
    names, inverse = region[rich].unique(return_inverse=True)
    index, blank = inverse[:, None].expand(-1, 2), xy.new_zeros(len(names), 2)
    ends = [blank.scatter_reduce(0, index, xy[rich], which, include_self=False) for which in ("amin", "amax")]
    return torch.cat(ends, 1)
