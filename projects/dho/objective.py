"""Dual-head distillation: cross entropy of the labelled rows, divergence from the teacher on all rows, and their sum.

Equations: docs/papers/dho.md, eq. 2-7.

Letters: b labelled rows, B all rows (labelled first), C classes, D width of the teacher's embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.losses.logits import kl_divergence
from vlmkd.losses.precision import wide

Method = Literal["dho", "ce", "kd", "ce_kd", "pcgrad", "kd_feature", "ce_kd_feature"]
Balance = Literal["convex", "sum"]

TERMS: dict[Method, tuple[str, ...]] = {
    "dho": ("ce", "kd"),
    "ce": ("ce",),
    "kd": ("kd",),
    "ce_kd": ("ce", "kd"),
    "pcgrad": ("ce", "kd"),
    "kd_feature": ("feature",),
    "ce_kd_feature": ("ce", "feature"),
}
"""What a method learns from: labels, the teacher's class probabilities, its image embeddings."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L_CE of logits [b, C] with labels int64 [b], mean over rows."""
    return F.cross_entropy(wide(logits), labels)


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, labelled: int, temperature: float = 2.0
) -> Tensor:
    """L_KD of logits [B, C]: temperature^2 KL(teacher || student), mean over the labelled plus mean over the other rows."""
    return _per_part(
        lambda rows: kl_divergence(student_logits[rows], teacher_logits[rows], temperature),
        labelled,
        len(student_logits),
    )


def feature_distillation(student_embeds: Tensor, teacher_embeds: Tensor, labelled: int) -> Tensor:
    """Squared distance of unit vectors [B, D], mean over the labelled plus mean over the other rows."""
    distances = (wide(student_embeds) - wide(teacher_embeds).detach()).square().sum(-1)
    return _per_part(lambda rows: distances[rows].mean(), labelled, len(distances))


def _per_part(loss: Callable[[slice], Tensor], labelled: int, rows: int) -> Tensor:
    """The sum over the parts that have rows, of which the caller gives some."""
    parts = [part for part in (slice(0, labelled), slice(labelled, rows)) if part.start < part.stop]
    return torch.stack([loss(part) for part in parts]).sum()


def term_weights(method: Method, ce_share: float, balance: Balance) -> dict[str, float]:
    """The weight of each term: ce_share and 1 - ce_share (paper, few-shot scripts), or 1 with `sum` or one term alone."""
    names = TERMS[method]
    if len(names) == 1 or balance == "sum":
        return dict.fromkeys(names, 1.0)
    return {name: ce_share if name == "ce" else 1.0 - ce_share for name in names}


def surgery_weights(dot: Tensor, first_square: Tensor, second_square: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (a, b) with which a g1 + b g2 is PCGrad's sum of two gradients (Yu et al. 2020).

    Where g1.g2 < 0 each gradient loses its part along the other; the sum is g1 (1 - g1.g2 / |g1|^2) + g2 (1 - g1.g2 / |g2|^2).
    """
    conflict = dot.clamp_max(0.0)

    def factor(square: Tensor) -> Tensor:
        return torch.where(square > 0, 1 - conflict / square.clamp_min(torch.finfo(square.dtype).tiny), 1.0)

    return factor(first_square), factor(second_square)
