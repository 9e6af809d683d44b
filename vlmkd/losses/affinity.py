"""Affinity mimicking: the student's image-text softmax imitates the teachers' (docs/papers/tinyclip.md, eq. 1-6).

Letters: b local rows, B gathered columns (B = b without gathering), D student width, D' teacher width, E teachers.

Both forms compute the same number. The dense form holds several [b, B] blocks; the chunked form holds tiles of
rows and is for batches whose blocks do not fit.
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
    """Two scalars with the same gradient; `ce` is trained on by the paper, `kl` reaches 0 and is easier to read."""

    ce: Tensor
    """Cross entropy of the student's affinities under the teachers'."""
    kl: Tensor
    """`ce` minus the entropy of the teachers' affinities."""
    directions: Tensor
    """`kl` of image-to-text and of text-to-image before they are weighed, [2], without gradient."""


class PairEmbeds(NamedTuple):
    """Unit embeddings of one model; gathered ones are given for every model or for none."""

    image_embeds: Tensor
    """[b, D']."""
    text_embeds: Tensor
    """[b, D']."""
    logit_scale: Tensor | float
    """Scale of the logits (already exponentiated)."""
    all_image_embeds: Tensor | None = None
    """[B, D'], rows of all ranks."""
    all_text_embeds: Tensor | None = None
    """[B, D'], rows of all ranks."""


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

    With several teachers the target is the mean of their softmax matrices (MobileCLIP). The mean over ranks of the
    loss is the loss of the global batch; its gradient is right only when gathering carries gradients.

    Args:
        image_embeds, text_embeds: unit vectors [b, D] of the student; the columns too unless gathered ones follow.
        logit_scale: scale of the student's logits (already exponentiated); may need a gradient.
        teachers: at least one; no gradient reaches them.
        all_image_embeds, all_text_embeds: [B, D] of all ranks, both or neither.
        reduction: `half` weighs each direction by 1/2 (the released code), `sum` by 1 (the paper's equation).
        chunk: 0 for the dense form; else tiles whose memory is at most 2 * chunk * B numbers in all.

    Raises:
        ValueError: no teacher, half of a gathered pair, gathered student columns without gradients, a negative chunk,
            an unknown reduction, unequal row counts.
    """
    _check(image_embeds, text_embeds, teachers, all_image_embeds, all_text_embeds, chunk)
    if reduction not in ("half", "sum"):
        raise ValueError(f"reduction is {reduction!r}; choose half or sum")
    gathered = all_image_embeds is not None
    student = PairEmbeds(image_embeds, text_embeds, logit_scale, all_image_embeds, all_text_embeds)
    # Without gathering one block serves both directions: its columns are the rows of the other direction.
    blocks = [[_image_rows(x) for x in (student, *teachers)]]
    if gathered:
        blocks.append([_text_rows(x) for x in (student, *teachers)])
    terms: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.autocast(image_embeds.device.type, enabled=False):
        for block in blocks:
            triple, *teacher = [
                (wide(rows), wide(columns), _scalar(scale, rows)) for rows, columns, scale in block
            ]
            teacher = [(rows.detach(), columns.detach(), scale.detach()) for rows, columns, scale in teacher]
            if chunk:
                packed = [tensor for each in teacher for tensor in each]
                terms.append(_Chunked.apply(*triple, not gathered, chunk, torch.is_grad_enabled(), *packed))
            else:
                terms.append(_dense(*triple, teacher, both=not gathered))
    weight = 0.5 if reduction == "half" else 1.0
    ces, entropies, directions = zip(*terms, strict=True)
    ce, entropy = torch.stack(ces).sum(), torch.stack(entropies).sum()
    return AffinityLoss(ce=weight * ce, kl=weight * (ce - entropy), directions=torch.cat(directions))


def _check(
    image_embeds: Tensor,
    text_embeds: Tensor,
    teachers: Sequence[PairEmbeds],
    all_image_embeds: Tensor | None,
    all_text_embeds: Tensor | None,
    chunk: int,
) -> None:
    """Refuse arguments whose shapes would broadcast into a wrong but finite number."""
    if not teachers:
        raise ValueError("teachers is empty; affinity mimicking needs at least one")
    if chunk < 0:
        raise ValueError(f"chunk is {chunk}; use 0 for the dense form or a positive number of rows")
    locals_ = [image_embeds, text_embeds] + [x for t in teachers for x in (t.image_embeds, t.text_embeds)]
    columns = [all_image_embeds, all_text_embeds]
    columns += [x for t in teachers for x in (t.all_image_embeds, t.all_text_embeds)]
    given = [x for x in columns if x is not None]
    if given and len(given) != len(columns):
        raise ValueError(
            "gathered embeddings must be given for images and texts of the student and of every teacher"
        )
    if all_image_embeds is not None and all_text_embeds is not None:
        check_gathered(image_embeds, all_image_embeds, "all_image_embeds")
        check_gathered(text_embeds, all_text_embeds, "all_text_embeds")
    for group in (locals_, given):
        if len({x.shape[0] for x in group}) > 1:
            raise ValueError(f"row counts differ between student and teachers: {[x.shape[0] for x in group]}")


def _image_rows(x: PairEmbeds) -> tuple[Tensor, Tensor, Tensor | float]:
    return x.image_embeds, x.text_embeds if x.all_text_embeds is None else x.all_text_embeds, x.logit_scale


def _text_rows(x: PairEmbeds) -> tuple[Tensor, Tensor, Tensor | float]:
    return x.text_embeds, x.image_embeds if x.all_image_embeds is None else x.all_image_embeds, x.logit_scale


def _scalar(scale: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(scale, dtype=wide(like).dtype, device=like.device).reshape(())


Triple = tuple[Tensor, Tensor, Tensor]


def _dense(
    rows: Tensor, columns: Tensor, scale: Tensor, teacher: list[Triple], both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, teacher entropy and the difference of each direction, divided by b.

    `both` adds the softmax over rows to that over columns.
    """
    logits = (scale * rows) @ columns.T
    with torch.no_grad():
        teacher_logits = [(s * r) @ c.T for r, c, s in teacher]
    ces, entropies = [], []
    for dim in (1, 0) if both else (1,):
        with torch.no_grad():
            target, log_target = _mean_softmax(teacher_logits, dim)
            entropies.append(-log_target.mul_(target).sum())
        ces.append(-(target * logits.log_softmax(dim)).sum())
    ce, entropy, count = torch.stack(ces), torch.stack(entropies), rows.shape[0]
    return ce.sum() / count, entropy.sum() / count, (ce.detach() - entropy) / count


def _mean_softmax(logits: list[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Mean over teachers of their softmax along `dim`, and its logarithm."""
    first = logits[0].log_softmax(dim)
    if len(logits) == 1:
        return first.exp(), first
    mean = first.exp_()
    for other in logits[1:]:
        mean += other.softmax(dim)
    mean /= len(logits)
    return mean, _log(mean)


def _log(probabilities: Tensor, out: Tensor | None = None) -> Tensor:
    """Logarithm that is finite at 0, where the caller's product with the probability is 0 anyway."""
    return torch.clamp_min(probabilities, torch.finfo(probabilities.dtype).tiny, out=out).log_()


class _Chunked(torch.autograd.Function):
    """Affinity over tiles of rows: a tile sees all columns, so its row softmax is final and its gradient too.

    The gradient of a tile is therefore taken in the forward pass while its logits are at hand, which saves computing
    them again in the backward pass; [b, D] and [B, D] gradients are all that is kept. With `both`, the softmax over
    rows needs its normaliser beforehand: a first sweep takes the log-sum-exp of every column.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        both: bool,
        chunk: int,
        grad_enabled: bool,
        *packed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher = [(packed[i], packed[i + 1], packed[i + 2]) for i in range(0, len(packed), 3)]
        num_tiles = 5 if both else 4
        step = min(rows.shape[0], max(1, 2 * chunk // num_tiles))
        tiles = [rows.new_empty(step, columns.shape[0]) for _ in range(num_tiles)]
        triples = [(rows, columns, scale), *teacher] if both else []
        sums = [_column_sums(*triple, tiles[0]) for triple in triples]
        needs = ctx.needs_input_grad if grad_enabled else (False,) * 3
        grad_rows = torch.empty_like(rows) if needs[0] or needs[2] else None
        grad_columns = torch.zeros_like(columns) if needs[1] else None
        totals = rows.new_zeros(2 if both else 1, 2)  # of each direction: cross entropy, entropy
        for start in range(0, rows.shape[0], step):
            part = slice(start, min(start + step, rows.shape[0]))
            views = [tile[: part.stop - start] for tile in tiles]
            torch.mm(scale * rows[part], columns.T, out=views[0])
            _targets([(r[part], c, s) for r, c, s in teacher], sums[1:], views)
            totals += _tile_terms(sums[:1], views)
            difference = views[1]
            if grad_rows is not None:
                torch.mm(difference, columns, out=grad_rows[part])
            if grad_columns is not None:
                grad_columns.addmm_(difference.T, rows[part])
        if both:
            totals[1, 0] += sums[0][1].log().sum()
        count = rows.shape[0]
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
        needed = zip(
            ctx.saved_tensors, ctx.needs_input_grad, strict=False
        )  # the other inputs carry no gradient
        grads = tuple(grad_ce * saved if need else None for saved, need in needed)
        return grads + (None,) * (len(ctx.needs_input_grad) - len(grads))


def _column_sums(rows: Tensor, columns: Tensor, scale: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum, and sum of exponentials relative to it, over the rows of scale * rows @ columns.T, [B] each.

    One sweep of tiles with a running maximum. The two stay apart, because their log-sum-exp would be rounded at the
    size of the logits.
    """
    top = rows.new_full((columns.shape[0],), -torch.inf)
    total = torch.zeros_like(top)
    for part in rows.split(tile.shape[0]):
        logits = torch.mm(scale * part, columns.T, out=tile[: part.shape[0]])
        new_top = torch.maximum(top, logits.amax(0))
        total.mul_((top - new_top).exp_()).add_(logits.sub_(new_top).exp_().sum(0))
        top = new_top
    return top, total


def _targets(teacher: list[Triple], sums: list[tuple[Tensor, Tensor]], views: list[Tensor]) -> None:
    """Fill views[2] with the teachers' mean row softmax and, given their column sums, views[4] with the column one."""
    for index, (rows, columns, scale) in enumerate(teacher):
        logits = torch.mm(scale * rows, columns.T, out=views[1])
        row_target = views[2] if index == 0 else views[3]
        torch.sub(logits, logits.amax(1, keepdim=True), out=row_target)
        row_target.exp_().div_(row_target.sum(1, keepdim=True).mul_(len(teacher)))
        if index > 0:
            views[2].add_(row_target)
        if sums:
            top, total = sums[index]
            column_target = views[4] if index == 0 else views[3]
            torch.sub(logits, top, out=column_target).exp_().div_(total * len(teacher))
            if index > 0:
                views[4].add_(column_target)


def _tile_terms(sums: list[tuple[Tensor, Tensor]], views: list[Tensor]) -> Tensor:
    """Cross entropy and entropy of each direction summed over a tile, [1 or 2, 2]; leaves student minus target
    probabilities in views[1].

    views: student logits, result, row target, scratch, and with `sums` (the student's) the column target. Of the
    column direction's cross entropy the logarithm of `sums` is left to the caller, who adds it once for all tiles.
    """
    logits, difference, target, scratch = views[:4]
    entropy = -_log(target, out=scratch).mul_(target).sum()
    torch.sub(logits, logits.amax(1, keepdim=True), out=scratch)
    torch.exp(scratch, out=difference)
    total = difference.sum(1, keepdim=True)
    # -sum_j target log p = log(total) - sum_j target (logit - top): both parts have one sign, so nothing cancels.
    terms = [total.log().sum() - scratch.mul_(target).sum(), entropy]
    difference.div_(total).sub_(target)
    for top, column_total in sums:
        column_target = views[4]
        entropy = -_log(column_target, out=scratch).mul_(column_target).sum()
        logits.sub_(top)
        terms += [-torch.mul(logits, column_target, out=scratch).sum(), entropy]
        difference.add_(logits.exp_().div_(column_total)).sub_(column_target)
    return torch.stack(terms).view(-1, 2)
