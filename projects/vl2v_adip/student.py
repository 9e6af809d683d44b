"""The student: backbone, projector into the teacher's space [D], and head."""

from __future__ import annotations

import types
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlmkd.models.classifier import Classifier


class StudentOutput(NamedTuple):
    """What a call gives in training."""

    embeds: Tensor
    """What the head sees, [B, D]."""
    logits: Tensor
    """[B, C], fp32."""
    layers: tuple[Tensor, ...] = ()
    """Outputs of the backbone's layers, where the method asks for them."""


class Student(Classifier):
    """In eval mode a Classifier; a frozen backbone runs without gradients and stays in eval mode."""

    @property
    def trains_backbone(self) -> bool:
        """Whether anything of it trains."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        self.backbone.train(mode and self.trains_backbone)
        return self

    def forward(self, images: Tensor) -> StudentOutput | Tensor:
        """images [B, 3, h, w] -> embeddings and logits, in eval mode logits alone."""
        if not self.training:
            return super().forward(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_backbone):
            features = self.backbone(images.to(next(self.backbone.parameters()).dtype))
        embeds = features if self.projector is None else self.projector(features)
        return StudentOutput(embeds, self.head(embeds))


def freeze_batch_norm(module: nn.Module) -> int:
    """Keep every BatchNorm in eval mode for good, while its affine parameters still train; returns their number."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.eval()
        norm.train = types.MethodType(_stay_in_eval, norm)  # type: ignore[method-assign]
    return len(norms)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
