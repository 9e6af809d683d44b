"""The heads: CenterPoint's (Yin et al. 2021) and TransFusion's (Bai et al. 2022) for boxes, and map segmentation."""

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
from projects.calico.networks.parts import conv_block, rank_share
from vlmkd.config import require

HEAT_BIAS = -2.19
"""logit(0.1): nearly all cells are background."""
BOX_WEIGHT = 0.25
_CANDIDATES, _MOST, _OVERLAP = 500, 83, 0.2
"""Of a task and frame (mmdetection3d): peaks that are looked at, boxes that are kept, overlap of rotated suppression."""


class TaskOutput(NamedTuple):
    """One task's maps: logits [B, C, X, Y], and the code [B, 10, X, Y] of a box whose centre lies in the cell.

    Its x and y are from the cell's corner.
    """

    heat: Tensor
    code: Tensor


class CenterHead(nn.Module):
    """Boxes as peaks of a heat map: a map [B, C, X, Y] over `grid` -> a TaskOutput for each group of `classes`."""

    def __init__(self, inputs: int, grid: Grid, classes: Sequence[str], cfg: HeadConfig) -> None:
        super().__init__()
        tasks = [task.split("+") for task in cfg.tasks] or [list(classes)]
        named, circles = sorted(name for task in tasks for name in task), cfg.circles
        told = f"has the classes {', '.join(named)}, but model.classes are {', '.join(classes)}"
        require(named == sorted(classes), "model.head.tasks", told)
        fits = cfg.nms != "circle" or len(circles) == len(tasks)
        require(fits, "model.head.circles", f"has {len(circles)} numbers for {len(tasks)} tasks")
        self.grid, self.cfg = grid, cfg
        self.members = [[list(classes).index(name) for name in task] for task in tasks]
        self.shared = conv_block(inputs, cfg.width)
        self.tasks = nn.ModuleList()
        for task in tasks:
            towers = {
                name: nn.Sequential(conv_block(cfg.width, cfg.width), nn.Conv2d(cfg.width, n, 3, padding=1))
                for name, n in {"heat": len(task), **CODE}.items()
            }
            nn.init.constant_(towers["heat"][1].bias, HEAT_BIAS)
            self.tasks.append(nn.ModuleDict(towers))

    def forward(self, bev: Tensor) -> list[TaskOutput]:
        bev = self.shared(bev)
        return [
            TaskOutput(task["heat"](bev), torch.cat([task[name](bev) for name in CODE], 1))
            for task in self.tasks
        ]

    def targets(self, boxes: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each task, of one frame's boxes [k, 9] whose centre the grid has: heat [C, X, Y], cells [k', 2], codes."""
        cell, inside = self.grid.index(boxes[:, :2])
        code = coding.encode(boxes, self.grid)
        code[:, :2] -= cell
        found = []
        for members in self.members:
            is_member = labels[:, None] == labels.new_tensor(members)
            mine = inside & is_member.any(1)
            local = is_member[mine].long().argmax(1)
            heat = coding.heat_map(boxes[mine], local, len(members), self.grid)
            found.append((heat, cell[mine], code[mine]))
        return found

    def loss(
        self, outputs: Sequence[TaskOutput], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`heat` and `box`, each the sum over tasks; a task's box loss is divided by its boxes on all ranks."""
        frames = [self.targets(*pair) for pair in zip(boxes, labels, strict=True)]
        heat_loss, box_loss = [], []
        for output, targets in zip(outputs, zip(*frames, strict=True), strict=True):
            heats = torch.stack([heat for heat, _, _ in targets])
            heat_loss.append(coding.gaussian_focal_loss(output.heat, heats))
            total = output.code.sum() * 0
            for code, (_, cell, wanted) in zip(output.code, targets, strict=True):
                total = total + coding.code_loss(code[:, cell[:, 0], cell[:, 1]].T, wanted)
            count = rank_share(sum(len(cell) for _, cell, _ in targets), extra=1e-4).to(total.device)
            box_loss.append(BOX_WEIGHT * total / count)
        return {"heat": torch.stack(heat_loss).sum(), "box": torch.stack(box_loss).sum()}

    @torch.no_grad()
    def decode(self, outputs: Sequence[TaskOutput]) -> list[Detections]:
        """The boxes of each frame, task by task after suppression, sorted by score."""
        frames = []
        for row in range(len(outputs[0].heat)):
            parts = [self._task(t, o.heat[row].float(), o.code[row].float()) for t, o in enumerate(outputs)]
            boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
            order = scores.argsort(descending=True, stable=True)
            frames.append(Detections(boxes[order], scores[order], labels[order]))
        return frames

    def _task(self, task: int, heat: Tensor, code: Tensor) -> Detections:
        x, y = heat.shape[1:]
        scores, place = heat.sigmoid().flatten().topk(min(_CANDIDATES, heat.numel()))
        scores, place = scores[scores > self.cfg.least_score], place[scores > self.cfg.least_score]
        label, cell = place // (x * y), place % (x * y)
        rows = code.flatten(1)[:, cell].T.clone()
        rows[:, :2] += torch.stack([cell // y, cell % y], 1)
        boxes = coding.decode(rows, self.grid)
        match self.cfg.nms:
            case "circle":
                kept = coding.circle_nms(boxes, scores, self.cfg.circles[task], _MOST)
            case "rotated":
                kept = coding.rotated_nms(boxes, scores, _OVERLAP, after=_MOST)
            case _:
                kept = torch.arange(min(len(scores), _MOST), device=scores.device)
        return Detections(boxes[kept], scores[kept], label.new_tensor(self.members[task])[label[kept]])


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
    """Queries from the peaks of a heat map, one decoder layer: a map [B, C, X, Y] over `grid` -> QueryOutput.

    The highest `queries` local maxima over all classes start with the feature of their cell and a vector of their class.
    """

    def __init__(self, inputs: int, grid: Grid, classes: Sequence[str], cfg: HeadConfig) -> None:
        super().__init__()
        fits = cfg.width % HEADS == 0
        require(fits, "model.head.width", f"is {cfg.width}; transfusion has {HEADS} heads, use a multiple")
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


class SegHead(nn.Module):
    """Convolutions at the label's cells: a map [B, C, X', Y'] over `grid` -> logits [B, M, X, Y] at the centres of the cells of `labels`."""

    def __init__(self, inputs: int, grid: Grid, classes: int, labels: Grid, width: int = 0) -> None:
        super().__init__()
        width = width or inputs
        # Bilinear between cell centres, zero beyond the map; not buffers, which a run in half precision would round.
        self.shares = [_shares(labels, grid, axis) for axis in range(2)]
        self.convs = nn.Sequential(
            conv_block(inputs, width), conv_block(width, width), nn.Conv2d(width, classes, 1)
        )

    def forward(self, bev: Tensor) -> Tensor:
        return self.convs(self.sampled(bev))

    def sampled(self, bev: Tensor) -> Tensor:
        """[B, C, X, Y]; the grids' axes are parallel, so that two matrix products do it."""
        given = bev.to(torch.promote_types(bev.dtype, torch.float32))
        self.shares = [shares.to(given.device) for shares in self.shares]  # once
        x, y = (shares.to(given.dtype) for shares in self.shares)
        rows = y @ given.permute(0, 2, 3, 1)
        found = (x @ rows.flatten(2)).unflatten(2, (len(y), -1))
        return found.permute(0, 3, 1, 2).to(bev.dtype)

    def loss(self, logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """`map`: focal loss, gamma 2 without alpha, mean over all logits. `masks` [B, M, X, Y] of 0 and 1."""
        return {"map": coding.focal_loss(logits, masks, alpha=None).mean()}

    @torch.no_grad()
    def decode(self, logits: Tensor) -> Tensor:
        """Probabilities [B, M, X, Y]."""
        return logits.float().sigmoid()


def _shares(labels: Grid, grid: Grid, axis: int) -> Tensor:
    """What each cell of `grid` has in a value at each cell's centre of `labels` [X, X'], along one axis."""
    centre = labels.min[axis] + (torch.arange(labels.shape[axis]) + 0.5).double() * labels.cell[axis]
    place = (centre - grid.min[axis]) / grid.cell[axis] - 0.5
    return (1 - (place[:, None] - torch.arange(grid.shape[axis])).abs()).clamp(min=0)
