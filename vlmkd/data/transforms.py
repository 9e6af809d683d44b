"""Image transforms from a model's own statistics: training views and open_clip's evaluation transform.

A *view* is all that is random about a training image. Student and teachers see the same view, each at its own input size
and by its own statistics; a stored view can be replayed. H, W: pixels of a decoded image; h, w: of a model's input.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmkd.config import LabelledDataConfig, fitted
from vlmkd.data.decode import REDUCTIONS, to_rgb
from vlmkd.image_spec import ImageSpec

_GRID_SHARE = 128  # a crop of at least so many grid steps may be snapped to the grid
_SHARPNESS = 2  # a crop is decoded smaller only while it stays so many times the model's input

NO_JITTER = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """One random view of an image."""

    box: tuple[int, int, int, int]
    """Left, top, width and height in pixels of the whole image."""
    flip: bool = False
    jitter: tuple[float, ...] = NO_JITTER
    """Factors of brightness, contrast and saturation, applied in this order after resizing."""
    hue: float = 0.0
    """Shift along the colour circle, as a share of it; after the factors."""
    grey: bool = False
    """Last of all."""


@dataclass(frozen=True)
class ViewConfig:
    """Distribution of views; the fields of `LabelledDataConfig` with the same names."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    color_jitter: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        plain = {name: list(one) if isinstance(one, tuple) else one for name, one in vars(self).items()}
        fitted(LabelledDataConfig, plain, "data")

    def draw(self, width: int, height: int, rng: random.Random) -> View:
        """A view of a W x H image: torchvision's RandomResizedCrop box on a grid that suits fast decoding."""
        box = _snap(self._box(width, height, rng))
        flip = rng.random() < self.flip
        jitter: tuple[float, ...] = NO_JITTER
        if spread := self.color_jitter:
            low, high = 1 - spread, 1 + spread
            jitter = tuple(_float32(rng.uniform(low, high)) for _ in NO_JITTER)
        # Last and only when asked for, so that views without them stay what they were.
        hue = _float32(rng.uniform(-self.hue, self.hue)) if self.hue else 0.0
        grey = rng.random() < self.grayscale if self.grayscale else False
        return View(box, flip, jitter, hue, grey)

    def _box(self, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
        # No box fits: the largest central one within the ratio bounds.
        w, h = width, height
        if width / height < self.crop_ratio[0]:
            h = max(round(width / self.crop_ratio[0]), 1)
        elif width / height > self.crop_ratio[1]:
            w = max(round(height * self.crop_ratio[1]), 1)
        return (width - w) // 2, (height - h) // 2, w, h


def _float32(value: float) -> float:
    """Rounded to float32, in which views are stored."""
    return float(torch.tensor(value, dtype=torch.float32))


def _snap(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The box moved inwards to multiples of 2, 4 or 8 where that changes its sides by less than 2 %."""
    left, top, width, height = box
    grid = next(r for r in REDUCTIONS if r == 1 or min(width, height) >= _GRID_SHARE * r)
    right, bottom = (left + width) // grid * grid, (top + height) // grid * grid
    left, top = -(-left // grid) * grid, -(-top // grid) * grid
    return left, top, right - left, bottom - top


def reduction_for(view: View, specs: list[ImageSpec]) -> int:
    """The coarsest decoding that keeps the crop on whole pixels and twice as large as every input."""
    height, width = (max(spec.size[side] for spec in specs) for side in (0, 1))
    for reduction in REDUCTIONS[:-1]:
        exact = all(edge % reduction == 0 for edge in view.box)
        factor = _SHARPNESS * reduction
        if exact and view.box[2] >= factor * width and view.box[3] >= factor * height:
            return reduction
    return 1


def render(pixels: Tensor, view: View, spec: ImageSpec, reduction: int = 1) -> Tensor:
    """The view of uint8 [H,W,3] pixels, decoded at 1/reduction, as uint8 [h,w,3].

    torch's antialiased uint8 resizing is within one grey level of Pillow's and about five times as fast.
    """
    left, top, width, height = (edge // reduction for edge in view.box)
    crop = pixels[top : top + height, left : left + width].permute(2, 0, 1).unsqueeze(0)
    out = F.interpolate(crop, size=spec.size, mode=spec.interpolation, antialias=True)
    if view.flip:
        out = out.flip(-1)
    if view.jitter != NO_JITTER or view.hue or view.grey:
        out = _recolour(out, view)
    return out[0].permute(1, 2, 0)


def _recolour(images: Tensor, view: View) -> Tensor:
    """The view's colour changes on uint8 [1,3,h,w], in float, in a fixed order (torchvision's ColorJitter draws it)."""
    from torchvision.transforms import functional as tv

    x = images.float() / 255
    if view.jitter != NO_JITTER:
        brightness, contrast, saturation = view.jitter
        x = tv.adjust_contrast(tv.adjust_brightness(x, brightness), contrast)
        x = tv.adjust_saturation(x, saturation)
    if view.hue:
        x = tv.adjust_hue(x, view.hue)
    if view.grey:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    return (x * 255).round().to(torch.uint8)


def normalise(images: Sequence[Tensor], spec: ImageSpec) -> Tensor:
    """uint8 [h,w,3] images as float32 [B,3,h,w] in the statistics of `spec`."""
    height, width = images[0].shape[:2]
    batch = torch.empty(len(images), 3, height, width)
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    for image, place in zip(images, batch, strict=True):  # one image at a time stays in the processor's cache
        place.copy_(image.permute(2, 0, 1)).div_(255).sub_(mean).div_(std)
    return batch


def eval_transform(spec: ImageSpec) -> Callable[[Image.Image], Tensor]:
    """Pillow image -> float32 [3,h,w] as in open_clip, but transparency lies on `fill`, and palettes are resized in RGB."""
    from open_clip import image_transform
    from torchvision.transforms import Compose

    fill: Any = spec.fill
    resized = image_transform(
        spec.size, is_train=False, mean=spec.mean, std=spec.std, resize_mode=spec.resize_mode,
        interpolation=spec.interpolation, fill_color=fill,
    )  # fmt: skip
    return Compose([partial(to_rgb, fill=spec.fill), resized])
