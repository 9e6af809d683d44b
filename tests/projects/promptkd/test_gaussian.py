"""The Gaussian average against the published weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from projects.promptkd.gaussian import GaussianAverage
from tests.train.conftest import restored
from vlmkd.errors import UserError


def test_gaussian_average_has_the_published_weights() -> None:
    average = GaussianAverage(20, 15, 1)
    published = {11: .00013, 12: .00443, 13: .05399, 14: .24197, 15: .39894,
                 16: .24197, 17: .05399, 18: .00443, 19: .00013}  # fmt: skip
    for epoch, weight in enumerate(average.coefficients, start=1):
        assert weight == pytest.approx(published.get(epoch, 0.0), abs=1e-5)
    assert sum(average.coefficients) == pytest.approx(1.0)


def test_gaussian_average_equals_the_sum_in_double_precision_and_resumes_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.randn(7, generator=generator).to(torch.bfloat16) for _ in range(20)]
    bells = np.exp(-0.5 * ((np.arange(1, 21) - 6) / 10) ** 2)
    expected = sum(g * w.double() for g, w in zip(bells / bells.sum(), epochs, strict=True))
    whole, broken = GaussianAverage(20, 6, 10), GaussianAverage(20, 6, 10)
    for weights in epochs:
        whole.add({"w": weights})
        broken.add({"w": weights})
        broken = restored(lambda: GaussianAverage(20, 6, 10), broken.state())
    assert whole.complete and whole.weights()["w"].dtype == torch.float32
    torch.testing.assert_close(whole.weights()["w"].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(whole.weights()["w"], broken.weights()["w"])


def test_gaussian_average_refuses_what_has_no_mean() -> None:
    with pytest.raises(UserError, match="std"):
        GaussianAverage(20, 15, 0)
    with pytest.raises(UserError, match="too far from epochs"):
        GaussianAverage(20, 1e6, 1)
