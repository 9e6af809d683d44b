"""MIRO's regulariser against NumPy in float64, its layers and its groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from projects.vl2v_adip.config import LossConfig
from projects.vl2v_adip.miro import MiroStudent, Pretrained, layers_of, regulariser
from projects.vl2v_adip.objective import Targets, objective
from vlmkd.errors import UserError
from vlmkd.models.backbones import load_backbone
from vlmkd.train.task import combine


def test_the_regulariser_is_a_gaussian_log_likelihood_a_layer() -> None:
    random = np.random.default_rng(0)
    shapes, expected = [(2, 3, 4, 5), (2, 7, 6)], []
    now, then = ([random.normal(size=shape) for shape in shapes] for _ in range(2))
    raw = [random.normal(size=3), random.normal(size=6)]
    for f, f0, b in zip(now, then, raw, strict=True):
        v = np.log1p(np.exp(b)) + 1e-5
        v = v[None, :, None, None] if f.ndim == 4 else v[None, None, :]
        expected.append(0.5 * np.mean((f - f0) ** 2 / v + np.log(v)))
    layers, before, variances = ([torch.tensor(part) for part in group] for group in (now, then, raw))
    found = regulariser(layers, before, variances)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    given = combine(*objective("miro", logits, logits, Targets(labels), LossConfig(miro_weight=0.3), found))
    wanted = nn.functional.cross_entropy(logits, labels) + 0.3 * found
    assert float(given.loss) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "count"), [("timm:test_vit", 6), ("torchvision:resnet18", 4), ("efficientnet-lite0", 7)]
)
def test_untrained_layers_are_the_pretrained_ones(name: str, count: int) -> None:
    size = None if name == "timm:test_vit" else 48
    backbone = load_backbone(name, pretrained=False, image_size=size, seed=0)
    backbone.module.eval()
    student = MiroStudent(backbone, nn.Linear(backbone.dim, 3))
    student.train()
    backbone.module.eval()
    images = torch.randn(2, 3, *backbone.image_spec.size)
    before, layers = Pretrained(backbone.module)(images), student(images).layers
    assert len(layers_of(backbone.module)) == len(layers) == count
    # No distance is left: half the mean logarithm of the first variance.
    value = regulariser(layers, before, list(student.variances))
    assert value.item() == pytest.approx(0.5 * np.log(0.1), rel=1e-5)
    value.backward()
    assert all(variance.grad is not None for variance in student.variances)
    assert isinstance(student.eval()(images), torch.Tensor)


def test_a_backbone_without_known_layers_is_refused() -> None:
    with pytest.raises(UserError, match="student.backbone has no blocks or stages that method=miro knows"):
        layers_of(nn.Sequential(nn.Linear(2, 2)))
