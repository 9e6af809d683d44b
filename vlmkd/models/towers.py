"""A CLIP's towers in one call: trained, frozen as a teacher, and as the predictor that evaluators call.

Letters: B batch, N texts, T tokens, D embedding width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import ClipModel
from vlmkd.models.text_tower import encode_text, needed


class ClipOutput(NamedTuple):
    image_embeds: Tensor | None
    """Unit vectors [B, D], fp32, as the texts'; None without such an input."""
    text_embeds: Tensor | None
    logit_scale: Tensor
    """Scalar, fp32, not its logarithm."""
    logit_bias: Tensor | None
    """Scalar, fp32, of a SigLIP-like model."""


class ClipTowers(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> ClipOutput:
        """images [B, 3, h, w] in the model's statistics, tokens int64 [B, T]; either may be left out."""
        image_embeds = text_embeds = None
        if images is not None:
            features = self.model.encode_image(images.to(compute_dtype(self.model.visual)))
            image_embeds = F.normalize(features.float(), dim=-1)
        if tokens is not None:
            text_embeds = F.normalize(encode_text(self.model, tokens).float(), dim=-1)
        scale = self.model.logit_scale.float().exp().reshape(())
        bias = None if self.model.logit_bias is None else self.model.logit_bias.float().reshape(())
        return ClipOutput(image_embeds, text_embeds, scale, bias)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """What the module's inputs must have."""
    return next(module.parameters()).dtype


class ClipTeacher(ClipTowers):
    """A frozen CLIP that accepts images in `student_spec`'s statistics, always in eval mode."""

    def __init__(self, clip: ClipModel, student_spec: ImageSpec) -> None:
        super().__init__(clip.module.eval().requires_grad_(False))
        self.clip, self.student_spec = clip, student_spec

    def train(self, mode: bool = True) -> ClipTeacher:
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: Tensor | None = None, tokens: Tensor | None = None, own_statistics: bool = False
    ) -> ClipOutput:
        """As ClipTowers', around which ZeRO 3 gathers the weights; `own_statistics`: the images are a view of the teacher's."""
        if images is not None and not own_statistics:
            images = convert_images(images, self.student_spec, self.clip.image_spec)
        return super().forward(images, tokens)


def convert_images(images: Tensor, source: ImageSpec, target: ImageSpec) -> Tensor:
    """images [B, 3, h, w] from `source`'s statistics and size to `target`'s.

    The change of statistics is exact. An interpolated size is not what the teacher would see of the original, of which the
    loader can make a view.
    """
    if source.mean != target.mean or source.std != target.std:
        # (x * std + mean - mean') / std', as one multiplication and one addition; in fp32
        statistics = (source.mean, source.std, target.mean, target.std)
        facts = torch.tensor(statistics, dtype=torch.float32, device=images.device)
        mean, std, new_mean, new_std = facts.view(4, 3, 1, 1)
        images = torch.addcmul((mean - new_mean) / new_std, images.float(), std / new_std)
    if tuple(images.shape[-2:]) != target.size:
        images = F.interpolate(
            images.float(), size=target.size, mode=target.interpolation, antialias=True, align_corners=False
        )
    return images


class ClipPredictor:
    """A DualEncoder around any module with ClipTowers' forward (an engine's wrapper too)."""

    def __init__(
        self, name: str, encoder: nn.Module, image_spec: ImageSpec, tokenizer: Callable[[list[str]], Tensor]
    ) -> None:
        self.name, self.image_spec = name, image_spec
        self._encoder, self._tokenizer = encoder, tokenizer

    @classmethod
    def of(cls, clip: ClipModel, name: str = "") -> ClipPredictor:
        return cls(name or clip.source, ClipTowers(clip.module), clip.image_spec, clip.tokenizer)

    def encode_image(self, images: Tensor) -> Tensor:
        return self._run(images.to(next(self._encoder.parameters()).device)).image_embeds

    def encode_text(self, texts: list[str]) -> Tensor:
        return self._run(tokens=self._tokens(texts)).text_embeds

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """N texts -> [N, D] fp32, not normalised."""
        model: Any = self._encoder.model
        with evaluating(self._encoder):
            return encode_text(model, self._tokens(texts)).float()

    @property
    def logit_scale(self) -> float:
        return float(self._run().logit_scale)

    def _tokens(self, texts: list[str]) -> Tensor:
        """Without padding that does not count, which is found before they move to the device."""
        model, parameter = getattr(self._encoder, "model", self._encoder), next(self._encoder.parameters())
        return needed(model, self._tokenizer(texts)).to(parameter.device)

    @torch.no_grad()
    def _run(self, images: Tensor | None = None, tokens: Tensor | None = None) -> Any:
        with evaluating(self._encoder):
            return self._encoder(images, tokens)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, afterwards each part in its former mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
