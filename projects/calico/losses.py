"""CALICO's losses and those of its comparison arms, over the sampled points of one frame (docs/papers/calico.md, eq. 1-6).

Letters: n sampled points, D width of a projected vector, C channels of a BEV map, k boxes. `z` and `z2` [n, D] are
unit vectors of the same points in two views (or of two modalities), `region` int64 [n] is the region of each point,
-1 without one: such points are negatives of every anchor, never anchors, and never one region. Logits are float32
(float64 stays float64), whatever the precision of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vlmkd.losses.contrastive import clip_loss
from vlmkd.losses.precision import wide

Term = Literal["plrc", "rapc"]
Stats = dict[str, Tensor]
"""Detached scalars: `alignment`, the mean squared distance of a point to itself in the other view; `uniformity`, the log of
the mean of exp(-2 squared distance) between anchors (0: all are one, -4: spread out); `positive_rank`, the place of the
point itself among the points of other regions, mean over anchors (1 is best, ties count half); `chance`, the loss of equal
similarities, log of the number of keys; `skipped`, 1 for a frame that had too few regions."""


def plrc_loss(
    z: Tensor, z2: Tensor, region: Tensor, tau: float = 0.1, *, symmetric: bool = True
) -> tuple[Tensor, Stats]:
    """Point-level region contrast: all points of the anchor's region are positives, all points are keys (eq. 1).

    Mean over anchors; `symmetric`: and over both directions.
    """
    return _contrast("plrc", z, z2, region, None, tau, symmetric)


def rapc_loss(
    z: Tensor, z2: Tensor, region: Tensor, tau: float = 0.1, *, symmetric: bool = True
) -> tuple[Tensor, Stats]:
    """Region-aware point contrast (eq. 2): the same point is the positive, others of its region are left out."""
    return _contrast("rapc", z, z2, region, None, tau, symmetric)


def prc_loss(
    point: Sequence[Tensor] | None,
    scene: Sequence[Tensor] | None,
    region: Tensor,
    *,
    alpha: float = 0.5,
    tau: float = 0.1,
) -> tuple[Tensor, Stats]:
    """alpha PLRC + (1 - alpha) RAPC (eq. 3), each on the two views of its own projector.

    Arms are `alpha` 1 (plrc) and 0 (rapc), whose other pair may be None. A frame with fewer than two regions has the loss
    zero, and zero gradient. Stats are those of both terms, prefixed `plrc_` and `rapc_`, with their values.
    """
    total, stats = region.new_zeros((), dtype=torch.float32), {}
    region = _if_several(region)
    for name, views, share, loss in (
        ("plrc", point, alpha, plrc_loss),
        ("rapc", scene, 1 - alpha, rapc_loss),
    ):
        if share == 0:
            continue
        if views is None:
            raise ValueError(f"alpha is {alpha}, but the vectors of {name} are missing")
        value, found = loss(*views, region, tau)
        total = total + share * value
        stats |= {f"{name}_{key}": number for key, number in found.items()} | {name: value.detach()}
    return total, stats


def rad_loss(
    camera: Tensor,
    lidar: Tensor,
    region: Tensor,
    tau: float = 0.1,
    *,
    weight: Literal["region", "uniform"] | Tensor = "region",
    direction: Literal["camera_to_lidar", "symmetric"] = "camera_to_lidar",
) -> tuple[Tensor, Stats]:
    """Region-aware distillation (eq. 4): RAPC from the camera's vectors [n, D] to the frozen LiDAR's.

    `weight`: each region counts the same, whatever the number of its points; `uniform` each point; a tensor [n] of any
    other weights of points (`centre_weights`), divided by their sum. Zero with fewer than two regions.
    """
    region = _if_several(region)
    weights = weight if isinstance(weight, Tensor) else region_weights(region) if weight == "region" else None
    return _contrast("rapc", camera, lidar, region, weights, tau, direction == "symmetric")


def pointcontrast_loss(z: Tensor, z2: Tensor, tau: float = 0.1) -> tuple[Tensor, Stats]:
    """PointContrast: every point is an anchor, and every other point its negative (InfoNCE, both directions; eq. 6)."""
    return rapc_loss(z, z2, torch.arange(len(z), device=z.device), tau)


def box_clip_loss(boxes: Tensor, boxes2: Tensor) -> Tensor:
    """The prototype's arm: CLIP's loss, logit scale 10, over the cluster boxes of a whole batch, unit vectors [k, D] in two views."""
    return clip_loss(boxes, boxes2, 10.0) if len(boxes) > 1 else (boxes.sum() + boxes2.sum()) * 0


def feature_mse(student: Tensor, teacher: Tensor, region: Tensor | None = None) -> Tensor:
    """Plain feature distillation (eq. 5): squared error of BEV samples [n, C], mean over C and over points.

    With `region`, over the points that have one, each region counting the same. No gradient reaches the teacher.
    """
    rows = (wide(student) - wide(teacher).detach()).square().mean(-1)
    weights = torch.ones_like(rows) if region is None else region_weights(region).to(rows)
    return (rows * weights).sum() / weights.sum().clamp(min=1e-12)


def region_weights(region: Tensor) -> Tensor:
    """1 / (number of regions * points of the point's region), float32 [n]; 0 without a region. They sum to 1."""
    weights = torch.zeros(len(region), device=region.device)
    _, inverse, counts = region[region >= 0].unique(return_inverse=True, return_counts=True)
    weights[region >= 0] = 1.0 / (counts[inverse] * len(counts))
    return weights


def centre_weights(xy: Tensor, boxes: Tensor) -> Tensor:
    """Weights [n] of an arm that does need labels: exp(-(u^2 + v^2) / 2) of the nearest of `boxes` [k, 7+].

    u and v are the offsets of `xy` [n, 2] from the box's centre along and across it, in units of its half sides.
    """
    x, y = (xy[:, None] - boxes[None, :, :2]).unbind(-1)
    cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
    u, v = 2 * (x * cos + y * sin) / boxes[:, 3], 2 * (y * cos - x * sin) / boxes[:, 4]
    return (-0.5 * (u**2 + v**2)).exp().amax(1) if len(boxes) else xy.new_zeros(len(xy))


def joined_regions(frames: Sequence[Tensor]) -> Tensor:
    """Regions of the points of several frames one after another, all different: negatives then come from the whole batch."""
    total, parts = 0, []
    for region in frames:
        parts.append(torch.where(region >= 0, region + total, -1))
        total += int(region.max()) + 1 if len(region) else 0
    return torch.cat(parts)


def _if_several(region: Tensor) -> Tensor:
    """`region`, or none for any point where there are fewer than two."""
    return region if len(region[region >= 0].unique()) > 1 else torch.full_like(region, -1)


def _rows(term: Term, logits: Tensor, own: Tensor, same: Tensor) -> Tensor:
    """Loss of each of a anchors: logits [a, n], place of its own key [a, 1], which keys [a, n] are of its region."""
    if term == "plrc":
        return -logits.log_softmax(1).where(same, 0).sum(1) / same.sum(1)
    left_out = same.scatter(1, own, False)
    return logits.masked_fill(left_out, -math.inf).logsumexp(1) - logits.gather(1, own)[:, 0]


def _contrast(
    term: Term, z: Tensor, z2: Tensor, region: Tensor, weights: Tensor | None, tau: float, symmetric: bool
) -> tuple[Tensor, Stats]:
    """Mean over the anchors, by `weights` [n] of the points where they are given, and what to log."""
    if not len(z) == len(z2) == len(region):
        raise ValueError(
            f"{len(z)} and {len(z2)} vectors, but {len(region)} regions; all are of the same points"
        )
    z, z2 = wide(z), wide(z2)
    own = (region >= 0).nonzero()
    if not len(own):  # a graph of zeros
        total, zero = (z.sum() + z2.sum()) * 0, z.new_zeros(())
        none = dict.fromkeys(("alignment", "uniformity", "positive_rank", "chance"), zero)
        return total, none | {"skipped": zero + 1}
    anchors, same = own[:, 0], region[own] == region
    share = torch.ones_like(anchors, dtype=z.dtype) if weights is None else weights[anchors].to(z)
    share = share / share.sum().clamp(min=1e-12)
    total = (_rows(term, z[anchors] @ z2.T / tau, own, same) * share).sum()
    if symmetric:
        total = (total + (_rows(term, z2[anchors] @ z.T / tau, own, same) * share).sum()) / 2
    with torch.no_grad():
        first, second, foreign = z[anchors], z2[anchors], ~same
        similar, pairs = first @ z2.T, len(own) * (len(own) - 1)
        positive = similar.gather(1, own)
        rank = 1 + ((similar > positive) & foreign).sum(1) + 0.5 * ((similar == positive) & foreign).sum(1)
        spread = ((4 * (first @ first.T - 1)).exp().sum() - len(own)).clamp(min=1e-12)
        keys = 1 + foreign.sum(1) if term == "rapc" else torch.full_like(anchors, len(z))
        return total, {
            "alignment": (first - second).square().sum(1).mean(),
            "uniformity": (spread / max(pairs, 1)).log(),
            "positive_rank": rank.mean(),
            "chance": keys.to(z.dtype).log().mean(),
            "skipped": z.new_zeros(()),
        }
