"""The trained module: a backbone, one head or two, and the projector of the feature baselines.

Letters: B images (labelled first), C classes, d feature width, D width of the teacher's embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd.models.heads import DualHead, DualLogits, Projector, TextClassifier


class StudentOutput(NamedTuple):
    """What one forward pass gives."""

    ce_logits: Tensor
    """[B, C] of the head that labels train."""
    kd_logits: Tensor
    """[B, C] of the head that the teacher trains; the same tensor as `ce_logits` with one head."""
    embeds: Tensor | None
    """Unit vectors [B, D] in the teacher's space; None without a projector."""


class Student(nn.Module):
    """Backbone and heads; one call does all gradient work."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        projector: Projector | None = None,
        *,
        separate_statistics: bool = False,
    ) -> None:
        """`head` is a DualHead or a linear head on the features, or a TextClassifier on what the projector makes of them."""
        super().__init__()
        assert projector is not None or not isinstance(head, TextClassifier)
        self.backbone = backbone
        self.head = head
        self.projector = projector
        self._separate = separate_statistics

    def forward(self, images: Tensor, labelled: int | None = None) -> StudentOutput:
        """images [B, 3, h, w]; the first `labelled` are a batch of their own for BatchNorm with separate statistics."""
        images = images.contiguous(
            memory_format=torch.channels_last
        )  # a third faster on CPUs, no slower elsewhere
        if self._separate and self.training and labelled is not None and 0 < labelled < len(images):
            features = torch.cat([self.backbone(images[:labelled]), self.backbone(images[labelled:])])
        else:
            features = self.backbone(images)
        embeds = None
        if self.projector is not None:
            embeds = F.normalize(self.projector(features).float(), dim=-1)
        if isinstance(self.head, DualHead):
            ce, kd = self.head(features)
        else:
            ce = kd = self.head(embeds if isinstance(self.head, TextClassifier) else features)
        return StudentOutput(ce, kd, embeds)

    def logits(self, images: Tensor) -> DualLogits:
        """Logits of both heads [B, C]; of the one head twice."""
        output = self(images)
        return DualLogits(output.ce_logits, output.kd_logits)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters of the backbone (`backbone`) and of head and projector (`heads`)."""
        tops = [module for module in (self.head, self.projector) if module is not None]
        groups = {
            "backbone": list(self.backbone.parameters()),
            "heads": [parameter for module in tops for parameter in module.parameters()],
        }
        return {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
