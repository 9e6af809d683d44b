"""CenterPoint's head (Yin et al. 2021): boxes as peaks of a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
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
    """A map [B, C, X, Y] over `grid` -> a TaskOutput for each group of `classes`, which are in the order of their labels."""

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
