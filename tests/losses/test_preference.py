"""Preference losses against closed forms, and log-probabilities of answers against whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlmkd.losses.preference import (
    AnswerLogProbs,
    PreferenceKind,
    answer_log_probs,
    kto_loss,
    pair_loss,
    preference_loss,
)
from vlmkd.losses.tokens import IGNORED

KINDS: list[PreferenceKind] = ["kto_pair", "sigmoid", "hinge", "ipo", "bco_pair"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(
    kind: PreferenceKind, chosen: list[float], rejected: list[float], b: float, smoothing: float
) -> list[float]:
    """The formulas of the papers, pair by pair."""
    above, below = (max(0.0, sum(x) / len(x)) for x in (chosen, rejected))
    found = []
    for x, y in zip(chosen, rejected, strict=True):
        match kind:
            case "kto_pair":
                found.append((1 - sigmoid(b * (x - below))) / 2 + (1 - sigmoid(b * (above - y))) / 2)
            case "sigmoid":
                won, lost = math.log(sigmoid(b * (x - y))), math.log(sigmoid(-b * (x - y)))
                found.append(-(1 - smoothing) * won - smoothing * lost)
            case "hinge":
                found.append(max(0.0, 1 - b * (x - y)))
            case "ipo":
                found.append((x - y - 1 / (2 * b)) ** 2)
            case _:
                found.append(-math.log(sigmoid(b * x)) - math.log(sigmoid(-b * y)))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_pairs_equal_closed_forms(kind: PreferenceKind, sign: int) -> None:
    chosen, rejected = (3 * draw(seed, 5) + sign for seed in (0, 1))
    smoothing = 0.2 if kind == "sigmoid" else 0.0
    found = pair_loss(kind, chosen, rejected, beta=0.3, label_smoothing=smoothing)
    expected = by_hand(kind, chosen.tolist(), rejected.tolist(), 0.3, smoothing)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    leaves = chosen.requires_grad_(), rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: pair_loss(kind, x, y, beta=0.3), leaves)


def test_kto_pair_of_one_pair_has_its_gradient_through_the_reference_point() -> None:
    chosen = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(pair_loss("kto_pair", chosen, rejected, beta=0.1).sum(), chosen)
    parts = [sigmoid(0.1 * 2.0), sigmoid(0.1 * (2.0 + 1.0))]  # K- is 0, K+ is the ratio itself
    assert slope.item() == pytest.approx(-sum(0.1 * s * (1 - s) / 2 for s in parts), rel=1e-12)


def test_kto_by_hand() -> None:
    ratios = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    point = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False, False])
    found = kto_loss(ratios, good, point, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    expected = [
        2 * (1 - sigmoid(0.5 * (1.0 - 0.7))),
        3 * (1 - sigmoid(0.5 * (0.7 + 2.0))),
        3 * (1 - sigmoid(0.5 * (0.7 - 0.5))),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    assert point.grad is None
    negative = kto_loss(ratios.detach(), good, torch.tensor(-3.0), beta=0.5)
    assert negative[0].item() == pytest.approx(1 - sigmoid(0.5), rel=1e-12)  # clamped at 0


def test_a_mixture_is_the_weighted_sum_and_tells_its_terms() -> None:
    counts = torch.tensor([4, 2, 5])
    policy = tuple(AnswerLogProbs(draw(seed, 3), counts + seed) for seed in (0, 1))
    reference = draw(2, 3).requires_grad_(), draw(3, 3)
    found = preference_loss(
        {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, policy, reference, label_smoothing=0.1
    )
    chosen, rejected = (p.sums - r.detach() for p, r in zip(policy, reference, strict=True))
    expected = {
        "sigmoid": 0.8 * pair_loss("sigmoid", chosen, rejected, label_smoothing=0.1),
        "bco_pair": 0.2 * pair_loss("bco_pair", chosen, rejected),
        "sft": -policy[0].sums / counts,
    }
    for kind, term in expected.items():
        torch.testing.assert_close(found.terms[kind], term)
    torch.testing.assert_close(found.loss, sum(expected.values()))
    assert not found.loss.requires_grad  # none reaches the reference
    torch.testing.assert_close(found.chosen_rewards, 0.1 * chosen)
    torch.testing.assert_close(found.rejected_rewards, 0.1 * rejected)
    by_length = preference_loss({"ipo": 1.0}, policy, reference, by_length=True).loss
    torch.testing.assert_close(by_length, pair_loss("ipo", chosen / counts, rejected / (counts + 1)))


def test_log_probabilities_of_answers_are_sums_over_what_is_learned() -> None:
    hidden, head, bias = draw(0, 3, 6, 4).requires_grad_(), draw(1, 9, 4).requires_grad_(), draw(2, 9)
    labels = torch.randint(9, (3, 6), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = labels[1, :2] = labels[1, 4:] = IGNORED
    labels[2] = IGNORED  # nothing to learn
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]  # a label is predicted a position before it
    logs = (hidden @ head.T + bias).log_softmax(-1)
    expected = [
        sum(logs[b, t - 1, labels[b, t]] for t in range(1, 6) if labels[b, t] != IGNORED) for b in range(3)
    ]
    for chunk in (1, 2, 100):
        found = answer_log_probs(hidden, head, targets, bias=bias, chunk=chunk)
        assert found.counts.tolist() == [3, 2, 0] and found.means()[2] == 0
        assert found.sums.tolist() == pytest.approx(
            [x.item() if x else 0.0 for x in map(torch.as_tensor, expected)], rel=1e-12
        )
        torch.testing.assert_close(
            torch.autograd.grad(found.sums[0] - 2 * found.sums[1], (hidden, head)),
            torch.autograd.grad(expected[0] - 2 * expected[1], (hidden, head), retain_graph=True),
        )


def test_bad_arguments_are_named() -> None:
    x = draw(0, 2)
    with pytest.raises(ValueError, match="loss is 'simpo'"):
        pair_loss("simpo", x, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label_smoothing is 0.1; only"):
        pair_loss("ipo", x, x, label_smoothing=0.1)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_equals_liger(kind: PreferenceKind) -> None:
    losses = pytest.importorskip("liger_kernel.chunked_loss")
    logps = [draw(seed, 4) for seed in range(4)]
    dpo = losses.dpo_loss.LigerFusedLinearDPOFunction.preference_loss_fn
    theirs = dpo(*logps[:2], torch.zeros(8), *logps[2:], beta=0.3, loss_type=kind)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    found = pair_loss(kind, logps[0] - logps[2], logps[1] - logps[3], beta=0.3).mean()
    assert found.item() == pytest.approx(theirs.item(), rel=1e-12)
    good, point = torch.tensor([True, False, False, True]), torch.tensor(0.4, dtype=torch.float64)
    kto = losses.kto_loss.LigerFusedLinearKTOFunction.preference_loss_fn
    theirs = kto(logps[0], good, torch.zeros(4), logps[2], beta=0.3, kl=point)[0]
    found = kto_loss(logps[0] - logps[2], good, point, beta=0.3).mean()
    assert found.item() == pytest.approx(theirs.item(), rel=1e-12)
