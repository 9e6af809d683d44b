"""What turns features into logits: linear, dual (DHO) and text-vector heads; the projector before them.

Logits are fp32 in every precision: features and weights are converted, autocast is off.

Letters: B batch, C classes, d feature width, D embedding width.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd.errors import UserError

KdHead = Literal["linear", "scaled_linear", "cosine"]

KD_SCALE = 100.0  # 1/zeta of DHO's paper


def _linear(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.float(), weight.float(), None if bias is None else bias.float())


class LinearHead(nn.Linear):
    """features [B, d] -> logits [B, C], fp32."""

    def forward(self, features: Tensor) -> Tensor:
        return _linear(features, self.weight, self.bias)

    @property
    def config(self) -> dict[str, Any]:
        """What `build_head` takes."""
        return {"kind": "linear", "width": self.in_features, "classes": self.out_features}


class CosineHead(LinearHead):
    """features [B, d] -> cosines [B, C] with the rows of the weight, fp32; no bias."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return _linear(F.normalize(features.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))


class DualLogits(NamedTuple):
    """[B, C] each, fp32."""

    ce: Tensor
    kd: Tensor


class DualHead(nn.Module):
    """features [B, d] -> logits of a linear head for labels and a head for a teacher (docs/papers/dho.md, eq. 1 and 9).

    The latter, by `kd`: `linear`: W z + b; `scaled_linear`: 100 (W n(z) + b), as the reference's code and its released
    weights; `cosine`: 100 cos(z, w_c), the paper's formula.
    """

    def __init__(self, width: int, num_classes: int, *, kd: KdHead = "linear") -> None:
        super().__init__()
        self.kd = kd
        self.ce_head = LinearHead(width, num_classes)
        self.kd_head = CosineHead(width, num_classes) if kd == "cosine" else LinearHead(width, num_classes)

    def forward(self, features: Tensor) -> DualLogits:
        # The scale is applied outside: the heads are modules of their own, around which ZeRO 3 gathers their weights.
        if self.kd == "linear":
            return DualLogits(self.ce_head(features), self.kd_head(features))
        features = features.float()
        return DualLogits(self.ce_head(features), KD_SCALE * self.kd_head(F.normalize(features, dim=-1)))

    @property
    def config(self) -> dict[str, Any]:
        return {**self.ce_head.config, "kind": "dual", "kd": self.kd}


def mix_heads(logits: DualLogits, alpha: float, beta: float) -> Tensor:
    """log(alpha softmax(ce) + (1 - alpha) softmax(kd / beta)), [B, C] fp32 (docs/papers/dho.md, eq. 13)."""
    ce, kd = logits.ce.float().log_softmax(dim=-1), (logits.kd.float() / beta).log_softmax(dim=-1)
    if alpha in (0.0, 1.0):
        return ce if alpha else kd
    return torch.logaddexp(ce + math.log(alpha), kd + math.log1p(-alpha))


class Projector(nn.Module):
    """features [B, d] -> [B, D] by `layers` linear layers with BatchNorm and ReLU between: VL2V-ADiP's has one, PromptKD's two."""

    def __init__(self, width: int, embed_dim: int, *, layers: int = 1) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"projector layers is {layers}; it needs at least 1")
        parts: list[nn.Module] = [nn.Linear(width, embed_dim)]
        for _ in range(layers - 1):
            parts += [nn.BatchNorm1d(embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim)]
        self.layers = nn.Sequential(*parts)
        self.config = {"width": width, "embed_dim": embed_dim, "layers": layers}  # what makes the same

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class TextClassifier(nn.Module):
    """Unit features [B, D] times class vectors [C, D] times logit_scale; nothing to train."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.register_buffer("vectors", vectors.detach().float().clone())

    def forward(self, features: Tensor) -> Tensor:
        return self.logit_scale * _linear(F.normalize(features.float(), dim=-1), self.vectors)

    def _apply(self, fn: Any, recurse: bool = True) -> TextClassifier:
        # The vectors follow to a device, but stay fp32.
        exact = self.vectors
        super()._apply(fn, recurse)
        self.vectors = exact.to(self.vectors.device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        classes, width = self.vectors.shape
        return {"kind": "text", "width": width, "classes": classes, "logit_scale": self.logit_scale}


def build_head(config: dict[str, Any]) -> nn.Module:
    width, classes = config["width"], config["classes"]
    if config["kind"] == "linear":
        return LinearHead(width, classes)
    if config["kind"] == "dual":
        return DualHead(width, classes, kd=config["kd"])
    if config["kind"] == "text":
        return TextClassifier(torch.zeros(classes, width), config["logit_scale"])
    raise UserError(f"classifier config: unknown head {config['kind']!r}, not linear, dual or text")
