"""Contrastive losses over unit embeddings: CLIP's and SigLIP's.

Letters: b local rows, B gathered columns (B = b without gathering), D width. Row i of images belongs to row i
of texts; `logit_scale` is exponentiated; `all_...` [B, D] are the embeddings of all ranks (None: the local
rows are the batch), `offset` the position of the first local row among them.

Logits and softmax are in float32 (float64 stays), also under autocast. With gathered columns the mean over ranks of a
loss is the loss of the global batch; its gradient is right only when gathering carries gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.losses.precision import wide


def clip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    all_image_embeds: Tensor | None = None,
    all_text_embeds: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Half image-to-text plus half text-to-image cross entropy, mean over local rows (CLIP, Radford et al. 2021)."""
    if (all_image_embeds is None) != (all_text_embeds is None):
        raise ValueError("all_image_embeds and all_text_embeds must be given together")
    if all_image_embeds is None or all_text_embeds is None:
        _check_offset(image_embeds, text_embeds, offset)
        logits = _logits(image_embeds, text_embeds, logit_scale)
        # One block read both ways: a transposed copy would cost more than the softmax.
        return -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    check_gathered(image_embeds, all_image_embeds, "all_image_embeds")
    check_gathered(text_embeds, all_text_embeds, "all_text_embeds")
    return pair_loss(image_embeds, text_embeds, all_image_embeds, all_text_embeds, logit_scale, offset)


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    *,
    all_text_embeds: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Binary loss on every pair: (1/b) sum_ij softplus(-y_ij (s I_i.T_j + c)), y = 1 on pairs, else -1 (SigLIP, eq. 1).

    Images need no gathering: each rank's rows meet all texts once.
    """
    columns = text_embeds if all_text_embeds is None else all_text_embeds
    check_gathered(text_embeds, columns, "all_text_embeds")
    _check_offset(image_embeds, columns, offset)
    signed = -(_logits(image_embeds, columns, logit_scale) + logit_bias)
    # In place, because a matrix of signs would be as large as the logits.
    signed.diagonal(offset=offset).neg_()
    # logsigmoid rather than softplus, which returns its argument above 20.
    return -F.logsigmoid(signed).sum() / image_embeds.shape[0]


def check_gathered(rows: Tensor, columns: Tensor, name: str) -> None:
    """Refuse gathered student columns that hold `rows` but not their gradient: part of it would be lost."""
    if torch.is_grad_enabled() and rows.requires_grad and not columns.requires_grad:
        raise ValueError(f"{name} carries no gradient; gather with vlmkd.distributed.gather")


def pair_loss(
    image_rows: Tensor, text_rows: Tensor, images: Tensor, texts: Tensor, scale: Tensor | float, offset: int
) -> Tensor:
    """Cross entropy of the rows' own pairs among the columns [B, D] of the other modality, half each way."""
    _check_offset(image_rows, images, offset)
    labels = torch.arange(offset, offset + len(image_rows), device=image_rows.device)
    image_loss = F.cross_entropy(_logits(image_rows, texts, scale), labels)
    return (image_loss + F.cross_entropy(_logits(text_rows, images, scale), labels)) / 2


def _logits(rows: Tensor, columns: Tensor, scale: Tensor | float) -> Tensor:
    """scale * rows @ columns.T, [b, B]."""
    with torch.autocast(rows.device.type, enabled=False):
        return (scale * wide(rows)).to(wide(rows).dtype) @ wide(columns).T


def _check_offset(rows: Tensor, columns: Tensor, offset: int) -> None:
    if offset < 0 or offset + len(rows) > len(columns):
        raise ValueError(f"offset is {offset}; {len(rows)} local rows must lie within {len(columns)} columns")
