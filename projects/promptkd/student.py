"""PromptKD's student: a frozen CLIP image tower with visual prompts, and a projector into the teacher's space.

Letters: B images, d width of the student's features, D width of the teacher's embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.promptkd.prompts import PromptedImageTower
from vlmkd import distributed
from vlmkd.models.clip import ClipModel
from vlmkd.models.heads import Projector

PROJECTOR_LAYERS = 2
"""Linear, BatchNorm, ReLU, Linear (paper Table 6: 2 are better than 1 and 3)."""


class PromptedStudent(nn.Module):
    """images -> unit vectors in the teacher's embedding space; it has no text tower."""

    logit_scale: Tensor

    def __init__(
        self,
        clip: ClipModel,
        embed_dim: int,
        *,
        depth: int,
        length: int,
        projector_layers: int = PROJECTOR_LAYERS,
        seed: int = 0,
    ) -> None:
        """The image tower of `clip` under new prompts and a new projector, both drawn from `seed`.

        Raises:
            UserError: a tower that prompts do not fit.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        tower: Any = clip.module.visual
        self.image = PromptedImageTower(tower, depth, length, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = Projector(self.image.tower.proj.shape[1], embed_dim, layers=projector_layers)
        scale: Any = clip.module.logit_scale
        self.register_buffer(
            "logit_scale", scale.detach().float().reshape(1).clone()
        )  # the logarithm, frozen
        self.autocast_dtype: torch.dtype | None = None

    @property
    def scale(self) -> Tensor:
        """Factor [1] of the cosines, fp32: the student CLIP's own."""
        return self.logit_scale.float().exp()

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in the student's statistics -> unit vectors [B,D], fp32.

        In training the batch statistics of the projector are those of all ranks together, so that the number of ranks
        changes neither the loss nor the running statistics.
        """
        with autocast(images.device, self.autocast_dtype):
            features = self.image(images)
        with autocast(images.device, None):
            features = features.float()
            if self.projector.training:
                first, own = distributed.row_offset(len(features)), len(features)
                projected = self.projector(distributed.gather(features))[first : first + own]
            else:
                projected = self.projector(features)
            return F.normalize(projected.float(), dim=-1)


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Matrix products inside compute in `dtype`; None: as the weights are."""
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield
