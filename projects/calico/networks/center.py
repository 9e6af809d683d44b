"""CenterPoint's head (Yin et al. 2021): boxes as peaks of a heat map.

Letters: B frames, C channels or classes of a task, k boxes, X, Y cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.networks.boxes import (
    CODE,
    Detections,
    circle_nms,
    code_loss,
    decode,
    encode,
    gaussian_focal_loss,
    heat_map,
    rotated_nms,
)
from projects.calico.networks.parts import conv_block, rank_share

NUSCENES_TASKS = (
    ("car",),
    ("truck", "construction_vehicle"),
    ("bus", "trailer"),
    ("barrier",),
    ("motorcycle", "bicycle"),
    ("pedestrian", "traffic_cone"),
)
CIRCLES = (4.0, 12.0, 10.0, 1.0, 0.85, 0.175)
"""Of `circle_nms` for these tasks, square metres."""
HEAT_BIAS = -2.19
"""logit(0.1): nearly all cells are background."""
BOX_WEIGHT = 0.25
_CANDIDATES = 500


class TaskOutput(NamedTuple):
    """One task's maps."""

    heat: Tensor
    """Logits [B, C, X, Y]."""
    code: Tensor
    """[B, 10, X, Y]: the code of a box whose centre lies in the cell, x and y from the cell's corner."""


class CenterHead(nn.Module):
    """A map [B, C, X, Y] over `grid` -> a TaskOutput for each group of classes.

    `classes` are the data set's in the order of its labels; `tasks` holds each of them once (empty: one task).
    """

    def __init__(
        self,
        inputs: int,
        grid: Grid,
        classes: Sequence[str],
        tasks: Sequence[Sequence[str]] = (),
        shared: int = 64,
        nms: Literal["rotated", "circle", "none"] = "rotated",
        circles: Sequence[float] = CIRCLES,
        overlap: float = 0.2,
        least_score: float = 0.1,
        most: int = 83,
        box_weight: float = BOX_WEIGHT,
    ) -> None:
        super().__init__()
        tasks = tasks or (tuple(classes),)
        named = [name for task in tasks for name in task]
        if sorted(named) != sorted(classes):
            raise ValueError(f"tasks name {named}, but the classes are {list(classes)}")
        if nms == "circle" and len(circles) != len(tasks):
            raise ValueError(f"{len(circles)} circles for {len(tasks)} tasks")
        self.grid, self.nms, self.circles, self.overlap = grid, nms, circles, overlap
        self.least_score, self.most, self.box_weight = least_score, most, box_weight
        self.members = [[list(classes).index(name) for name in task] for task in tasks]
        self.shared = conv_block(inputs, shared)
        self.tasks = nn.ModuleList()
        for task in tasks:
            sizes = {"heat": len(task), **CODE}
            towers = {
                name: nn.Sequential(conv_block(shared, shared), nn.Conv2d(shared, n, 3, padding=1))
                for name, n in sizes.items()
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
        code = encode(boxes, self.grid)
        code[:, :2] -= cell
        found = []
        for members in self.members:
            place = labels.new_tensor(members)
            mine = inside & torch.isin(labels, place)
            local = (labels[mine, None] == place).long().argmax(1)
            heat = heat_map(boxes[mine], local, len(members), self.grid)
            found.append((heat, cell[mine], code[mine]))
        return found

    def loss(
        self, outputs: Sequence[TaskOutput], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`heat` and `box`, each the sum over tasks; a task's box loss is divided by its boxes on all ranks."""
        frames = [self.targets(*pair) for pair in zip(boxes, labels, strict=True)]
        heat_loss, box_loss = [], []
        for output, targets in zip(outputs, zip(*frames, strict=True), strict=True):
            heat_loss.append(gaussian_focal_loss(output.heat, torch.stack([heat for heat, _, _ in targets])))
            total = output.code.sum() * 0
            for code, (_, cell, wanted) in zip(output.code, targets, strict=True):
                total = total + code_loss(code[:, cell[:, 0], cell[:, 1]].T, wanted)
            count = rank_share(sum(len(cell) for _, cell, _ in targets), extra=1e-4).to(total.device)
            box_loss.append(self.box_weight * total / count)
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
        scores, place = scores[scores > self.least_score], place[scores > self.least_score]
        label, cell = place // (x * y), place % (x * y)
        rows = code.flatten(1)[:, cell].T
        boxes = decode(
            torch.cat([rows[:, :2] + torch.stack([cell // y, cell % y], 1), rows[:, 2:]], 1), self.grid
        )
        if self.nms == "circle":
            kept = circle_nms(boxes, scores, self.circles[task], self.most)
        elif self.nms == "rotated":
            kept = rotated_nms(boxes, scores, self.overlap, after=self.most)
        else:
            kept = torch.arange(min(len(scores), self.most), device=scores.device)
        return Detections(boxes[kept], scores[kept], label.new_tensor(self.members[task])[label[kept]])
