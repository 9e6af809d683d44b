"""Affinity mimicking: the student's image-text softmax imitates the teachers' (docs/papers/tinyclip.md, eq. 1-6).

Letters: b local rows, B gathered columns (B = b without gathering), D student width, D' teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmkd.losses.contrastive import check_gathered
from vlmkd.losses.precision import wide


class AffinityLoss(NamedTuple):
    """Two scalars with the same gradient: `ce`, which the paper trains on, and `kl`, which reaches 0.

    `ce` is the cross entropy of the student's affinities under the teachers', `kl` that minus the entropy of
    the teachers', and `directions` [2] the `kl` of image-to-text and of text-to-image, unweighed and detached.
    """

    ce: Tensor
    kl: Tensor
    directions: Tensor


class PairEmbeds(NamedTuple):
    """Unit embeddings [b, D'] of one model; gathered ones [B, D'] are given for every model or for none."""

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor | float
    all_image_embeds: Tensor | None = None
    all_text_embeds: Tensor | None = None


def affinity_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    teachers: Sequence[PairEmbeds],
    *,
    all_image_embeds: Tensor | None = None,
    all_text_embeds: Tensor | None = None,
    reduction: Literal["half", "sum"] = "half",
    chunk: int = 0,
) -> AffinityLoss:
    """Cross entropy between teacher and student affinities, image-to-text and text-to-image, mean over local rows.

    With several teachers the target is the mean of their softmax matrices (MobileCLIP). The mean over ranks
    of the loss is the loss of the global batch; its gradient is right only when gathering carries gradients.

    Args:
        image_embeds, text_embeds: unit vectors [b, D] of the student; the columns too unless gathered ones follow.
        logit_scale: of the student, exponentiated as the teachers'; may need a gradient.
        teachers: at least one; no gradient reaches them.
        all_image_embeds, all_text_embeds: [B, D] of all ranks, both or neither.
        reduction: `half` weighs each direction by 1/2 (the released code), `sum` by 1 (the paper's equation).
        chunk: 0 for the dense form; else tiles whose memory is at most 2 * chunk * B numbers in all.
    """
    if not teachers:
        raise ValueError("teachers is empty; affinity mimicking needs at least one")
    if chunk < 0:
        raise ValueError(f"chunk is {chunk}; use 0 for the dense form or a positive number")
    if reduction not in ("half", "sum"):
        raise ValueError(f"reduction is {reduction!r}; choose half or sum")
    student = PairEmbeds(image_embeds, text_embeds, logit_scale, all_image_embeds, all_text_embeds)
    models = [student, *teachers]
    given = [x for m in models for x in (m.all_image_embeds, m.all_text_embeds) if x is not None]
    if len(given) not in (0, 2 * len(models)):
        raise ValueError(
            "gathered embeddings must be given for images and texts of student and every teacher"
        )
    for group in ([x for m in models for x in (m.image_embeds, m.text_embeds)], given):
        if len({len(x) for x in group}) > 1:  # they would broadcast into a wrong but finite number
            raise ValueError(f"row counts differ between student and teachers: {[len(x) for x in group]}")
    if given:
        check_gathered(image_embeds, given[0], "all_image_embeds")
        check_gathered(text_embeds, given[1], "all_text_embeds")
        blocks: Any = [[(m.image_embeds, m.all_text_embeds, m.logit_scale) for m in models]]
        blocks += [[(m.text_embeds, m.all_image_embeds, m.logit_scale) for m in models]]
    else:  # one block serves both directions: its columns are the rows of the other
        blocks = [[(m.image_embeds, m.text_embeds, m.logit_scale) for m in models]]
    terms = []
    with torch.autocast(image_embeds.device.type, enabled=False):
        for block in blocks:
            own, *frozen = [_widened(*triple) for triple in block]
            if chunk:
                packed = (x.detach() for triple in frozen for x in triple)
                terms.append(_Chunked.apply(*own, not given, chunk, torch.is_grad_enabled(), *packed))
            else:
                terms.append(_dense([own, *frozen], (1,) if given else (1, 0)))
    ces, entropies, directions = zip(*terms, strict=True)
    weight = 0.5 if reduction == "half" else 1.0
    ce, entropy = torch.stack(ces).sum(), torch.stack(entropies).sum()
    return AffinityLoss(ce=weight * ce, kl=weight * (ce - entropy), directions=torch.cat(directions))


Triple = tuple[Tensor, Tensor, Tensor]
"""Rows, columns and scale of one model's logits."""


def _widened(rows: Tensor, columns: Tensor, scale: Tensor | float) -> Triple:
    rows = wide(rows)
    return rows, wide(columns), torch.as_tensor(scale, dtype=rows.dtype, device=rows.device).reshape(())


def _dense(models: list[Triple], dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, the teachers' entropy and the difference of each direction, divided by b."""
    (rows, columns, scale), *teachers = models
    logits = (scale * rows) @ columns.T
    ces, entropies = [], []
    with torch.no_grad():
        teacher_logits = [(s * r) @ c.T for r, c, s in teachers]
    for dim in dims:
        with torch.no_grad():
            target, entropy = _target(teacher_logits, dim, [None] * len(teachers))
        ces.append(-(target * logits.log_softmax(dim)).sum())
        entropies.append(entropy)
    ce, entropy = torch.stack(ces), torch.stack(entropies)
    return ce.sum() / len(rows), entropy.sum() / len(rows), (ce.detach() - entropy) / len(rows)


class _Chunked(torch.autograd.Function):
    """`_dense` over tiles of rows: a tile sees all columns, so its row softmax is final and its gradient too.

    That is taken in the forward pass, and only the [b, D] and [B, D] gradients are kept. With `both`, the softmax over rows
    needs the normaliser of each column beforehand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        both: bool,
        chunk: int,
        grad: bool,
        *packed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        models = [(rows, columns, scale), *zip(packed[::3], packed[1::3], packed[2::3], strict=True)]
        count, num_tiles = len(rows), len(models) + 4  # see _tile_terms
        step = min(count, max(1, 2 * chunk // num_tiles))
        sums = [_column_sums(*model, step) if both else None for model in models]
        needs = [grad and need for need in ctx.needs_input_grad[:3]]
        grad_rows = torch.empty_like(rows) if needs[0] or needs[2] else None
        grad_columns = torch.zeros_like(columns) if needs[1] else None
        totals = rows.new_zeros(2 if both else 1, 2)  # of each direction: cross entropy, entropy
        for start in range(0, count, step):
            part = slice(start, start + step)
            difference = _tile_terms([(s * r[part]) @ c.T for r, c, s in models], sums, totals)
            if grad_rows is not None:
                torch.mm(difference, columns, out=grad_rows[part])
            if grad_columns is not None:
                grad_columns.addmm_(difference.T, rows[part])
            del difference  # before the next tile is made
        grad_scale = None
        if grad_rows is not None:
            grad_scale = (grad_rows * rows).sum() / count
            grad_rows.mul_(scale / count)
        if grad_columns is not None:
            grad_columns.mul_(scale / count)
        ctx.save_for_backward(grad_rows, grad_columns, grad_scale)
        (ce, entropy), directions = totals.sum(0) / count, (totals[:, 0] - totals[:, 1]) / count
        ctx.mark_non_differentiable(entropy, directions)
        return ce, entropy, directions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        grads = [grad_ce * grad if need else None for grad, need in saved]
        return (*grads, *(None for _ in ctx.needs_input_grad[3:]))


def _tile_terms(logits: list[Tensor], sums: list[Tensor | None], totals: Tensor) -> Tensor:
    """Add cross entropy and entropy of each direction to `totals`; returns student minus target probabilities.

    Besides the logits of all models, at most four tiles are alive at once.
    """
    student, *teachers = logits
    difference: Tensor | None = None
    for dim, total in zip((1, 0), totals, strict=False):
        log_p = _log_softmax(student, dim, sums[0])
        target, entropy = _target(teachers, dim, sums[1:])
        total += torch.stack([-(target * log_p).sum(), entropy])
        rest = log_p.exp_().sub_(target)
        difference = rest if difference is None else difference.add_(rest)
    assert difference is not None
    return difference


def _target(logits: list[Tensor], dim: int, sums: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Mean over teachers of their softmax along `dim`, and its entropy summed over all."""
    first = _log_softmax(logits[0], dim, sums[0])
    if len(logits) == 1:
        mean = first.exp()
        return mean, -first.mul_(mean).sum()
    mean = first.exp_()
    for other, other_sums in zip(logits[1:], sums[1:], strict=True):
        mean += _log_softmax(other, dim, other_sums).exp_()
    mean /= len(logits)
    # The logarithm is finite at 0, where the product is 0 anyway.
    return mean, -mean.clamp_min(torch.finfo(mean.dtype).tiny).log_().mul_(mean).sum()


def _log_softmax(logits: Tensor, dim: int, column_sums: Tensor | None) -> Tensor:
    """Log-softmax along `dim`; of a tile's columns by `column_sums`, which know the other tiles."""
    if dim == 1 or column_sums is None:
        return logits.log_softmax(dim)
    top, log_total = column_sums  # their sum would be rounded at the size of the logits
    return (logits - top).sub_(log_total)


def _column_sums(rows: Tensor, columns: Tensor, scale: Tensor, step: int) -> Tensor:
    """Maximum, and logarithm of the sum of exponentials relative to it, of scale * rows @ columns.T's columns, [2, B]."""
    top = rows.new_full((len(columns),), -torch.inf)
    total = torch.zeros_like(top)
    for part in rows.split(step):
        logits = (scale * part) @ columns.T
        new_top = torch.maximum(top, logits.amax(0))
        total.mul_((top - new_top).exp_()).add_(logits.sub_(new_top).exp_().sum(0))
        top = new_top
    return torch.stack([top, total.log_()])
