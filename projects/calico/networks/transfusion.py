"""TransFusion's head (Bai et al. 2022), as in BEVFusion: queries from the peaks of a heat map, one decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.model_config import HeadConfig
from projects.calico.networks import boxes as coding
from projects.calico.networks.boxes import CODE, Detections
from projects.calico.networks.center import BOX_WEIGHT, HEAT_BIAS
from projects.calico.networks.parts import conv_block, rank_share

HEADS, DROPOUT = 8, 0.1
COSTS = (0.15, 0.25, 0.25)
"""Of the assignment: focal, L1 distance of centres as shares of the map, overlap of volumes."""
SMALL = ("pedestrian", "traffic_cone")
"""Classes whose peaks may be neighbours; the reference has their numbers, 8 and 9, in its code."""


class QueryOutput(NamedTuple):
    """Heat logits [B, C, X, Y]; class and height [B, Q] of the peak that a query began as; logits [B, Q, C], codes [B, Q, 10]."""

    heat: Tensor
    label: Tensor
    peak: Tensor
    score: Tensor
    code: Tensor


class _Position(nn.Module):
    """Places [B, n, 2], in cells -> [B, n, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, place: Tensor) -> Tensor:
        hidden = F.linear(place.float(), self.first.weight.float(), self.first.bias.float())
        hidden = self.norm(hidden.to(self.first.weight.dtype).flatten(0, 1)).reshape(hidden.shape)
        return self.last(hidden.relu())


class _DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to all cells, feed-forward; norms come after."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.own_place, self.cell_place = _Position(width), _Position(width)
        self.own, self.cross = (
            nn.MultiheadAttention(width, HEADS, DROPOUT, batch_first=True) for _ in range(2)
        )
        self.feed = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(hidden, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, query: Tensor, cells: Tensor, query_place: Tensor, cell_place: Tensor) -> Tensor:
        own, keys = self.own_place(query_place), cells + self.cell_place(cell_place)
        placed = query + own
        query = self.norms[0](query + self.drop(self.own(placed, placed, placed, need_weights=False)[0]))
        query = self.norms[1](query + self.drop(self.cross(query + own, keys, keys, need_weights=False)[0]))
        return self.norms[2](query + self.drop(self.feed(query)))


class TransFusionHead(nn.Module):
    """A map [B, C, X, Y] over `grid` -> QueryOutput.

    The highest `queries` local maxima over all classes start with the feature of their cell and a vector of their class.
    """

    def __init__(self, inputs: int, grid: Grid, classes: Sequence[str], cfg: HeadConfig) -> None:
        super().__init__()
        self.grid, self.cfg, self.classes, width = grid, cfg, len(classes), cfg.width
        self.wide = [n for n, name in enumerate(classes) if name not in SMALL]
        self.shared = nn.Conv2d(inputs, width, 3, padding=1)
        self.heat = nn.Sequential(conv_block(width, width), nn.Conv2d(width, len(classes), 3, padding=1))
        self.class_vector = nn.Linear(len(classes), width)
        self.layer = _DecoderLayer(width, cfg.hidden)
        self.towers = nn.ModuleDict()
        for name, n in {"score": len(classes), **CODE}.items():
            first = nn.Conv1d(width, 64, 1, bias=False)
            self.towers[name] = nn.Sequential(first, nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, n, 1))
        for last in (self.heat[1], self.towers["score"][3]):
            nn.init.constant_(last.bias, HEAT_BIAS)

    def forward(self, bev: Tensor) -> QueryOutput:
        bev = self.shared(bev)
        heat = self.heat(bev)
        peak, label, cell = self.peaks(heat)
        cells, y = bev.flatten(2).mT, heat.shape[3]
        query = cells.gather(1, cell[..., None].expand(-1, -1, cells.shape[2]))
        query = query + self.class_vector(F.one_hot(label, self.classes).to(query.dtype))
        everywhere = torch.arange(cells.shape[1], device=bev.device).expand(len(bev), -1)
        place, cell_places = (torch.stack([i // y, i % y], -1) + 0.5 for i in (cell, everywhere))
        query = self.layer(query, cells, place, cell_places).mT
        found = {name: tower(query).mT.float() for name, tower in self.towers.items()}
        found["centre"] = found["centre"] + place
        return QueryOutput(heat, label, peak, found["score"], torch.cat([found[name] for name in CODE], -1))

    @torch.no_grad()
    def peaks(self, heat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Height, class and cell [B, Q] of the highest maxima; of 3x3 cells, but for the `SMALL` classes."""
        height = heat.float().sigmoid()
        highest = height.clone()
        highest[:, self.wide] = F.max_pool2d(height[:, self.wide], 3, 1, 1)
        height = (height * (height == highest)).flatten(1)
        peak, place = height.topk(min(self.cfg.queries, height.shape[1]))
        cells = heat.shape[2] * heat.shape[3]
        return peak, place // cells, place % cells

    @torch.no_grad()
    def assign(self, score: Tensor, code: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and boxes [k'] of the cheapest matching of one frame: logits [Q, C], codes [Q, 10], boxes [k, 9]."""
        p, found = score.sigmoid()[:, labels], coding.decode(code, self.grid)
        negative = -(1 - p + 1e-12).log() * 0.75 * p**2
        positive = -(p + 1e-12).log() * 0.25 * (1 - p) ** 2
        distance = torch.cdist(*(self.grid.normalised(one[:, :2]) / 2 for one in (found, boxes)), p=1)
        overlap = coding.overlaps(found, boxes, height=True)
        focal, near, common = COSTS
        cost = focal * (positive - negative) + near * distance - common * overlap
        # A diverged run is the trainer's to report, not the matcher's to fail on.
        rows, columns = linear_sum_assignment(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy())
        return torch.as_tensor(rows, device=score.device), torch.as_tensor(columns, device=score.device)

    def loss(
        self, output: QueryOutput, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`heat`, `score` and `box`; the last two are divided by the number of boxes on all ranks, at least 1."""
        heats, wanted, total, count = [], torch.zeros_like(output.score), output.code.sum() * 0, 0
        for row, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            inside = self.grid.index(box[:, :2])[1]
            box, label = box[inside], label[inside]
            heats.append(coding.heat_map(box, label, self.classes, self.grid))
            query, matched = self.assign(output.score[row], output.code[row], box, label)
            wanted[row, query, label[matched]] = 1
            total = total + coding.code_loss(output.code[row, query], coding.encode(box[matched], self.grid))
            count += len(query)
        shared = rank_share(count, 1).to(total.device)
        return {
            "heat": coding.gaussian_focal_loss(output.heat, torch.stack(heats)),
            "score": coding.focal_loss(output.score, wanted).sum() / shared,
            "box": BOX_WEIGHT * total / shared,
        }

    @torch.no_grad()
    def decode(self, output: QueryOutput) -> list[Detections]:
        """A query's box with its class and the product of its score and its peak, sorted; nothing is suppressed."""
        own = output.score.sigmoid().gather(2, output.label[..., None])[..., 0] * output.peak
        frames = []
        for scores, labels, code in zip(own, output.label, output.code, strict=True):
            order = scores.argsort(descending=True, stable=True)
            order = order[scores[order] > self.cfg.least_score]
            frames.append(Detections(coding.decode(code[order], self.grid), scores[order], labels[order]))
        return frames
