"""PromptSRC's four terms, in fp32 (float64 stays); PromptKD's one is vlmkd.losses.logits.kl_divergence.

Letters: B images, C classes, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.promptkd.config import PromptKDOptimConfig
from vlmkd.losses.logits import kl_divergence
from vlmkd.losses.precision import wide
from vlmkd.train.optim import half_cosine


def cosine_logits(image_embeds: Tensor, class_vectors: Tensor, scale: Tensor | float) -> Tensor:
    """scale times the products of unit vectors [B,D] and [C,D]: logits [B,C]."""
    with torch.autocast(image_embeds.device.type, enabled=False):
        return scale * wide(image_embeds) @ wide(class_vectors).T


def promptsrc_terms(
    image_embeds: Tensor,
    class_vectors: Tensor,
    frozen_image_embeds: Tensor,
    frozen_class_vectors: Tensor,
    labels: Tensor,
    scale: Tensor | float,
) -> dict[str, Tensor]:
    """The terms of the prompted teacher's loss, without their weights (docs/papers/promptkd.md, eq. 4-9).

    Of unit vectors [B,D] and [C,D] by the prompted and by the frozen towers, labels int64 [B], and the cosines' factor:
    `ce`, cross-entropy of the prompted logits, mean over B; `text` and `image`, mean absolute difference of prompted and
    frozen vectors, over C x D and B x D; `logit`, KL(frozen || prompted) over classes, divided by B x C.
    """
    logits = cosine_logits(image_embeds, class_vectors, scale)
    frozen_logits = cosine_logits(frozen_image_embeds, frozen_class_vectors, scale)
    return {
        "ce": F.cross_entropy(logits, labels),
        "text": F.l1_loss(wide(class_vectors), wide(frozen_class_vectors)),
        "image": F.l1_loss(wide(image_embeds), wide(frozen_image_embeds)),
        "logit": kl_divergence(logits, frozen_logits, reduction="element"),
    }


def epoch_cosine(epoch: int, epochs: int, optim: PromptKDOptimConfig) -> float:
    """Share of the peak rate in `epoch` of `epochs`: `first_epoch_lr`, then (1 + cos(pi (epoch - 1) / epochs)) / 2."""
    return half_cosine((epoch - 1) / epochs) if epoch else optim.first_epoch_lr / optim.lr
