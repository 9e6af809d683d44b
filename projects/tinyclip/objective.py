"""TinyCLIP's loss as a pure function: affinity mimicking, and the terms that CLIP-KD adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projects.tinyclip.config import LossConfig
from vlmkd.losses.affinity import PairEmbeds, affinity_loss
from vlmkd.losses.contrastive import clip_loss, pair_loss, sigmoid_loss
from vlmkd.losses.precision import wide


@dataclass
class StudentEmbeds:
    """The student's unit embeddings of this rank [b, D] and, with several ranks, of all [B, D]."""

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor | float
    logit_bias: Tensor | float
    all_image_embeds: Tensor | None = None
    all_text_embeds: Tensor | None = None
    projected: Sequence[tuple[Tensor, Tensor]] = ()
    """Image and text embeddings [b, D'] in each teacher's space (the plain ones when the widths agree)."""
    interactive_scale: Tensor | float = 1.0
    """Scale of the interactive contrastive logits."""


def objective(
    student: StudentEmbeds, teachers: Sequence[PairEmbeds], loss: LossConfig, offset: int = 0
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
    """Terms, their weights, and metrics; terms whose weight is 0 are not computed.

    L = affinity * L_aff + contrastive * L_clip + feature * FD + interactive * ICL, docs/papers/tinyclip.md,
    eq. 5, 8, 11 and 12; FD and ICL are means over the teachers. `offset`: place of the first local row among the gathered.
    """
    terms: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    columns = {"all_image_embeds": student.all_image_embeds, "all_text_embeds": student.all_text_embeds}
    pair = (student.image_embeds, student.text_embeds)
    if loss.affinity:
        affinity = affinity_loss(
            *pair,
            student.logit_scale,
            teachers,
            **columns,
            reduction=loss.affinity_reduction,
            chunk=loss.affinity_chunk,
        )
        terms["affinity"] = affinity.ce
        metrics["affinity_kl"] = affinity.kl.detach()
        metrics["affinity_kl_image_to_text"], metrics["affinity_kl_text_to_image"] = affinity.directions
    if loss.contrastive and loss.contrastive_kind == "softmax":
        terms["contrastive"] = clip_loss(*pair, student.logit_scale, **columns, offset=offset)
    elif loss.contrastive:
        terms["contrastive"] = sigmoid_loss(
            *pair,
            student.logit_scale,
            student.logit_bias,
            all_text_embeds=student.all_text_embeds,
            offset=offset,
        )
    if loss.feature:
        parts = [
            feature_distillation_loss(mine[0], teacher.image_embeds)
            + feature_distillation_loss(mine[1], teacher.text_embeds)
            for mine, teacher in zip(student.projected, teachers, strict=True)
        ]
        terms["feature"] = torch.stack(parts).mean()
    if loss.interactive:
        parts = [
            interactive_contrastive_loss(*mine, teacher, student.interactive_scale, offset)
            for mine, teacher in zip(student.projected, teachers, strict=True)
        ]
        terms["interactive"] = torch.stack(parts).mean()
    return terms, {name: getattr(loss, name) for name in terms}, metrics


def feature_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """FD: squared error of unit vectors [b, D'], mean over both axes: 2 (1 - cosine) / D', so its weight is large."""
    # Not mse_loss, which saves the teacher's features; autograd refuses to when they come from inference mode.
    return (wide(student) - wide(teacher).detach()).square().mean()


def interactive_contrastive_loss(
    images: Tensor, texts: Tensor, teacher: PairEmbeds, scale: Tensor | float, offset: int = 0
) -> Tensor:
    """ICL: student anchors [b, D'] against teacher keys of the other modality, half each way, mean over local rows.

    `scale` is that of these logits, not the student's own.
    """
    gathered = teacher.all_image_embeds, teacher.all_text_embeds
    keys = (teacher.image_embeds, teacher.text_embeds) if gathered[0] is None else gathered
    # Copies, because autograd cannot save the output of a teacher that ran in inference mode.
    return pair_loss(images, texts, *(key.detach().clone() for key in keys), scale, offset)
