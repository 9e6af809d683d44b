"""Blocks that several networks share.

Letters: B frames, C channels, X, Y cells, n rows (points, pillars or voxels of all frames together).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS, BN_MOMENTUM = 1e-3, 0.01
"""Of the LiDAR branch and the decoder (BEVFusion); the camera branch and the heads have torch's."""


class RowNorm(nn.BatchNorm1d):
    """BatchNorm over rows [n, C]; fewer than two rows, which have no variance, take the running statistics."""

    def forward(self, rows: Tensor) -> Tensor:
        if len(rows) > 1 or not self.training:
            return super().forward(rows)
        return F.batch_norm(
            rows, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def conv_block(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, eps: float = 1e-5, momentum: float = 0.1
) -> nn.Sequential:
    """Convolution without a bias that keeps the size (divided by `stride`), BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(outputs, eps=eps, momentum=momentum),
        nn.ReLU(inplace=True),
    )
