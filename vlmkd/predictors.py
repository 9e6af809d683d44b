"""What evaluations, teacher stores and class vectors ask of a model; B images, N texts, D embedding width, C classes."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from vlmkd.image_spec import ImageSpec


class ImageEncoder(Protocol):
    image_spec: ImageSpec

    @property
    def logit_scale(self) -> float:
        """Factor of cosine similarities in the softmax, not its logarithm."""

    def encode_image(self, images: Tensor) -> Tensor:
        """[B,3,H,W] in the statistics of `image_spec` -> [B,D] unit vectors, float32."""


class TextEncoder(Protocol):
    name: str

    @property
    def logit_scale(self) -> float: ...

    def encode_text(self, texts: list[str]) -> Tensor:
        """N captions -> [N,D] unit vectors, float32."""


@runtime_checkable
class DualEncoder(ImageEncoder, TextEncoder, Protocol):
    """A model with one embedding space for images and texts."""


@runtime_checkable
class ImageClassifier(Protocol):
    """A model with a fixed list of classes."""

    name: str
    image_spec: ImageSpec
    class_names: list[str]

    def classify(self, images: Tensor) -> Tensor:
        """[B,3,H,W] in the statistics of `image_spec` -> [B,C] logits, float32."""
