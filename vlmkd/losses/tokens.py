"""Token losses of language models from hidden states, with logits for a few rows at a time.

Letters: N positions that are learned, D and D' widths of student and teacher, V entries of the vocabulary.
Products are in the precision of the hidden states, softmax and sums in float32 (float64 stays). No gradient
reaches the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from vlmkd.losses.precision import wide

IGNORED = -100  # label of what is not learned


class TeacherStates(NamedTuple):
    """A teacher's last hidden states [N, D'], its output embedding [V', D'] and that one's bias [V']."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None = None


class TopK(NamedTuple):
    """A cached teacher: largest log-probabilities [N, k] at the loss's temperature, their entries (below the
    student's V) and the logarithm [N] of the mass of the others.

    The divergence is that of k + 1 events, a lower bound, exact at k = V. Without the tail the k are scaled
    to sum to one, which overestimates.
    """

    log_probs: Tensor
    indices: Tensor
    log_tail: Tensor | None = None


Teacher = Tensor | TeacherStates | TopK  # a tensor: dense logits [N, V']


@dataclass(frozen=True, kw_only=True)
class TokenObjective:
    """weight * temperature^2 * D + ce_weight * cross entropy, of the teacher's p and the student's q.

    D: `forward` KL(p || q) (Hinton et al. 2015), `reverse` KL(q || p) (MiniLLM, Gu et al. 2024), `symmetric`
    half of each, `jsd` beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, Agarwal et
    al. 2024, eq. 1), the forward and the reverse one at beta 0 and 1.
    """

    divergence: Literal["forward", "reverse", "symmetric", "jsd"] = "forward"
    weight: float = 1.0
    ce_weight: float = 0.0  # the cross entropy is at temperature 1
    temperature: float = 1.0
    skew: float = 0.0
    """a of KL(p || a p + (1 - a) q), or of KL(q || a q + (1 - a) p) (DistiLLM, Ko et al. 2024)."""
    beta: float = 0.5
    taid: float = 1.0
    """t of a target softmax((1 - t) student + t teacher), without gradient (TAID, Shing et al. 2025)."""
    vocabulary: int = 0
    """First entries that the divergence is over; 0: those that both models have."""
    chunk: int = 128
    """Rows at a time; six blocks [chunk, V] are alive, of a mixture eight."""

    def __post_init__(self) -> None:
        if self.divergence not in (kinds := ("forward", "reverse", "symmetric", "jsd")):
            raise ValueError(f"divergence is {self.divergence!r}; choose one of {kinds}")
        shares = 0 <= self.skew < 1 and 0 <= self.beta <= 1 and 0 <= self.taid <= 1
        if self.temperature <= 0 or self.chunk < 1 or not shares:
            raise ValueError(f"temperature and chunk must be positive, shares in 0 to 1: {self}")
        if self.skew and self.divergence not in ("forward", "reverse"):
            raise ValueError(f"skew is {self.skew}; only forward and reverse have one")


class TokenLoss(NamedTuple):
    """Sums over rows times their weights, so that means over a whole optimiser step can be formed."""

    total: Tensor  # the objective: the only one with a gradient
    divergence: Tensor
    """With the factor temperature^2; at temperature 1, `entropy` added is the soft cross entropy."""
    ce: Tensor
    entropy: Tensor  # of the target
    agreement: Tensor  # rows whose likeliest entry is the teacher's
    num_rows: Tensor
    num_labels: Tensor  # rows with a label


