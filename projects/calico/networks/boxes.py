"""What the detection heads share: the code of a box, heat maps, overlaps of turned boxes, suppression, losses.

Boxes are (x, y, z, l, w, h, yaw, vx, vy); a velocity that is not known is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.calico.geometry import Grid, box_corners
from projects.calico.networks.parts import rank_share

CODE = {"centre": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
"""Numbers of a box's code, in their order: x and y in cells, z in metres, log of l, w, h, sine and cosine, velocity."""
CODE_WEIGHTS = (1.0,) * 8 + (0.2, 0.2)
"""Of the L1 loss (CenterPoint, TransFusion): a velocity counts a fifth."""


class Detections(NamedTuple):
    """Boxes [k, 9] of one frame, the highest scores [k] first; labels [k] are places in the head's `classes`."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def encode(boxes: Tensor, grid: Grid) -> Tensor:
    """Code [..., 10] of boxes [..., 7 or 9]; without velocities they are NaN."""
    centre = (boxes[..., :2] - boxes.new_tensor(grid.min[:2])) / boxes.new_tensor(grid.cell[:2])
    yaw = boxes[..., 6:7]
    velocity = boxes[..., 7:9] if boxes.shape[-1] > 7 else torch.full_like(boxes[..., :2], torch.nan)
    return torch.cat([centre, boxes[..., 2:3], boxes[..., 3:6].log(), yaw.sin(), yaw.cos(), velocity], -1)


def decode(code: Tensor, grid: Grid) -> Tensor:
    """Boxes [..., 9] of codes [..., 10], yaw in (-pi, pi]."""
    centre = code[..., :2] * code.new_tensor(grid.cell[:2]) + code.new_tensor(grid.min[:2])
    yaw = torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([centre, code[..., 2:3], code[..., 3:6].exp(), yaw, code[..., 8:10]], -1)


def code_loss(code: Tensor, target: Tensor) -> Tensor:
    """Weighted L1 distance, summed over codes [k, 10] and their numbers; a target that is NaN counts nothing."""
    known = target.isfinite()
    distance = (code.float() - target.where(known, 0.0)).abs() * known
    return (distance * distance.new_tensor(CODE_WEIGHTS)).sum()


def gaussian_radius(length: Tensor, width: Tensor) -> Tensor:
    """How far, in cells, a corner may move until the boxes' overlap is 0.1, as the references compute it.

    Their quadratic formula does not divide by the leading coefficient, a slip that is kept for comparison.
    """
    overlap = 0.1
    total, area = length + width, length * width
    first = (total**2 - 4 * area * (1 - overlap) / (1 + overlap)).sqrt()
    second = (4 * total**2 - 16 * (1 - overlap) * area).sqrt()
    third = (4 * overlap**2 * total**2 - 16 * overlap * (overlap - 1) * area).sqrt()
    return torch.stack([total + first, 2 * total + second, third - 2 * overlap * total]).amin(0) / 2


def heat_map(boxes: Tensor, labels: Tensor, classes: int, grid: Grid) -> Tensor:
    """[C, X, Y]: 1 at the cell of a box's centre and a Gaussian around it, of several the highest.

    `boxes` [k, 7+] lie in the grid; the radius is at least 2 cells, and sigma a sixth of the diameter.
    """
    x, y = grid.shape[:2]
    radius = gaussian_radius(boxes[:, 3] / grid.cell[0], boxes[:, 4] / grid.cell[1]).floor().clamp(min=2)
    cell, _ = grid.index(boxes[:, :2])

    def along(size: int, axis: int) -> Tensor:
        step = torch.arange(size, device=boxes.device) - cell[:, axis, None]
        bell = (-step.square() / (2 * ((2 * radius + 1) / 6).square())[:, None]).exp()
        return bell * (step.abs() <= radius[:, None])

    bells = (along(x, 0)[:, :, None] * along(y, 1)[:, None]).flatten(1)
    heat = boxes.new_zeros(classes, x * y).scatter_reduce(0, labels[:, None].expand_as(bells), bells, "amax")
    return heat.reshape(classes, x, y)


def gaussian_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CenterNet's loss, divided by the number of ones in the targets of all ranks (at least 1). Both of one shape."""
    logits = logits.float()
    p, hit = logits.sigmoid(), target == 1
    seen, missed = F.logsigmoid(logits) * (1 - p) ** 2, F.logsigmoid(-logits) * p**2 * (1 - target) ** 4
    return -torch.where(hit, seen, missed).sum() / rank_share(hit.sum(), 1)


