"""MIRO (Cha et al., ECCV 2022, arXiv:2203.10789) as a baseline: every layer must still tell its pre-trained features.

A layer's output is [B images, d channels, h, w] or [B, tokens, d].
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.vl2v_adip.student import Student, StudentOutput
from vlmkd.errors import UserError
from vlmkd.models.backbones import Backbone
from vlmkd.models.towers import evaluating
from vlmkd.train.task import frozen

VARIANCES = "variances."
"""Begins the names of the parameters that an export has not."""
_FIRST_VARIANCE, _EPS = 0.1, 1e-5


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, or the stages of a convolutional net."""
    named = dict(backbone.named_modules())
    for name, part in named.items():
        if name.rpartition(".")[2] in ("blocks", "resblocks"):
            return list(part.children())
    stages = [part for name, part in named.items() if re.fullmatch(r"(.*\.)?layer[1-4]", name)]
    if not stages:
        raise UserError(
            "config field student.backbone has no blocks or stages that method=miro knows; use a ViT or ResNet"
        )
    return stages


@contextmanager
def recorded(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the layers give during the body."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in layers_of(backbone):
            hooks.enter_context(layer.register_forward_hook(lambda *call: found.append(call[-1])))
        yield found


class MiroStudent(Student):
    """A student that in training gives its layers' outputs too, and holds their learned variances."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__(backbone.module, head)
        with evaluating(backbone.module), recorded(backbone.module) as layers, torch.no_grad():
            backbone.module(torch.zeros(1, 3, *backbone.image_spec.size))
        start = math.log(math.expm1(_FIRST_VARIANCE - _EPS))
        self.variances = nn.ParameterList(
            [
                nn.Parameter(torch.full((layer.shape[1 if layer.ndim == 4 else -1],), start))
                for layer in layers
            ]
        )

    def forward(self, images: Tensor) -> StudentOutput | Tensor:
        """As a Student's, in training with the layers' outputs."""
        with recorded(self.backbone) as layers:
            output = super().forward(images)
        return output._replace(layers=tuple(layers)) if isinstance(output, StudentOutput) else output


class Pretrained(nn.Module):
    """The backbone as it was before training: images -> its layers' outputs."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = frozen(copy.deepcopy(backbone))

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        with recorded(self.backbone) as layers:
            self.backbone(images.to(next(self.backbone.parameters()).dtype))
        return layers


def regulariser(
    layers: Sequence[Tensor], pretrained: Sequence[Tensor], variances: Sequence[Tensor]
) -> Tensor:
    """Mean over the layers of mean((f - f0)^2 / v + log v) / 2 (docs/papers/vl2v_adip.md, eq. 10)."""
    parts = []
    for layer, before, raw in zip(layers, pretrained, variances, strict=True):
        variance = F.softplus(raw.float()) + _EPS
        variance = variance[:, None, None] if layer.ndim == 4 else variance  # images have channels second
        parts.append(((layer.float() - before.float()).square() / variance + variance.log()).mean() / 2)
    return torch.stack(parts).mean()
