"""Heads that start from class vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.dho.build import start_from_vectors
from vlmkd.errors import UserError
from vlmkd.models.heads import DualHead, LinearHead


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_text_initialisation() -> None:
    vectors = draw(4, 6)
    dual, linear, cosine = DualHead(6, 4, kd="scaled_linear"), LinearHead(6, 4), DualHead(6, 4, kd="cosine")
    for head in (dual, linear, cosine):
        start_from_vectors(head, vectors)
    z = draw(3, 6, seed=1)
    torch.testing.assert_close(dual(z).ce, z @ vectors.T)
    torch.testing.assert_close(dual(z).kd, 100 * F.normalize(z, dim=-1) @ vectors.T)
    torch.testing.assert_close(linear(z), z @ vectors.T)
    assert torch.equal(cosine.kd_head.weight, vectors)
    for head in (dual, linear):
        with pytest.raises(UserError, match=r"class vectors are \[4, 8\], but the heads need \[4, 6\]"):
            start_from_vectors(head, draw(4, 8))
