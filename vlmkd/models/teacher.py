"""The frozen teacher: takes the student's pixels, converts them to its own statistics and size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import ClipModel, ClipOutput, encode


class ClipTeacher(nn.Module):
    """A frozen CLIP that accepts images in `student_spec`'s statistics.

    `scale` replaces the teacher's own logit scale (TinyCLIP: 50 for both); `dtype` is the type it computes in.
    Runs without gradients, and stays in eval mode whatever `train` says. Not in inference mode, because losses keep its
    outputs for their backward pass.
    """

    def __init__(
        self,
        clip: ClipModel,
        student_spec: ImageSpec,
        *,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = clip
        self.student_spec = student_spec
        self.fixed_scale = scale
        self.module = clip.module.to(dtype).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> ClipTeacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: Tensor | None = None, tokens: Tensor | None = None, own_statistics: bool = False
    ) -> ClipOutput:
        """images [B, 3, h, w] in the student's statistics, tokens [B, T] of the teacher's tokenizer -> ClipOutput.

        `own_statistics` says that the images are a view of the teacher's own: its size, its statistics. Either input
        may be left out. Everything goes through this call, because ZeRO 3 gathers a sharded teacher's weights in it.
        """
        if images is not None and not own_statistics:
            images = convert_images(images, self.student_spec, self.model.image_spec)
        return encode(self.module, images, tokens, self.fixed_scale)


def convert_images(images: Tensor, source: ImageSpec, target: ImageSpec) -> Tensor:
    """images [B, 3, h, w] from `source`'s statistics and size to `target`'s; returned as they are when both agree.

    Another size is made by bicubic or bilinear interpolation with antialiasing, as `target` says. The change of
    statistics is exact; an enlarged view is not what the teacher would see of the original, so the loader makes a view
    of its own where sizes differ, and this is the fallback.
    """
    if source.mean != target.mean or source.std != target.std:
        # (x * std + mean - mean') / std', as one multiplication and one addition; in fp32
        statistics = (source.mean, source.std, target.mean, target.std)
        mean, std, new_mean, new_std = torch.tensor(
            statistics, dtype=torch.float32, device=images.device
        ).view(4, 3, 1, 1)
        images = torch.addcmul((mean - new_mean) / new_std, images.float(), std / new_std)
    if tuple(images.shape[-2:]) != target.size:
        images = F.interpolate(
            images.float(), size=target.size, mode=target.interpolation, antialias=True, align_corners=False
        )
    return images