def focal_loss(logits: Tensor, target: Tensor, alpha: float | None = 0.25) -> Tensor:
    """Sigmoid focal loss of every logit (Lin et al. 2017), gamma 2, not reduced; `alpha` None weighs both sides the same."""
    logits, target = logits.float(), target.float()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = loss * (1 - (-loss).exp()) ** 2
    return loss if alpha is None else loss * (alpha * target + (1 - alpha) * (1 - target))


def overlap_area(first: Tensor, second: Tensor) -> Tensor:
    """Area [p] that the footprints of boxes [p, 7+] have in common with those of the others, float64."""
    a, b = (box_corners(boxes.double())[:, :4, :2] for boxes in (first, second))
    middle = a.mean(1, keepdim=True)
    a, b = a - middle, b - middle
    edge_a, edge_b = a.roll(-1, 1) - a, b.roll(-1, 1) - b
    # Where edge i of a meets edge j of b: a_i + s edge_a_i = b_j + t edge_b_j.
    away = b[:, None] - a[:, :, None]
    slope = _cross(edge_a[:, :, None], edge_b[:, None])
    parallel = slope.abs() < 1e-12
    slope = torch.where(parallel, 1.0, slope)
    s, t = _cross(away, edge_b[:, None]) / slope, _cross(away, edge_a[:, :, None]) / slope
    meet = (a[:, :, None] + s[..., None] * edge_a[:, :, None]).flatten(1, 2)
    met = (~parallel & (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)).flatten(1)
    points = torch.cat([meet, a, b], 1)
    valid = torch.cat([met, _inside(a, b, edge_b), _inside(b, a, edge_a)], 1)
    centre = (points * valid[..., None]).sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    points = points - centre
    angle = torch.atan2(points[..., 1], points[..., 0]).masked_fill(~valid, 9.0)
    order = angle.argsort(1)
    points = points.gather(1, order[..., None].expand_as(points))
    # Points that do not belong to the polygon stand at its first corner, and add nothing.
    points = torch.where(valid.gather(1, order)[..., None], points, points[:, :1])
    area = _cross(points, points.roll(-1, 1)).sum(1).abs() / 2
    return area * (valid.sum(1) > 2)


def overlaps(first: Tensor, second: Tensor, height: bool = False) -> Tensor:
    """Intersection over union [k, m] of boxes [k, 7+] and [m, 7+]: of footprints, or of volumes with `height`."""
    reach = (first[:, None, 3:5].norm(dim=-1) + second[None, :, 3:5].norm(dim=-1)) / 2
    near = ((first[:, None, :2] - second[None, :, :2]).norm(dim=-1) < reach).nonzero()
    a, b = first[near[:, 0]].double(), second[near[:, 1]].double()
    common, sizes = overlap_area(a, b), 5
    if height:
        top = torch.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
        low = torch.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
        common, sizes = common * (top - low).clamp(min=0), 6
    union = a[:, 3:sizes].prod(1) + b[:, 3:sizes].prod(1) - common
    found = first.new_zeros(len(first), len(second))
    found[near[:, 0], near[:, 1]] = (common / union.clamp(min=1e-12)).to(found)
    return found


def rotated_nms(boxes: Tensor, scores: Tensor, overlap: float, before: int = 1000, after: int = 83) -> Tensor:
    """Rows, highest score first, of those of the `before` best that no better one overlaps by more than `overlap`."""
    order = scores.argsort(descending=True, stable=True)[:before]
    return order[_greedy(overlaps(boxes[order], boxes[order]) > overlap)][:after]


def circle_nms(boxes: Tensor, scores: Tensor, squared: float, after: int = 83) -> Tensor:
    """As `rotated_nms` by the squared distance of centres, in square metres (CenterPoint calls it a radius)."""
    order = scores.argsort(descending=True, stable=True)
    xy = boxes[order, :2]
    return order[_greedy((xy[:, None] - xy).square().sum(-1) <= squared)][:after]


def _greedy(near: Tensor) -> Tensor:
    """Rows of the symmetric `near` [k, k] in their order, without those near to an earlier one that is kept."""
    rows, kept = near.cpu().numpy(), []
    for row, others in enumerate(rows):
        if not others[kept].any():
            kept.append(row)
    return torch.tensor(kept, dtype=torch.long, device=near.device)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _inside(points: Tensor, corners: Tensor, edges: Tensor) -> Tensor:
    """Which points [p, 4, 2] lie in the quadrangles [p, 4, 2], borders included; corners go clockwise."""
    side = _cross(edges[:, None], points[:, :, None] - corners[:, None])
    return (side <= 1e-9).all(2)
