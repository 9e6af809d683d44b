"""Gradient cosines against gradients written out by hand, for one head and for two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from projects.dho.gradients import agreements
from projects.dho.objective import cross_entropy, distillation


def softmax(x: np.ndarray) -> np.ndarray:
    """Row-wise."""
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


class Case:
    """A linear backbone without bias, linear heads without bias, six images of which two have labels."""

    def __init__(self) -> None:
        generator = np.random.default_rng(5)
        self.x = generator.standard_normal((6, 4))
        self.v = generator.standard_normal((3, 4))
        self.w_ce, self.w_kd = generator.standard_normal((2, 5, 3))
        self.teacher = 3 * generator.standard_normal((6, 5))
        self.labels = np.array([4, 1])

    def by_hand(self, head: np.ndarray, kd_head: np.ndarray) -> tuple[np.ndarray, ...]:
        """d CE / d head, d CE / d backbone, d KD / d head, d KD / d backbone."""
        z = self.x @ self.v.T
        error = softmax(z[:2] @ head.T) - np.eye(5)[self.labels]
        ce = error / 2
        # d (T^2 KL) / d logits = T (s - t), each part divided by its number of rows
        kd = 2 * (softmax(z @ kd_head.T / 2) - softmax(self.teacher / 2)) / np.array([[2]] * 2 + [[4]] * 4)
        return ce.T @ z[:2], (ce @ head).T @ self.x[:2], kd.T @ z, (kd @ kd_head).T @ self.x

    def measured(self, dual: bool) -> dict[str, float]:
        """Cosines of the implementation."""
        backbone = nn.Parameter(torch.tensor(self.v))
        ce_head = nn.Parameter(torch.tensor(self.w_ce))
        kd_head = nn.Parameter(torch.tensor(self.w_kd)) if dual else ce_head
        z = torch.tensor(self.x) @ backbone.T
        ce = cross_entropy(z[:2] @ ce_head.T, torch.tensor(self.labels))
        kd = distillation(z @ kd_head.T, torch.tensor(self.teacher), 2)
        heads = [ce_head, kd_head] if dual else [ce_head]
        found = agreements(ce, kd, {"backbone": [backbone], "heads": heads})
        assert backbone.grad is None
        (ce + kd).backward()  # the graph is still there
        assert backbone.grad is not None
        both = found["backbone"] + found["heads"]
        return {
            "backbone": found["backbone"].cosine.item(),
            "heads": found["heads"].cosine.item(),
            "all": both.cosine.item(),
            "ce_square": both.first_square.item(),
            "kd_square": both.second_square.item(),
        }


def cosine(*pairs: tuple[np.ndarray, np.ndarray]) -> float:
    """Of two gradients in pieces."""
    one, other = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def test_single_head() -> None:
    case = Case()
    ce_head, ce_back, kd_head, kd_back = case.by_hand(case.w_ce, case.w_ce)
    found = case.measured(dual=False)
    assert found["backbone"] == pytest.approx(cosine((ce_back, kd_back)), rel=1e-10)
    assert found["heads"] == pytest.approx(cosine((ce_head, kd_head)), rel=1e-10)
    assert found["all"] == pytest.approx(cosine((ce_back, kd_back), (ce_head, kd_head)), rel=1e-10)


def test_two_heads_share_only_the_backbone() -> None:
    case = Case()
    ce_head, ce_back, kd_head, kd_back = case.by_hand(case.w_ce, case.w_kd)
    found = case.measured(dual=True)
    assert found["backbone"] == pytest.approx(cosine((ce_back, kd_back)), rel=1e-10)
    assert found["heads"] == 0.0
    assert found["ce_square"] == pytest.approx((ce_head**2).sum() + (ce_back**2).sum(), rel=1e-10)
    assert found["kd_square"] == pytest.approx((kd_head**2).sum() + (kd_back**2).sum(), rel=1e-10)


def test_the_sign_on_a_single_head_is_that_of_the_error_product() -> None:
    """For one image the gradients are (p - y) z^T and (p - t) z^T: their cosine is that of p - y and p - t."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        head, z, teacher = (
            generator.standard_normal((4, 3)),
            generator.standard_normal((1, 3)),
            generator.standard_normal((1, 4)),
        )
        p, t, y = softmax(z @ head.T), softmax(teacher), np.eye(4)[[2]]
        weight = nn.Parameter(torch.tensor(head))
        logits = torch.tensor(z) @ weight.T
        found = agreements(
            cross_entropy(logits, torch.tensor([2])),
            distillation(logits, torch.tensor(teacher), 1, temperature=1.0),
            {"heads": [weight]},
        )
        assert found["heads"].cosine.item() == pytest.approx(cosine((p - y, p - t)), rel=1e-9)
