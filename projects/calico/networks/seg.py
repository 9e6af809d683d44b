"""Map segmentation: a bird's-eye map resampled to the label's cells, convolutions, one logit per class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from projects.calico.geometry import Grid, bev_sample
from projects.calico.networks.boxes import focal_loss
from projects.calico.networks.parts import conv_block


class SegHead(nn.Module):
    """A map [B, C, X', Y'] over `grid` -> logits [B, M, X, Y] at the centres of the cells of `labels`."""

    def __init__(self, inputs: int, grid: Grid, classes: int, labels: Grid, width: int = 0) -> None:
        super().__init__()
        self.grid, self.labels, width = grid, labels, width or inputs
        self.convs = nn.Sequential(
            conv_block(inputs, width), conv_block(width, width), nn.Conv2d(width, classes, 1)
        )

    def forward(self, bev: Tensor) -> Tensor:
        x, y, _ = self.labels.shape
        index = torch.cartesian_prod(torch.arange(x, device=bev.device), torch.arange(y, device=bev.device))
        places = self.labels.centre(index).expand(len(bev), -1, -1)
        sampled = bev_sample(bev, places, self.grid).mT.reshape(len(bev), -1, x, y)
        return self.convs(sampled.to(bev.dtype))

    def loss(self, logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """`map`: focal loss, gamma 2 without alpha, mean over all logits. `masks` [B, M, X, Y] of 0 and 1."""
        return {"map": focal_loss(logits, masks, alpha=None).mean()}

    @torch.no_grad()
    def decode(self, logits: Tensor) -> Tensor:
        """Probabilities [B, M, X, Y]."""
        return logits.float().sigmoid()
