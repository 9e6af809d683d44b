"""An image classifier of backbone, maybe a projector, and head; and the predictor around it.

Letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import Backbone, build_backbone
from vlmkd.models.heads import DualLogits, Projector, build_head, mix_heads
from vlmkd.models.towers import compute_dtype, evaluating


class Classifier(nn.Module):
    """images [B, 3, h, w] -> head(projector(backbone(images))): logits [B, C], or DualLogits."""

    def __init__(self, backbone: nn.Module, head: nn.Module, projector: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.projector, self.head = backbone, projector, head

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images.to(compute_dtype(self.backbone)))
        return self.head(features if self.projector is None else self.projector(features))


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """All but the weights; plain data."""

    backbone: dict[str, Any]
    head: dict[str, Any]
    projector: dict[str, Any] | None = None
    class_names: list[str]
    image_spec: ImageSpec
    source: str
    """Of the backbone."""
    templates: list[str] = field(default_factory=list)
    """Of the class vectors, where the head has such."""
    mix: tuple[float, float] | None = None
    """Alpha and beta of a dual head, and of no other."""

    def __post_init__(self) -> None:
        classes, kind, names = self.head["classes"], self.head["kind"], len(self.class_names)
        if classes != names:
            raise UserError(f"classifier config: a head of {classes} classes, but {names} class names")
        if (kind == "dual") != (self.mix is not None):
            raise UserError(f"classifier config: mix is {self.mix} with a {kind} head; a dual head needs one")

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        head: Any,
        projector: Projector | None = None,
        *,
        class_names: Sequence[str],
        templates: Sequence[str] = (),
        mix: tuple[float, float] | None = None,
    ) -> ClassifierConfig:
        """The config of Classifier(backbone.module, head, projector)."""
        return cls(
            backbone=backbone.config,
            head=head.config,
            projector=None if projector is None else projector.config,
            class_names=list(class_names),
            image_spec=backbone.image_spec,
            source=backbone.source,
            templates=list(templates),
            mix=mix,
        )

    def build(self) -> Classifier:
        """The module with random weights; nothing is downloaded."""
        projector = None if self.projector is None else Projector(**self.projector)
        return Classifier(build_backbone(self.backbone), build_head(self.head), projector)


class ClassifierPredictor:
    """An ImageClassifier around any module with Classifier's forward (an engine's wrapper too)."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        image_spec: ImageSpec,
        class_names: Sequence[str],
        mix: tuple[float, float] | None = None,
    ) -> None:
        self.name, self.module = name, module
        self.image_spec, self.class_names, self.mix = image_spec, list(class_names), mix

    @classmethod
    def of(cls, name: str, module: nn.Module, config: ClassifierConfig) -> ClassifierPredictor:
        return cls(name, module, config.image_spec, config.class_names, config.mix)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, C], fp32; those of a dual head are mixed."""
        device = next(self.module.parameters()).device
        with evaluating(self.module):
            output = self.module(images.to(device))
        if isinstance(output, DualLogits):
            assert self.mix is not None
            return mix_heads(output, *self.mix)
        return output.float()
