"""The student of the `distill` runs: any CLIP, trained."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from vlmkd.models.towers import ClipOutput, ClipTowers


class CLIPEncoder(ClipTowers):
    """A trainable CLIP, whose scale and bias become vectors of one element.

    A `fixed_scale` stands for the trained one, exact in any precision; of a trained one the task's bounds hold the log.
    """

    def __init__(
        self, model: nn.Module, *, fixed_scale: float | None = None, activation_checkpointing: bool = False
    ) -> None:
        super().__init__(model)
        for name in ("logit_scale", "logit_bias"):
            scalar = getattr(model, name)
            if scalar is not None and scalar.ndim == 0:  # DeepSpeed 0.19 cannot broadcast these
                setattr(model, name, nn.Parameter(scalar.detach().reshape(1)))
        self.fixed_scale = fixed_scale
        if fixed_scale is not None:
            self.logit_scale.data.fill_(math.log(fixed_scale))
        self.logit_scale.requires_grad_(fixed_scale is None)
        if activation_checkpointing:
            if type(self.model.visual).__name__ == "ModifiedResNet":
                told = "activation checkpointing has no effect on open_clip's ResNet tower; the text tower has it"
                warnings.warn(told, stacklevel=2)
            self.model.set_grad_checkpointing(True)

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> ClipOutput:
        output = super().forward(images, tokens)
        if self.fixed_scale is None:
            return output
        return output._replace(logit_scale=torch.full_like(output.logit_scale.detach(), self.fixed_scale))

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale
