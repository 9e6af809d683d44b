"""CALICO's losses and those of its comparison arms, over the sampled points of one frame (docs/papers/calico.md, eq. 1-6).

Letters: n sampled points, D width of a projected vector, C channels of a BEV map, k boxes. `z` and `z2` [n, D] are
unit vectors of the same points in two views (or of two modalities), `region` int64 [n] is the region of each point,
-1 without one: such points are negatives of every anchor, never anchors, and never one region. All losses of points
return a scalar and its `Stats`; logits are float32 (float64 stays float64), whatever the precision of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmkd.losses.contrastive import clip_loss
from vlmkd.losses.precision import wide

Stats = dict[str, Tensor]
"""Detached scalars: `alignment`, the mean squared distance of a point to itself in the other view; `uniformity`, the log of
the mean of exp(-2 squared distance) between anchors (0: all are one, -4: spread out); `positive_rank`, the place of the
point itself among the points of other regions, mean over anchors (1 is best, ties count half); `chance`, the loss of equal
similarities, log of the number of keys; `skipped`, 1 for a frame that had too few regions."""
Rows = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
BOX_LOGIT_SCALE = 10.0
"""Of the box arm (the author's prototype); the same number gives the temperature 0.1 of the others."""


def plrc_loss(
    z: Tensor, z2: Tensor, region: Tensor, tau: float = 0.1, *, symmetric: bool = True, chunk: int = 0
) -> tuple[Tensor, Stats]:
    """Point-level region contrast: all points of the anchor's region are positives, all points are keys (eq. 1).

    Mean over anchors. `symmetric` averages both directions; `chunk` anchors at a time (0: all) bound the memory, their
    logits are computed again in the backward pass.
    """
    return _contrast(_plrc_rows, z, z2, region, None, tau, symmetric, chunk)


def rapc_loss(
    z: Tensor, z2: Tensor, region: Tensor, tau: float = 0.1, *, symmetric: bool = True, chunk: int = 0
) -> tuple[Tensor, Stats]:
    """Region-aware point contrast (eq. 2): the same point is the positive, others of its region are left out."""
    return _contrast(_rapc_rows, z, z2, region, None, tau, symmetric, chunk)


def prc_loss(
    point: tuple[Tensor, Tensor] | None,
    scene: tuple[Tensor, Tensor] | None,
    region: Tensor,
    *,
    alpha: float = 0.5,
    tau: float = 0.1,
    symmetric: bool = True,
    chunk: int = 0,
) -> tuple[Tensor, Stats]:
    """alpha PLRC + (1 - alpha) RAPC (eq. 3), each on the two views of its own projector.

    Arms are `alpha` 1 (plrc) and 0 (rapc), whose other pair may be None. A frame with fewer than two regions has the loss
    zero, and zero gradient. Stats are those of both terms, prefixed `plrc_` and `rapc_`, with their values.
    """
    shares = {"plrc": (point, alpha, plrc_loss), "rapc": (scene, 1 - alpha, rapc_loss)}
    total, stats = region.new_zeros((), dtype=torch.float32), {}
    for name, (views, share, loss) in shares.items():
        if share == 0:
            continue
        if views is None:
            raise ValueError(f"alpha is {alpha}, but the vectors of {name} are missing")
        kept = region if regions_in(region) > 1 else torch.full_like(region, -1)
        value, found = loss(*views, kept, tau, symmetric=symmetric, chunk=chunk)
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
    chunk: int = 0,
) -> tuple[Tensor, Stats]:
    """Region-aware distillation (eq. 4): RAPC from the camera's vectors [n, D] to the frozen LiDAR's.

    `weight`: each region counts the same, whatever the number of its points; `uniform` each point; a tensor [n] of any
    other weights of points (`centre_weights`), divided by their sum. Zero with fewer than two regions.
    """
    if regions_in(region) < 2:
        region = torch.full_like(region, -1)
    weights = weight if isinstance(weight, Tensor) else region_weights(region) if weight == "region" else None
    return _contrast(_rapc_rows, camera, lidar, region, weights, tau, direction == "symmetric", chunk)


def pointcontrast_loss(z: Tensor, z2: Tensor, tau: float = 0.1, *, chunk: int = 0) -> tuple[Tensor, Stats]:
    """PointContrast: every point is an anchor, and every other point its negative (InfoNCE, both directions; eq. 6)."""
    return rapc_loss(z, z2, torch.arange(len(z), device=z.device), tau, chunk=chunk)


def box_clip_loss(boxes: Tensor, boxes2: Tensor, logit_scale: float = BOX_LOGIT_SCALE) -> Tensor:
    """The prototype's arm: CLIP's loss over the cluster boxes of a whole batch, unit vectors [k, D] in two views."""
    if len(boxes) < 2:
        return (boxes.sum() + boxes2.sum()) * 0
    return clip_loss(boxes, boxes2, logit_scale)


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
    rich = region >= 0
    if rich.any():
        _, inverse, counts = region[rich].unique(return_inverse=True, return_counts=True)
        weights[rich] = 1.0 / (counts[inverse] * len(counts))
    return weights


