"""The losses of both stages as pure functions: PromptSRC's four terms and PromptKD's KL.

Letters: B images, C classes, D embedding width. All in fp32 (float64 stays), whatever the towers computed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.losses.logits import kl_divergence
from vlmkd.losses.precision import wide
from vlmkd.train.optim import half_cosine

if TYPE_CHECKING:
    from projects.promptkd.config import PromptKDOptimConfig


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

    - `ce`: cross-entropy of the prompted logits, mean over B;
    - `text`: mean over C x D of |class vectors - frozen class vectors|;
    - `image`: mean over B x D of |image embeddings - frozen image embeddings|;
    - `logit`: KL(frozen || prompted) of the softmax over classes, divided by B x C.

    Args:
        image_embeds: [B,D] unit vectors of the prompted image tower.
        class_vectors: [C,D] unit vectors of the prompted text tower.
        frozen_image_embeds: the same images through the frozen tower.
        frozen_class_vectors: the same classes through the frozen text tower, a mean over templates.
        labels: int64 [B].
        scale: factor of the cosines.
    """
    logits = cosine_logits(image_embeds, class_vectors, scale)
    frozen_logits = cosine_logits(frozen_image_embeds, frozen_class_vectors, scale)
    return {
        "ce": F.cross_entropy(logits, labels),
        "text": F.l1_loss(wide(class_vectors), wide(frozen_class_vectors)),
        "image": F.l1_loss(wide(image_embeds), wide(frozen_image_embeds)),
        "logit": kl_divergence(logits, frozen_logits, reduction="element"),
    }


def promptkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: Literal["element", "batch"] = "element",
    mask: Tensor | None = None,
) -> Tensor:
    """T^2 KL(teacher || student) of logits [B,C], without its weight (docs/papers/promptkd.md, eq. 13).

    `element` divides by B x C, as the released code does, whose weights 200 and 1000 belong to it; `batch` divides by
    B, and its equal weight is C times smaller (eq. 14). Only images whose `mask` [B] is true count.
    """
    return kl_divergence(student_logits, teacher_logits, temperature, reduction=reduction, mask=mask)


def epoch_cosine(epoch: int, epochs: int, optim: PromptKDOptimConfig) -> float:
    """Share of the peak rate in `epoch` of `epochs`: `first_epoch_lr`, then (1 + cos(pi (epoch - 1) / epochs)) / 2."""
    return half_cosine((epoch - 1) / epochs) if epoch else optim.first_epoch_lr / optim.lr
