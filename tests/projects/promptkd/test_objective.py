"""PromptSRC's terms and PromptKD's loss against their formulas in float64, written with sums over elements."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from projects.promptkd.objective import cosine_logits, promptsrc_terms
from vlmkd.losses.logits import kl_divergence

BATCH, CLASSES, DIM, SCALE = 5, 7, 6, 30.0


def unit(rows: int, seed: int) -> torch.Tensor:
    """Random unit vectors in float64."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, DIM, generator=generator, dtype=torch.float64), dim=-1)


def softmax(row: np.ndarray) -> np.ndarray:
    """Probabilities of one row."""
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def test_promptsrc_terms_are_their_formulas() -> None:
    u, w, u0, w0 = unit(BATCH, 1), unit(CLASSES, 2), unit(BATCH, 3), unit(CLASSES, 4)
    labels = torch.tensor([0, 6, 3, 3, 1])
    terms = promptsrc_terms(u, w, u0, w0, labels, SCALE)

    z, z0 = SCALE * u.numpy() @ w.numpy().T, SCALE * u0.numpy() @ w0.numpy().T
    ce = -np.mean([np.log(softmax(z[b])[labels[b]]) for b in range(BATCH)])
    text = sum(abs(w[c, d] - w0[c, d]) for c in range(CLASSES) for d in range(DIM)) / (CLASSES * DIM)
    image = sum(abs(u[b, d] - u0[b, d]) for b in range(BATCH) for d in range(DIM)) / (BATCH * DIM)
    divergence = 0.0
    for b in range(BATCH):
        p, q = softmax(z0[b]), softmax(z[b])
        divergence += sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(CLASSES))
    expected = {"ce": ce, "text": text, "image": image, "logit": divergence / (BATCH * CLASSES)}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), abs=1e-12), name


def test_no_gradient_reaches_the_frozen_side_of_the_logits() -> None:
    u0, w0 = unit(BATCH, 3).requires_grad_(), unit(CLASSES, 4).requires_grad_()
    terms = promptsrc_terms(unit(BATCH, 1), unit(CLASSES, 2), u0, w0, torch.zeros(BATCH).long(), SCALE)
    assert not terms["logit"].requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_promptkd_loss_and_the_two_ways_to_weigh_it(temperature: float) -> None:
    student, teacher = unit(BATCH, 5) @ unit(CLASSES, 6).T * 20, unit(BATCH, 7) @ unit(CLASSES, 6).T * 20
    total = 0.0
    for q_s, q_t in zip(student.numpy(), teacher.numpy(), strict=True):
        p_s, p_t = softmax(q_s / temperature), softmax(q_t / temperature)
        total += float(np.sum(p_t * (np.log(p_t) - np.log(p_s))))
    element = temperature**2 * total / (BATCH * CLASSES)
    loss = partial(kl_divergence, temperature=temperature, reduction="element")
    assert float(loss(student, teacher)) == pytest.approx(element, abs=1e-12)
    batch = float(loss(student, teacher, reduction="batch"))
    # Weight w of the released code is the weight w / C of the batch mean (docs/papers/promptkd.md, eq. 14).
    assert 1000 / CLASSES * batch == pytest.approx(1000 * element, rel=1e-9)
    assert float(loss(student.float(), teacher.float())) == pytest.approx(element, abs=1e-6)


def test_logits_are_fp32_inside_autocast() -> None:
    u, w = unit(BATCH, 1).float(), unit(CLASSES, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = cosine_logits(u, w, SCALE)
    torch.testing.assert_close(logits, SCALE * u @ w.T, rtol=0, atol=1e-5)
