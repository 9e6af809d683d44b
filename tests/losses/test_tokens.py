"""Token losses from hidden states against dense float64 formulas, whatever the chunk, and what they hold at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.live_bytes import LiveBytes
from vlmkd.losses.tokens import (
    IGNORED,
    Taid,
    TeacherStates,
    TokenObjective,
    TopK,
    token_log_probs,
    token_loss,
)

N, D, V = 7, 4, 11
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward": {},
    "forward, tempered": {"temperature": 2.5},
    "reverse": {"divergence": "reverse", "temperature": 0.7},
    "symmetric": {"divergence": "symmetric"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "jsd 0": {"divergence": "jsd", "beta": 0.0},
    "jsd 1": {"divergence": "jsd", "beta": 1.0},
    "skewed": {"skew": 0.2},
    "skewed reverse": {"divergence": "reverse", "skew": 0.1, "temperature": 2.0},
    "with labels": {"weight": 0.7, "ce_weight": 0.4, "temperature": 2.0},
    "taid": {"taid": 0.3, "temperature": 1.5},
}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def student(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and bias, as leaves."""
    parts = draw(0, N, D), draw(1, V, D), draw(2, V)
    return tuple(part.to(dtype).requires_grad_() for part in parts)  # type: ignore[return-value]


def labels() -> Tensor:
    found = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    found[2] = IGNORED
    return found


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def formula(o: TokenObjective, p: Tensor, q: Tensor) -> Tensor:
    """The divergences [N] as the papers write them."""
    a, b = o.skew, o.beta
    if o.divergence == "symmetric":
        return (kl(p, q) + kl(q, p)) / 2
    if o.divergence == "jsd":
        m = b * p + (1 - b) * q
        return {0: kl(p, q), 1: kl(q, p)}.get(b, b * kl(p, m) + (1 - b) * kl(q, m))
    return kl(p, a * p + (1 - a) * q) if o.divergence == "forward" else kl(q, a * q + (1 - a) * p)


def dense(
    o: TokenObjective, logits: Tensor, teacher: Tensor, wanted: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Every sum, from whole logits."""
    size = min(logits.shape[1], teacher.shape[1], o.vocabulary or V)
    mixed = o.taid * teacher[:, :size] + (1 - o.taid) * logits[:, :size].detach()
    p, q = ((x[:, :size] / o.temperature).softmax(-1) for x in (mixed, logits))
    known = weights * (wanted != IGNORED)
    divergence = o.temperature**2 * (formula(o, p, q) * weights).sum()
    ce = (F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED) * known).sum()
    return {
        "total": o.weight * divergence + o.ce_weight * ce,
        "divergence": divergence,
        "ce": ce,
        "entropy": -((p * p.log()).sum(-1) * weights).sum(),
        "agreement": ((logits[:, :size].argmax(-1) == teacher[:, :size].argmax(-1)) * weights).sum(),
        "num_rows": weights.sum(),
        "num_labels": known.sum(),
    }


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_sums_and_gradients_equal_the_dense_formulas(name: str, chunk: int) -> None:
    o = TokenObjective(chunk=chunk, **OBJECTIVES[name])
    hidden, head, bias = student()
    states = TeacherStates(draw(5, N, 6), draw(6, V, 6), draw(7, V))
    teacher = states.hidden @ states.head.T + states.bias
    weights = draw(8, N).abs()
    expected = dense(o, hidden @ head.T + bias, teacher, labels(), weights)
    leaves = [hidden, head, bias]
    gradients = torch.autograd.grad(3 * expected["total"], leaves)
    for given in (states, teacher):
        found = token_loss(hidden, head, given, o, labels=labels(), bias=bias, weights=weights)
        for key, value in expected.items():
            assert getattr(found, key).item() == pytest.approx(value.item(), rel=1e-12, abs=1e-12), key
        torch.testing.assert_close(
            torch.autograd.grad(3 * found.total, leaves), gradients, rtol=1e-10, atol=1e-12
        )


def test_hand_worked() -> None:
    # Student (1/2, 1/2), teacher (3/4, 1/4), label 1; in the second row both are (1/2, 1/2), without a label.
    hidden, head = torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [0.0]])
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    found = token_loss(
        hidden, head, teacher, TokenObjective(ce_weight=2.0), labels=torch.tensor([1, IGNORED])
    )
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.total.item() == pytest.approx(kl + 2 * math.log(2), rel=1e-6)
    assert (found.num_rows, found.num_labels) == (2, 1)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "taid"])
@pytest.mark.parametrize("cached", [False, True])
def test_gradcheck(name: str, cached: bool) -> None:
    o = TokenObjective(chunk=3, **OBJECTIVES[name])
    teacher: Any = draw(5, N, V)
    if cached:
        top, tail = topk(teacher / o.temperature, 4)
        teacher = TopK(*top, tail)

    def function(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        return token_loss(hidden, head, teacher, o, labels=labels(), bias=bias).total

    assert torch.autograd.gradcheck(function, student())


def topk(logits: Tensor, k: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Log-probabilities, indices, and the logarithm of what is left."""
    values, indices = logits.log_softmax(-1).topk(k, -1)
    return (values, indices), (1 - values.exp().sum(-1)).clamp_min(0).log()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "taid"])
