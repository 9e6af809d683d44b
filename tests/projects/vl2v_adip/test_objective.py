"""Losses against float64 by hand: the method's, masked rows, and every baseline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from projects.vl2v_adip.config import LossConfig
from projects.vl2v_adip.objective import Targets, needs_images, objective
from vlmkd.train.task import combine

B, C, D = 6, 4, 5


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Embeddings, logits and targets."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(C, D, generator=generator), dim=-1)
    images = torch.nn.functional.normalize(torch.randn(B, D, generator=generator), dim=-1)
    labels = torch.randint(C, (B,), generator=generator)
    embeds = torch.randn(B, D, generator=generator, requires_grad=True)
    return embeds, torch.randn(B, C, generator=generator), Targets(labels, vectors, images, logit_scale=10.0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def total(method, *inputs, **options) -> float:
    return combine(*objective(method, *inputs, LossConfig(**options))).loss.item()


@pytest.mark.parametrize("image_weight", [0.0, 0.1, 0.5, 1.0])
def test_the_loss_is_both_cosines_and_lambda_weighs_the_image_term(image_weight: float) -> None:
    embeds, logits, targets = batch()
    z = unit(embeds.detach().double().numpy())
    image = (z * targets.image_embeds.double().numpy()).sum(1).mean()
    text = (z * targets.vectors.double().numpy()[targets.labels]).sum(1).mean()
    expected = -(image_weight * image + (1 - image_weight) * text)
    terms, weights = objective("distill", embeds, logits, targets, LossConfig(image_weight=image_weight))
    assert combine(terms, weights).loss.item() == pytest.approx(expected, abs=1e-6)
    assert total("align", embeds * 7, logits, targets, image_weight=image_weight) == pytest.approx(
        expected, abs=1e-6
    )
    assert set(terms) == {name for name, w in (("image", image_weight), ("text", 1 - image_weight)) if w}


def test_one_sided_ablations_fix_lambda() -> None:
    embeds, logits, targets = batch()
    assert total("kd_image", embeds, logits, targets) == total(
        "distill", embeds, logits, targets, image_weight=1.0
    )
    targets.image_embeds = None
    assert not needs_images("kd_text", LossConfig())
    assert math.isfinite(total("kd_text", embeds, logits, targets))


def test_a_masked_row_leaves_the_image_term_only() -> None:
    embeds, logits, targets = batch()
    targets.valid = torch.tensor([True, False, True, True, False, True])
    spoilt = targets.image_embeds.clone()
    spoilt[~targets.valid] = 0.0
    targets.image_embeds = spoilt
    terms, _ = objective("distill", embeds, logits, targets, LossConfig())
    z = unit(embeds.detach().double().numpy())
    rows = targets.valid.numpy()
    assert terms["image"].item() == pytest.approx(
        -(z * spoilt.double().numpy())[rows].sum(1).mean(), abs=1e-6
    )
    text = -(z * targets.vectors.double().numpy()[targets.labels]).sum(1).mean()
    assert terms["text"].item() == pytest.approx(text, abs=1e-6)
    targets.valid = torch.zeros(B, dtype=torch.bool)
    loss = combine(*objective("distill", embeds, logits, targets, LossConfig())).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * text, abs=1e-6) and torch.isfinite(embeds.grad).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_kl_baseline(temperature: float) -> None:
    embeds, logits, targets = batch()
    s = logits.double().numpy() / temperature
    t = 10 * targets.image_embeds.double().numpy() @ targets.vectors.double().numpy().T / temperature
    ce = -np.log(softmax(s)[range(B), targets.labels]).mean()
    kl = (softmax(t) * (np.log(softmax(t)) - np.log(softmax(s)))).sum(1).mean()
    found = total("kd_kl", embeds, logits, targets, kd_weight=0.7, temperature=temperature)
    assert found == pytest.approx(ce + 0.7 * kl, rel=1e-5)


def test_equal_distributions_cost_nothing_but_in_the_legacy_kl() -> None:
    embeds, _, targets = batch()
    logits = targets.logits()
    terms, _ = objective("kd_kl", embeds, logits, targets, LossConfig())
    assert terms["kl"].item() == pytest.approx(0.0, abs=1e-6)
    terms, _ = objective("kd_kl", embeds, 100 * logits, targets_scaled(targets), LossConfig(legacy_kl=True))
    assert terms["kl"].item() == pytest.approx(-1 / C, abs=1e-3)  # one-hot p over four classes: p (log p - p)


def targets_scaled(targets: Targets) -> Targets:
    """The same teacher, so sure of itself that its distributions are one-hot."""
    return Targets(
        targets.labels, targets.vectors, targets.image_embeds, logit_scale=100 * targets.logit_scale
    )


@pytest.mark.parametrize(("kd_weight", "temperature"), [(0.3, 0.5), (0.5, 0.1)])
def test_cosine_baseline_tempers_the_student_in_both_terms(kd_weight: float, temperature: float) -> None:
    embeds, logits, targets = batch()
    s = softmax(logits.double().numpy() / temperature)
    t = softmax(10 * targets.image_embeds.double().numpy() @ targets.vectors.double().numpy().T / temperature)
    ce = -np.log(s[range(B), targets.labels]).mean()
    found = total("kd_cos", embeds, logits, targets, kd_weight=kd_weight, temperature=temperature)
    assert found == pytest.approx(ce - kd_weight * (unit(s) * unit(t)).sum(1).mean(), rel=1e-5)


def test_published_defaults_of_the_distillation_baselines() -> None:
    loss = LossConfig()
    assert (loss.kd_weight, loss.temperature, loss.legacy_kl) == (0.5, 0.1, False)
    embeds, logits, targets = batch()
    for method in ("kd_kl", "kd_cos"):
        given = total(method, embeds, logits, targets, kd_weight=0.5, temperature=0.1)
        assert total(method, embeds, logits, targets) == given


def test_embedding_baseline_and_plain_cross_entropy() -> None:
    embeds, logits, targets = batch()
    ce = -np.log(softmax(logits.double().numpy())[range(B), targets.labels]).mean()
    squared = (embeds.detach().double().numpy() - targets.image_embeds.double().numpy()) ** 2
    assert total("simkd", embeds, logits, targets) == pytest.approx(squared.mean(), rel=1e-5)
    assert total("erm", embeds, logits, Targets(targets.labels)) == pytest.approx(ce, rel=1e-5)
