"""The mixing search against the plain double loop, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from projects.dho import mixing


def softmax(x: np.ndarray) -> np.ndarray:
    """Row-wise, in float64."""
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def double_loop(ce: np.ndarray, kd: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """The released search: outer loop beta, inner alpha, keep strictly better, start (0, 1.0) with best 0."""
    best, alpha, beta = 0.0, 0.0, 1.0
    for b in [0.5, 0.75, 1, 1.25, 1.5, 2, 4]:
        for step in range(21):
            a = step / 20
            p = a * softmax(ce) + (1 - a) * softmax(kd / b)
            accuracy = float((p.argmax(1) == labels).mean())
            if accuracy > best:
                best, alpha, beta = accuracy, a, b
    return alpha, beta, best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("images", [4, 40])  # with four images nearly every pair ties with others
def test_search_finds_what_the_double_loop_finds(seed: int, images: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 6, images)
    ce = 2 * generator.standard_normal((images, 6)) + 2 * np.eye(6)[labels]
    kd = 6 * generator.standard_normal((images, 6)) + 4 * np.eye(6)[labels]
    found = mixing.search(torch.tensor(ce), torch.tensor(kd), torch.tensor(labels))
    assert (found.alpha, found.beta, found.accuracy) == pytest.approx(double_loop(ce, kd, labels))


def test_equal_accuracies_give_the_first_pair() -> None:
    right = torch.eye(3, dtype=torch.float64) * 10
    found = mixing.search(right, right, torch.arange(3))
    assert (found.alpha, found.beta, found.accuracy) == (0.0, 0.5, 1.0)


def test_without_a_right_answer_the_start_stays() -> None:
    wrong = torch.eye(3, dtype=torch.float64) * 10
    assert mixing.search(wrong, wrong, torch.tensor([1, 2, 0])) == mixing.Mixture(0.0, 1.0, 0.0)


def test_the_best_pair_is_found_where_only_one_wins() -> None:
    """One image that needs much of the first head, one that needs a cold second head."""
    generator = np.random.default_rng(3)
    ce, kd = generator.standard_normal((2, 200, 4)) * 3
    labels = (0.55 * softmax(ce) + 0.45 * softmax(kd / 1.5)).argmax(1)
    found = mixing.search(torch.tensor(ce), torch.tensor(kd), torch.tensor(labels))
    assert (found.alpha, found.beta, found.accuracy) == (0.55, 1.5, 1.0)


def test_chunks_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    ce, kd = torch.randn(2, 50, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (50,), generator=generator)
    whole = mixing.right_counts(ce, kd, labels, mixing.ALPHAS, mixing.BETAS)
    monkeypatch.setattr(mixing, "_ELEMENTS", 21 * 5 * 7)
    assert torch.equal(whole, mixing.right_counts(ce, kd, labels, mixing.ALPHAS, mixing.BETAS))
    assert whole.shape == (7, 21)


def test_logits_of_several_hundred_stay_finite() -> None:
    mixed = mixing.mix(torch.tensor([[1.0, 2.0]]), torch.tensor([[900.0, -900.0]]), 0.5, 0.5)
    torch.testing.assert_close(mixed.sum(1), torch.ones(1))


def test_entropy_alpha_follows_the_surer_head() -> None:
    sure, unsure = np.array([[9.0, 0.0, -3.0]]), np.array([[0.5, 0.0, 0.2]])

    def weight(x: np.ndarray) -> float:
        p = softmax(x)
        return float(np.exp((p * np.log(p)).sum()))

    found = mixing.entropy_alpha(torch.tensor(sure), torch.tensor(unsure))
    assert found.item() == pytest.approx(weight(sure) / (weight(sure) + weight(unsure)), rel=1e-12)
    assert found.item() > 0.5
    assert mixing.entropy_alpha(torch.tensor(unsure), torch.tensor(unsure)).item() == 0.5
