"""Heads against their formulas in float64, in every precision; mixing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.models.heads import (
    CosineHead,
    DualHead,
    DualLogits,
    LinearHead,
    Projector,
    TextClassifier,
    build_head,
    mix_heads,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kd", ["linear", "scaled_linear", "cosine"])
def test_dual_head_formulas(kd: str) -> None:
    torch.manual_seed(0)
    head = DualHead(6, 4, kd=kd)
    z = 3 * draw(5, 6)
    weight, zd = head.kd_head.weight.double(), z.double()
    unit = zd / zd.norm(dim=1, keepdim=True)
    expected = {
        "linear": lambda: zd @ weight.T + head.kd_head.bias.double(),
        "scaled_linear": lambda: 100 * (unit @ weight.T + head.kd_head.bias.double()),
        "cosine": lambda: 100 * unit @ (weight / weight.norm(dim=1, keepdim=True)).T,
    }[kd]()
    found = head(z)
    torch.testing.assert_close(found.kd.double(), expected, rtol=1e-5, atol=1e-5)
    ce = zd @ head.ce_head.weight.double().T + head.ce_head.bias.double()
    torch.testing.assert_close(found.ce.double(), ce, rtol=1e-5, atol=1e-5)
    assert (head.kd_head.bias is None) == (kd == "cosine")
    assert {name.split(".")[0] for name in head.state_dict()} == {
        "ce_head",
        "kd_head",
    }  # DHO's published names


def test_logits_are_fp32_under_autocast_and_in_half_weights() -> None:
    torch.manual_seed(0)
    z, vectors = draw(5, 6), F.normalize(draw(4, 6, seed=1), dim=-1)
    for head in (
        LinearHead(6, 4),
        CosineHead(6, 4),
        TextClassifier(vectors, 100.0),
        DualHead(6, 4, kd="cosine"),
    ):
        expected = head(z)
        with torch.autocast("cpu", torch.bfloat16):
            found = head(z)
        pairs = zip(found, expected, strict=True) if isinstance(found, DualLogits) else [(found, expected)]
        for one, other in pairs:
            assert one.dtype == torch.float32 and torch.equal(one, other)
        half = head.bfloat16()(z.bfloat16())
        assert all(part.dtype == torch.float32 for part in (half if isinstance(half, DualLogits) else [half]))


def test_gradients_reach_the_feature_through_both_heads() -> None:
    head = DualHead(3, 2, kd="scaled_linear").double()
    z = draw(4, 3).double().requires_grad_()
    for part in (0, 1):
        loss = head(z)[part].square().sum()
        (gradient,) = torch.autograd.grad(loss, z)
        step = 1e-3 * draw(4, 3, seed=2).double()
        with torch.no_grad():
            numeric = (
                head(z + step)[part].double().square().sum() - head(z - step)[part].double().square().sum()
            )
        assert (2 * (gradient * step).sum()).item() == pytest.approx(numeric.item(), rel=1e-2)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.0, 2.0), (1.0, 1.0), (0.05, 4.0)])
def test_mixing(alpha: float, beta: float) -> None:
    logits = DualLogits(draw(7, 5), 200 * draw(7, 5, seed=1))
    ce, kd = logits.ce.double(), logits.kd.double()
    expected = alpha * ce.softmax(1) + (1 - alpha) * (kd / beta).softmax(1)
    found = mix_heads(logits, alpha, beta)
    torch.testing.assert_close(found.exp().double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.softmax(1), found.exp(), rtol=1e-4, atol=1e-7)
    assert found.isfinite().all()


def test_projector() -> None:
    torch.manual_seed(0)
    z = draw(8, 5)
    one, two = Projector(5, 3), Projector(5, 3, layers=2)
    torch.testing.assert_close(one(z), z @ one.layers[0].weight.T + one.layers[0].bias)
    hidden = z @ two.layers[0].weight.T + two.layers[0].bias
    hidden = (hidden - hidden.mean(0)) / (
        hidden.var(0, unbiased=False) + 1e-5
    ).sqrt()  # BatchNorm's batch statistics
    expected = hidden.relu() @ two.layers[3].weight.T + two.layers[3].bias
    torch.testing.assert_close(two(z), expected, rtol=1e-4, atol=1e-5)
    # docs/papers/promptkd.md#stage-2-the-student: 986,112 parameters at 512 -> 768
    assert sum(p.numel() for p in Projector(512, 768, layers=2).parameters()) == 986_112
    assert Projector(**two.config).state_dict().keys() == two.state_dict().keys()
    with pytest.raises(UserError, match="layers is 0"):
        Projector(5, 3, layers=0)


def test_text_classifier_stays_exact_in_half_precision() -> None:
    vectors, z = F.normalize(draw(4, 6), dim=-1), 5 * draw(3, 6, seed=1)
    head = TextClassifier(vectors, 100.0)
    expected = 100 * F.normalize(z.double(), dim=-1) @ vectors.double().T
    torch.testing.assert_close(head(z).double(), expected, rtol=1e-5, atol=1e-4)
    assert not list(head.parameters())
    assert torch.equal(head.bfloat16().vectors, vectors)


@pytest.mark.parametrize(
    "head",
    [LinearHead(6, 4), DualHead(6, 4, kd="cosine"), TextClassifier(draw(4, 6), 7.0)],
    ids=lambda head: type(head).__name__,
)
def test_build_head_rebuilds(head: torch.nn.Module) -> None:
    again = build_head(head.config)
    again.load_state_dict(head.state_dict())
    z = draw(2, 6)
    assert all(torch.equal(one, other) for one, other in zip(again(z), head(z), strict=True))
    with pytest.raises(UserError, match="unknown head"):
        build_head({"kind": "tree", "width": 1, "classes": 1})
