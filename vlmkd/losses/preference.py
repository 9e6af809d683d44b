"""Preference losses over pairs of answers, from log-probabilities of whole answers.

Letters: B pairs. A log-ratio x = log pi(y) - log pi_ref(y) is of the policy over the reference, which in
LLaVA-MoD is the frozen teacher (Shu et al. 2025). Every loss is one number a pair, [B], so that means over a
whole optimiser step can be formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlmkd.losses.tokens import IGNORED, token_log_probs

PreferenceKind = Literal["kto_pair", "sigmoid", "hinge", "ipo", "bco_pair", "sft"]


class AnswerLogProbs(NamedTuple):
    """Of B answers: the sum of its tokens' log-probabilities, and how many tokens it has."""

    sums: Tensor
    counts: Tensor

    def means(self) -> Tensor:
        return self.sums / self.counts.clamp_min(1)


def answer_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk: int = 256
) -> AnswerLogProbs:
    """Log-probabilities of the answers in `targets` [B, T]: what each position predicts, IGNORED elsewhere.

    `hidden` [B, T, D] are last hidden states, `head` [V, D] the output embedding, `bias` [V]; `chunk`: rows whose logits
    are held at a time.
    """
    learned = targets != IGNORED
    tokens = token_log_probs(hidden[learned], head, targets[learned], bias=bias, chunk=chunk)
    answer = learned.nonzero()[:, 0]
    return AnswerLogProbs(tokens.new_zeros(len(targets)).index_add(0, answer, tokens), learned.sum(1))


def pair_loss(
    kind: PreferenceKind, chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Loss [B] of pairs with the log-ratios `chosen` and `rejected` [B].

    `kto_pair` (LLaVA-MoD's: KTO, Ethayarajh et al. 2024, with the pairs' own mean ratios, whose gradient
    counts, for its reference point), `sigmoid` (DPO, Rafailov et al. 2023, eq. 7; `label_smoothing` as in its
    conservative form, Mitchell 2023), `hinge` (SLiC-HF, Zhao et al. 2023), `ipo` (Azar et al. 2024, eq. 17),
    `bco_pair` (BCO, Jung et al. 2024, without its shift).
    """
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"label_smoothing is {label_smoothing}; only the sigmoid loss has one")
    margin = chosen - rejected
    match kind:
        case "kto_pair":
            above, below = chosen.mean().clamp_min(0), rejected.mean().clamp_min(0)
            wins = torch.sigmoid(beta * (chosen - below)) + torch.sigmoid(beta * (above - rejected))
            return 1 - wins / 2
        case "sigmoid":
            likely = (1 - label_smoothing) * logsigmoid(beta * margin)
            return -likely - label_smoothing * logsigmoid(-beta * margin)
        case "hinge":
            return (1 - beta * margin).relu()
        case "ipo":
            return (margin - 1 / (2 * beta)).square()
        case "bco_pair":
            return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)
    raise ValueError(f"loss is {kind!r}; choose kto_pair, sigmoid, hinge, ipo or bco_pair")


def kto_loss(
    ratios: Tensor,
    desirable: Tensor,
    divergence: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO of single answers, [B] (Ethayarajh et al. 2024), from log-ratios [B] and whether each is desirable [B].

    `divergence` is the mean log-ratio of mismatched pairs over all ranks, clamped at 0, without gradient.
    """
    point = divergence.detach().clamp_min(0)
    good = desirable_weight * (1 - torch.sigmoid(beta * (ratios - point)))
    return torch.where(desirable, good, undesirable_weight * (1 - torch.sigmoid(beta * (point - ratios))))


class PreferenceLoss(NamedTuple):
    """One number a pair, [B] each."""

    loss: Tensor
    terms: dict[PreferenceKind, Tensor]
    """Weighted, detached."""
    chosen_rewards: Tensor
    """beta times the log-ratio, detached."""
    rejected_rewards: Tensor


def preference_loss(
    weights: Mapping[PreferenceKind, float],
    policy: tuple[AnswerLogProbs, AnswerLogProbs],
    reference: tuple[Tensor, Tensor],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    by_length: bool = False,
) -> PreferenceLoss:
    """Weighted mixture over pairs (chosen, rejected); MPO is sigmoid 0.8, bco_pair 0.2, sft 1 (Wang et al. 2024).

    Args:
        weights: of the kinds of `pair_loss`, and of `sft`, the chosen answer's cross entropy a token.
        reference: sums [B] of the reference's log-probabilities; no gradient reaches them.
        by_length: the log-ratios are of means over an answer's tokens.
    """
    ratios = [answer.sums - sums.detach() for answer, sums in zip(policy, reference, strict=True)]
    if by_length:
        ratios = [ratio / answer.counts.clamp_min(1) for ratio, answer in zip(ratios, policy, strict=True)]
    terms: dict[PreferenceKind, Tensor] = {}
    for kind, weight in weights.items():
        smoothing = label_smoothing if kind == "sigmoid" else 0.0
        if kind == "sft":
            terms[kind] = -weight * policy[0].means()
        else:
            terms[kind] = weight * pair_loss(kind, *ratios, beta=beta, label_smoothing=smoothing)
    loss = torch.stack(list(terms.values())).sum(0)
    chosen, rejected = (beta * ratio.detach() for ratio in ratios)
    return PreferenceLoss(loss, {kind: term.detach() for kind, term in terms.items()}, chosen, rejected)