def test_a_cache_of_all_entries_is_the_teacher(name: str) -> None:
    o = TokenObjective(chunk=4, **OBJECTIVES[name])
    hidden, head, bias = student()
    teacher = draw(5, N, V)
    (values, indices), _ = topk(teacher / o.temperature, V)
    expected = token_loss(hidden, head, teacher, o, labels=labels(), bias=bias)
    for tail in (None, torch.full((N,), -torch.inf)):
        found = token_loss(hidden, head, TopK(values, indices, tail), o, labels=labels(), bias=bias)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(
            torch.autograd.grad(found.total, (hidden, head)),
            torch.autograd.grad(expected.total, (hidden, head), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_more_entries_are_a_tighter_bound_and_no_tail_overestimates() -> None:
    hidden, head, _ = student()
    teacher, o = draw(5, N, V), TokenObjective()
    full = token_loss(hidden, head, teacher, o).total.item()
    bounds, without = [], []
    for k in (1, 2, 4, 8, 10):
        top, tail = topk(teacher, k)
        bounds.append(token_loss(hidden, head, TopK(*top, tail), o).total.item())
        without.append(token_loss(hidden, head, TopK(*top), o).total.item())
    assert bounds == sorted(bounds) and bounds[-1] < full < without[0]
    assert without == sorted(without, reverse=True)
    # The bound by hand: sum_k p (log p - log q) + r (log r - log rho), k = 2.
    (values, indices), tail = topk(teacher, 2)
    kept = (hidden @ head.T).log_softmax(-1).gather(1, indices)
    rest = (1 - kept.exp().sum(-1)).log()
    by_hand = (values.exp() * (values - kept)).sum() + (tail.exp() * (tail - rest)).sum()
    assert bounds[1] == pytest.approx(by_hand.item(), rel=1e-12)


def test_vocabularies_of_two_sizes_meet_in_their_prefix() -> None:
    hidden, head, _ = student()
    for teacher, cut, size in (
        (draw(5, N, V - 2), 0, V - 2),
        (draw(5, N, V + 3), 0, V),
        (draw(5, N, V), 6, 6),
    ):
        o = TokenObjective(ce_weight=0.5, vocabulary=cut, chunk=3)
        found = token_loss(hidden, head, teacher, o, labels=labels())
        expected = dense(
            TokenObjective(ce_weight=0.5, vocabulary=size), hidden @ head.T, teacher, labels(), torch.ones(N)
        )
        assert found.total.item() == pytest.approx(expected["total"].item(), rel=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(found.total, (hidden, head)),
            torch.autograd.grad(expected["total"], (hidden, head)),
        )


def test_float32_and_half_precision() -> None:
    o = TokenObjective(ce_weight=1.0, chunk=2)
    teacher = draw(5, N, V)
    exact = token_loss(*student()[:2], teacher, o, labels=labels())
    hidden, head, _ = student(torch.float32)
    found = token_loss(hidden, head, teacher.float(), o, labels=labels())
    assert found.total.item() == pytest.approx(exact.total.item(), rel=1e-5)
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_loss(*half, teacher.bfloat16(), o, labels=labels())
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(exact.total.item(), rel=3e-2)
    assert [x.dtype for x in torch.autograd.grad(found.total, half)] == [torch.bfloat16] * 2


def test_frozen_heads_no_rows_and_no_gradient() -> None:
    hidden, head, _ = student()
    teacher, o = draw(5, N, V).requires_grad_(), TokenObjective()
    token_loss(hidden, head.detach(), teacher, o).total.backward()
    assert hidden.grad is not None and teacher.grad is None
    with torch.no_grad():
        assert not token_loss(hidden, head, teacher, o).total.requires_grad
    none = token_loss(hidden[:0], head, teacher[:0], o)
    assert none.total.item() == 0 and none.num_rows == 0
    assert torch.autograd.grad(none.total, head)[0].abs().sum() == 0
    same = token_loss(hidden, head, TeacherStates(hidden.detach(), head.detach()), o)
    assert same.total.item() == pytest.approx(0, abs=1e-14) and same.agreement == N
    only = token_loss(hidden, head, None, TokenObjective(ce_weight=1.0), labels=labels())
    assert only.total.item() == pytest.approx(only.ce.item())


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    """What a whole step's mean over tokens is made of."""
    hidden, head, _ = student()
    teacher, o = draw(5, N, V), TokenObjective(ce_weight=0.3)
    whole = token_loss(hidden, head, teacher, o, labels=labels())
    parts = [
        token_loss(hidden[part], head, teacher[part], o, labels=labels()[part])
        for part in (slice(0, 2), slice(2, N))
    ]
    for ours, theirs in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(ours), theirs)


def test_no_block_of_all_rows_is_ever_held() -> None:
    rows, width, entries, chunk = 400, 8, 500, 10
    hidden = draw(0, rows, width, dtype=torch.float32).requires_grad_()
    head = draw(1, entries, width, dtype=torch.float32).requires_grad_()
    states = TeacherStates(
        draw(2, rows, width, dtype=torch.float32), draw(3, entries, width, dtype=torch.float32)
    )
    wanted = torch.zeros(rows, dtype=torch.long)
    block, gradients = chunk * entries * 4, 2 * (rows + entries) * width * 4
    for options in OBJECTIVES.values():
        o = TokenObjective(chunk=chunk, **options)
        with LiveBytes() as live:
            token_loss(hidden, head, states, o, labels=wanted).total.backward()
        extra = 2 if o.skew or o.divergence in ("jsd", "symmetric") else 0
        assert 3 * block < live.peak <= (6 + extra) * block + gradients + 20 * rows * 4, options
        hidden.grad = head.grad = None
    with LiveBytes() as live:
        token_log_probs(hidden, head, wanted, chunk=chunk).sum().backward()
    assert live.peak <= 6 * block + 2 * gradients + 20 * rows * 4
    with LiveBytes() as live:
        (hidden @ head.T).log_softmax(-1).sum().backward()
    assert live.peak > 2 * rows * entries * 4  # the measure sees what it should


def test_log_probabilities_of_labels() -> None:
    hidden, head, bias = student()
    wanted = labels().clamp_min(0)
    expected = (hidden @ head.T + bias).log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    found = token_log_probs(hidden, head, wanted, bias=bias, chunk=3)
    torch.testing.assert_close(found, expected)
    slopes = draw(9, N)
    torch.testing.assert_close(
        torch.autograd.grad(found, (hidden, head, bias), slopes),
        torch.autograd.grad(expected, (hidden, head, bias), slopes),
    )


def test_taid_by_hand() -> None:
    state = Taid(0.4).after(2.0, 0.1, start=0.4)
    assert state == Taid(0.4, 0.0, 2.0)  # the first loss is only kept
    state = state.after(1.0, 0.2, start=0.4, rate=0.5)
    momentum = 0.01 * 0.5
    expected = 0.4 + 0.5 / (1 + math.exp(-momentum)) * 0.6
    assert state.momentum == pytest.approx(momentum) and state.t == pytest.approx(expected)
    assert state.after(1.0, 0.9, start=0.4).t == pytest.approx(0.94)  # not behind the line from start to end
    assert state.after(0.5, 1.0, start=0.4).t == 1.0


def test_bad_arguments_are_named() -> None:
    hidden, head, _ = student()
    teacher = draw(5, N, V)
    for options, told in (
        ({"divergence": "l2"}, "divergence is 'l2'"),
        ({"temperature": 0.0}, "must be positive.*temperature=0.0"),
        ({"chunk": 0}, "must be positive.*chunk=0"),
        ({"beta": 2.0}, "shares in 0 to 1.*beta=2.0"),
        ({"skew": 0.1, "divergence": "jsd"}, "skew is 0.1"),
    ):
        with pytest.raises(ValueError, match=told):
            TokenObjective(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teacher has 3 rows"):
        token_loss(hidden, head, teacher[:3], TokenObjective())
    with pytest.raises(ValueError, match="ce_weight needs labels"):
        token_loss(hidden, head, teacher, TokenObjective(ce_weight=1.0))
    with pytest.raises(ValueError, match="taid needs all"):
        token_loss(hidden, head, TopK(*topk(teacher, 3)[0]), TokenObjective(taid=0.5))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_trl(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    hidden, head, _ = student()
    teacher = draw(5, N, V)
    o = TokenObjective(divergence="jsd", beta=beta)
    divergence = token_loss(hidden, head, teacher, o).divergence / o.temperature**2
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        (hidden @ head.T)[None], teacher[None], beta=beta, reduction="sum"
    )
    assert divergence.item() == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_liger(beta: float) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    hidden, head, _ = student(torch.float32)
    states = TeacherStates(draw(5, N, 6).float(), draw(6, V, 6).float())
    wanted = labels().clamp_min(0)  # its divergence is over rows with a label
    o = TokenObjective(divergence="jsd", beta=beta, weight=0.7, ce_weight=0.3, chunk=2)
    found = token_loss(hidden, head, states, o, labels=wanted).total / N
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, beta=beta, compiled=False, chunk_size=3
    )
    theirs = loss(hidden, head, states.hidden, states.head, wanted)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found, (hidden, head)),
        torch.autograd.grad(theirs, (hidden, head)),
        rtol=1e-4,
        atol=1e-5,
    )
