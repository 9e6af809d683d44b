"""Inference with two heads: the mixed probabilities, and the search of their weight and temperature on labelled images.

Letters: N images, C classes, A values of alpha, T values of beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmkd.losses.precision import wide

ALPHAS = tuple(step / 20 for step in range(21))
"""0, 0.05, ..., 1: the weight of the cross-entropy head."""
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
"""The temperature of the distillation head."""
_ELEMENTS = 1 << 25  # probabilities held at once by the search


@dataclass(frozen=True)
class Mixture:
    """How the two heads' answers are mixed: p = alpha softmax(ce) + (1 - alpha) softmax(kd / beta).

    docs/papers/dho.md, eq. 13.
    """

    alpha: float
    beta: float
    accuracy: float = 0.0
    """Share of right answers on the validation images; 0 when nothing was validated."""


def mix(ce_logits: Tensor, kd_logits: Tensor, alpha: float | Tensor, beta: float) -> Tensor:
    """Mixed probabilities [N, C] of logits [N, C]; alpha is a number or [N, 1]."""
    return alpha * wide(ce_logits).softmax(-1) + (1 - alpha) * (wide(kd_logits) / beta).softmax(-1)


def entropy_alpha(ce_logits: Tensor, kd_logits: Tensor) -> Tensor:
    """alpha [N, 1] for each image from how sure the heads are: e^-H(ce) / (e^-H(ce) + e^-H(kd)), H in nats.

    The paper tried it and found no gain over a fixed alpha (docs/papers/dho.md, eq. 14).
    """
    probabilities = torch.stack([wide(ce_logits), wide(kd_logits)]).softmax(-1)
    sureness = torch.special.xlogy(probabilities, probabilities).sum(-1)  # 0 log 0 is 0
    return sureness.softmax(0)[0].unsqueeze(1)


@torch.no_grad()
def search(ce_logits: Tensor, kd_logits: Tensor, labels: Tensor) -> Mixture:
    """The mixture with the most right answers on logits [N, C] with labels [N].

    Of equal ones the first stays, BETAS outside and ALPHAS inside; without any right answer alpha 0 and beta 1.
    """
    right = right_counts(ce_logits, kd_logits, labels, ALPHAS, BETAS).flatten()
    best = int(right.max())
    if best == 0:
        return Mixture(0.0, 1.0)
    beta, alpha = divmod(int((right == best).nonzero()[0]), len(ALPHAS))
    return Mixture(ALPHAS[alpha], BETAS[beta], best / len(labels))


@torch.no_grad()
def right_counts(
    ce_logits: Tensor, kd_logits: Tensor, labels: Tensor, alphas: Sequence[float], betas: Sequence[float]
) -> Tensor:
    """Right answers of every mixture, int64 [T, A] on the CPU."""
    right = torch.zeros(len(betas), len(alphas), dtype=torch.int64)
    rows = max(1, _ELEMENTS // (len(alphas) * ce_logits.shape[1]))
    for ce, kd, target in zip(ce_logits.split(rows), kd_logits.split(rows), labels.split(rows), strict=True):
        weights = wide(ce).new_tensor(alphas).view(-1, 1, 1)
        for index, beta in enumerate(betas):
            right[index] += (mix(ce, kd, weights, beta).argmax(-1) == target).sum(1).cpu()
    return right
