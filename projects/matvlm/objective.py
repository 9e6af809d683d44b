"""The distillation terms (docs/papers/matvlm.md, eq. 10 to 12), in float32 (float64 stays).

R rows, T tokens, D and D' widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlmkd.losses.precision import wide
from vlmkd.losses.tokens import IGNORED, TeacherStates, TokenObjective, TopK, token_loss

LayerReduction = Literal["frob", "mse", "rel_mse"]
LogitReduction = Literal["batch_sum", "token_mean", "answer_mean"]
Divergence = Literal["forward", "reverse", "symmetric", "jsd"]


def layer_loss(
    pairs: Sequence[tuple[Tensor, Tensor]], reduction: LayerReduction, counted: Tensor | None = None
) -> Tensor:
    """eq. 10: the sum over replaced layers of how far the student's output is from the teacher's, each [R, T, D].

    `frob` (published): the norm over rows, tokens and width, neither squared nor divided, so that its gradient has norm 1
    a layer. `mse`: divided by all three. `rel_mse`: the squared norm, divided by that of the teacher's output.

    Args:
        counted: bool [R, T], the positions; None: all, padding too.
    """
    losses = []
    for found, wanted in pairs:
        if counted is not None:
            found, wanted = found[counted], wanted[counted]
        found, wanted = wide(found), wide(wanted)
        error = found - wanted
        if reduction == "frob":
            losses.append(torch.linalg.vector_norm(error))
        elif reduction == "mse":
            losses.append(error.square().mean())
        else:
            losses.append(error.square().sum() / wanted.square().sum())
    return torch.stack(losses).sum()


class LogitLoss(NamedTuple):
    """What `logit_loss` found; `total` alone has a gradient."""

    total: Tensor
    divergence: Tensor
    """A position's, whatever the reduction."""
    ce: Tensor
    """An answer token's."""
    agreement: Tensor
    """Share of positions whose likeliest token is the teacher's."""


def logit_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: TeacherStates | TopK,
    targets: Tensor,
    *,
    reduction: LogitReduction,
    samples: int,
    counted: Tensor | None = None,
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
    bias: Tensor | None = None,
    chunk: int = 128,
) -> LogitLoss:
    """eq. 11 times `weight`, and the mean cross entropy of the answers' tokens times `ce_weight`.

    `batch_sum` (published): the sum over the positions, divided by `samples`; it grows with the length. `token_mean`:
    divided by the positions. `answer_mean`: over the positions that predict a token of an answer alone, divided by those.

    Args:
        hidden: [R, T, D], last hidden states; `head` [V, D] and `bias` [V] make logits of them.
        teacher: its hidden states [R, T, D'], head and bias; or stored, at the answers' tokens alone.
        targets: int [R, T], the tokens that are predicted, IGNORED outside answers.
        counted: bool [R, T], the positions of the first two; None: all, padding too.
    """
    learned = targets != IGNORED
    rows = learned if reduction == "answer_mean" else counted
    if rows is None:
        rows = torch.ones_like(learned)
    positions, answers = max(1, int(rows.sum())), max(1, int(learned.sum()))
    objective = TokenObjective(
        divergence=divergence, temperature=temperature, chunk=chunk, ce_weight=ce_weight / answers,
        weight=weight / (samples if reduction == "batch_sum" else positions),
    )  # fmt: skip
    seen = teacher
    if isinstance(teacher, TeacherStates):
        seen = TeacherStates(teacher.hidden[rows], teacher.head, teacher.bias)
    found = token_loss(hidden[rows], head, seen, objective, labels=targets[rows], bias=bias)
    parts = (found.divergence / positions, found.ce / answers, found.agreement / positions)
    return LogitLoss(found.total, *parts)