def centre_weights(xy: Tensor, boxes: Tensor) -> Tensor:
    """Weights [n] of an arm that does need labels: exp(-(u^2 + v^2) / 2) of the nearest of `boxes` [k, 7+].

    u and v are the offsets of `xy` [n, 2] from the box's centre along and across it, in units of its half sides.
    """
    offset = xy[:, None] - boxes[None, :, :2]
    cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
    along, across = offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin
    gauss = (-0.5 * ((2 * along / boxes[:, 3]) ** 2 + (2 * across / boxes[:, 4]) ** 2)).exp()
    return gauss.amax(1) if len(boxes) else xy.new_zeros(len(xy))


def joined_regions(frames: Sequence[Tensor]) -> Tensor:
    """Regions of the points of several frames one after another, all different: negatives then come from the whole batch."""
    total, parts = 0, []
    for region in frames:
        parts.append(torch.where(region >= 0, region + total, -1))
        total += int(region.max()) + 1 if len(region) else 0
    return torch.cat(parts)


def regions_in(region: Tensor) -> int:
    """How many regions the points [n] belong to."""
    return len(region[region >= 0].unique())


def _plrc_rows(anchors: Tensor, keys: Tensor, index: Tensor, region: Tensor, tau: float) -> Tensor:
    positive = region[index][:, None] == region
    log_p = (anchors @ keys.T / tau).log_softmax(1)
    return -log_p.where(positive, 0).sum(1) / positive.sum(1)


def _rapc_rows(anchors: Tensor, keys: Tensor, index: Tensor, region: Tensor, tau: float) -> Tensor:
    left_out = region[index][:, None] == region
    left_out.scatter_(1, index[:, None], False)
    logits = anchors @ keys.T / tau
    return logits.masked_fill(left_out, -math.inf).logsumexp(1) - logits.gather(1, index[:, None])[:, 0]


def _contrast(
    rows: Rows,
    z: Tensor,
    z2: Tensor,
    region: Tensor,
    weights: Tensor | None,
    tau: float,
    symmetric: bool,
    chunk: int,
) -> tuple[Tensor, Stats]:
    """Weighted mean of `rows` over the anchors, and what to log; a graph of zeros without anchors."""
    if not len(z) == len(z2) == len(region):
        raise ValueError(
            f"{len(z)} and {len(z2)} vectors, but {len(region)} regions; all are of the same points"
        )
    z, z2 = wide(z), wide(z2)
    anchors = (region >= 0).nonzero()[:, 0]
    if not len(anchors):
        zero = (z.sum() + z2.sum()) * 0
        return zero, _none(zero.detach())
    share = torch.ones_like(anchors, dtype=z.dtype) if weights is None else weights[anchors].to(z)
    share = share / share.sum().clamp(min=1e-12)
    total = _one_way(rows, z, z2, anchors, region, share, tau, chunk)
    if symmetric:
        total = (total + _one_way(rows, z2, z, anchors, region, share, tau, chunk)) / 2
    return total, _stats(rows, z.detach(), z2.detach(), anchors, region, chunk)


def _one_way(
    rows: Rows,
    z: Tensor,
    keys: Tensor,
    anchors: Tensor,
    region: Tensor,
    share: Tensor,
    tau: float,
    chunk: int,
) -> Tensor:
    if not 0 < chunk < len(anchors):
        return (rows(z[anchors], keys, anchors, region, tau) * share).sum()
    parts = [
        checkpoint(rows, z[index], keys, index, region, tau, use_reentrant=False, preserve_rng_state=False)
        for index in anchors.split(chunk)
    ]
    return (torch.cat(parts) * share).sum()


def _none(zero: Tensor) -> Stats:
    return dict.fromkeys(("alignment", "uniformity", "positive_rank", "chance"), zero) | {"skipped": zero + 1}


@torch.no_grad()
def _stats(rows: Rows, z: Tensor, z2: Tensor, anchors: Tensor, region: Tensor, chunk: int) -> Stats:
    ranks, keys, near = [], [], []
    for index in anchors.split(chunk or len(anchors)):
        similar, foreign = z[index] @ z2.T, region[index][:, None] != region
        own = similar.gather(1, index[:, None])
        ranks.append(1 + ((similar > own) & foreign).sum(1) + 0.5 * ((similar == own) & foreign).sum(1))
        keys.append(1 + foreign.sum(1))
        near.append((4 * (z[index] @ z[anchors].T - 1)).exp().sum())
    pairs = len(anchors) * (len(anchors) - 1)
    spread = (sum(near, near[0] * 0) - len(anchors)).clamp(min=1e-12)
    counted = torch.cat(keys) if rows is _rapc_rows else torch.full_like(anchors, len(z))
    return {
        "alignment": (z[anchors] - z2[anchors]).square().sum(1).mean(),
        "uniformity": (spread / max(pairs, 1)).log(),
        "positive_rank": torch.cat(ranks).mean(),
        "chance": counted.to(z.dtype).log().mean(),
        "skipped": z.new_zeros(()),
    }