def token_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: Teacher | None,
    objective: TokenObjective,
    *,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> TokenLoss:
    """Divergence from the teacher and cross entropy with the labels, in one walk over chunks of rows.

    A chunk's gradient is taken in the forward pass, while its logits are at hand (Liger Kernel, Hsu et al.
    2024).

    Args:
        hidden: [N, D], the student's last hidden states at the rows that are learned.
        head: [V, D], its output embedding, trained or frozen; `bias` [V].
        teacher: None for cross entropy alone.
        labels: [N], the next tokens; IGNORED rows have no cross entropy.
        weights: [N]; None: 1 each.
    """
    first = teacher[0] if isinstance(teacher, tuple) else teacher
    for name, given in (("teacher", first), ("labels", labels), ("weights", weights)):
        if given is not None and len(given) != len(hidden):
            raise ValueError(f"{name} has {len(given)} rows, the student {len(hidden)}")
    if objective.ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")
    if isinstance(teacher, TopK) and objective.taid < 1:
        raise ValueError("taid needs all of the teacher's logits, which a cache lacks")
    unit = wide(hidden[:0]).new_ones(len(hidden))
    weights = unit if weights is None else weights.to(unit.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        total, sums = _Chunked.apply(
            hidden, head.to(hidden.dtype), bias, teacher, labels, weights, objective, torch.is_grad_enabled()
        )
    return TokenLoss(total, *sums)


def token_log_probs(
    hidden: Tensor, head: Tensor, labels: Tensor, *, bias: Tensor | None = None, chunk: int = 256
) -> Tensor:
    """Log-probability [N] of labels [N]; the backward pass computes the logits again."""

    def picked(rows: Tensor, wanted: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return -cross_entropy(_logits(rows, head, bias), wanted, reduction="none")

    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat(
        [checkpoint(picked, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    )


class Taid(NamedTuple):
    """State of TAID's schedule."""

    t: float
    momentum: float = 0.0
    loss: float | None = None

    def after(self, loss: float, progress: float, *, start: float, rate: float = 5e-4) -> Taid:
        """After a step at the run's share `progress`, with `loss` over all ranks."""
        if self.loss is None:
            return self._replace(loss=loss)
        momentum = 0.99 * self.momentum + 0.01 * (self.loss - loss) / (self.loss + 1e-15)
        t = self.t + rate / (1 + math.exp(-momentum)) * (1 - self.t)
        return Taid(min(1, max(start + (1 - start) * progress, t)), momentum, loss)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        teacher: Teacher | None,
        labels: Tensor | None,
        weights: Tensor,
        o: TokenObjective,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = [grad and need for need in ctx.needs_input_grad[:3]]
        grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        # Over all chunks, which half precision would round.
        grad_head = torch.zeros_like(head, dtype=weights.dtype) if needs[1] else None
        grad_bias = weights.new_zeros(len(head)) if needs[2] else None
        sums = weights.new_zeros(6)
        for start in range(0, len(hidden), o.chunk):
            part = slice(start, start + o.chunk)
            rows, wanted = hidden[part], None if labels is None else labels[part]
            terms, slope = _terms(_logits(rows, head, bias), _rows(teacher, part), wanted, weights[part], o)
            sums += terms
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(rows.dtype)
            if grad_hidden is not None:
                torch.mm(slope, head, out=grad_hidden[part])
            if grad_head is not None and grad_head.dtype == rows.dtype:
                grad_head.addmm_(slope.T, rows)
            elif grad_head is not None:
                grad_head += slope.T @ rows
            del slope
        if grad_head is not None and head.dtype == torch.bfloat16:  # of float32's range
            grad_head = grad_head.bfloat16()
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.mark_non_differentiable(sums)
        return o.weight * sums[0] + o.ce_weight * sums[1], sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_total for grad in ctx.saved_tensors)
        return (*grads, *(None for _ in ctx.needs_input_grad[3:]))


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    logits = wide(hidden.to(head.dtype) @ head.T)
    return logits if bias is None else logits + bias


def _rows(teacher: Teacher | None, part: slice) -> Tensor | TopK | None:
    if isinstance(teacher, TeacherStates):
        return _logits(teacher.hidden[part], teacher.head, teacher.bias)
    if isinstance(teacher, TopK):
        return TopK(*(None if x is None else x[part] for x in teacher))  # type: ignore[arg-type]
    return None if teacher is None else wide(teacher[part])


def _terms(
    logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, weights: Tensor, o: TokenObjective
) -> tuple[Tensor, Tensor]:
    """The sums of a TokenLoss behind its total, and that one's gradient by logits [rows, V]."""
    size = min(logits.shape[1], o.vocabulary or logits.shape[1])
    if teacher is None:
        stats, slope = weights.new_zeros(3, len(weights)), torch.zeros_like(logits)
    elif isinstance(teacher, TopK):
        stats, slope = _coarse(logits[:, :size], teacher, o)
    else:
        size = min(size, teacher.shape[1])
        stats, slope = _full(logits[:, :size], teacher[:, :size], o)
    divergence, entropy, agreement = stats @ weights
    slope *= weights[:, None] * (o.weight * o.temperature)
    if slope.shape != logits.shape:
        slope = pad(slope, (0, logits.shape[1] - size))
    ce = num_labels = weights.new_zeros(())
    if labels is not None:
        known, wanted = weights * (labels != IGNORED), labels.clamp_min(0)[:, None]
        log_q = logits.log_softmax(-1)
        ce, num_labels = -(log_q.gather(1, wanted)[:, 0] @ known), known.sum()
        if o.ce_weight:
            factor = o.ce_weight * known[:, None]
            slope.add_(log_q.exp_().mul_(factor)).scatter_add_(1, wanted, -factor)
    sums = [divergence * o.temperature**2, ce, entropy, agreement, weights.sum(), num_labels]
    return torch.stack(sums), slope


def _full(logits: Tensor, teacher: Tensor, o: TokenObjective) -> tuple[Tensor, Tensor]:
    """Divergence, entropy and agreement [3, rows], and the first's gradient by logits / temperature."""
    same = logits.argmax(-1) == teacher.argmax(-1)
    target = teacher if o.taid == 1 else torch.lerp(logits, teacher, o.taid)
    log_p, log_q = _log_softmax(target, o.temperature), _log_softmax(logits, o.temperature)
    del target
    value, slope = _divergence(log_p, log_q, o)
    entropy = -log_p.mul_(log_p.exp()).sum(-1)
    slope.addcmul_(log_q.exp_(), slope.sum(-1, keepdim=True), value=-1)
    return torch.stack([value, entropy, same.to(value.dtype)]), slope


def _coarse(logits: Tensor, teacher: TopK, o: TokenObjective) -> tuple[Tensor, Tensor]:
    """As `_full`, over the k + 1 events of a cached teacher."""
    indices, floor = teacher.indices.long(), torch.finfo(logits.dtype).tiny
    q = _log_softmax(logits, o.temperature)
    kept = q.gather(1, indices)
    q.exp_().scatter_(1, indices, 0)
    rest = q.sum(-1, keepdim=True).clamp_min_(floor)  # 1 - the others would cancel
    log_p = teacher.log_probs.to(q.dtype)
    same = indices.gather(1, log_p.argmax(-1, keepdim=True))[:, 0] == logits.argmax(-1)
    tail = log_p.new_full((len(q),), -torch.inf) if teacher.log_tail is None else teacher.log_tail.to(q.dtype)
    log_p = torch.cat([log_p, tail.clamp_min(math.log(floor))[:, None]], 1)
    log_p = log_p.log_softmax(-1)  # in half precision it sums to one but roughly
    value, slope = _divergence(log_p, torch.cat([kept, rest.log()], 1), o)
    total = slope.sum(-1, keepdim=True)
    q.mul_(slope[:, -1:] / rest - total).scatter_(1, indices, slope[:, :-1] - kept.exp() * total)
    return torch.stack([value, -(log_p.exp() * log_p).sum(-1), same.to(q.dtype)]), q


def _divergence(log_p: Tensor, log_q: Tensor, o: TokenObjective) -> tuple[Tensor, Tensor]:
    """D [rows] and its derivative by log q [rows, events], up to a multiple of q, which softmax removes."""
    kind, a, p = o.divergence, o.skew, log_p.exp()
    if kind == "jsd" and o.beta in (0, 1):
        kind = "reverse" if o.beta else "forward"
    if kind == "forward":
        log_m = _mixture(log_p, log_q, a)
        value = (log_p - log_m).mul_(p).sum(-1)
        return value, (log_q - log_m).exp_().mul_(p).mul_(a - 1) if a else p.neg_()
    q = log_q.exp()
    if kind == "reverse":
        ratio = log_q - _mixture(log_q, log_p, a)
        value = (ratio * q).sum(-1)
        if a:
            ratio.sub_(ratio.exp(), alpha=a)
        return value, ratio.mul_(q)
    if kind == "symmetric":
        ratio = log_q - log_p
        return ((q - p) * ratio).sum(-1) / 2, ratio.mul_(q).sub_(p).div_(2)
    log_m = _mixture(log_p, log_q, o.beta)
    slope = (log_q - log_m).mul_(q).mul_(1 - o.beta)
    return o.beta * (log_p - log_m).mul_(p).sum(-1) + slope.sum(-1), slope


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """log(share * first + (1 - share) * second)."""
    if not share:
        return log_second
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))
