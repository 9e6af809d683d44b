"""Raw samples, what makes one complete, and its views; shared by the loader, the teacher store and the tools."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlmkd.config import DataConfig, LabelledDataConfig
from vlmkd.data.decode import BadSample, decode, image_size
from vlmkd.data.transforms import View, ViewConfig, reduction_for, render
from vlmkd.image_spec import ImageSpec


@dataclass(slots=True)
class RawSample:
    """One undecoded sample, or one thing that went wrong in its place."""

    shard: str
    """Short name of its shard; empty for items."""
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""
    """Empty, or why this is no sample: `broken_tar`, `duplicate_key`."""
    detail: str = ""
    position: tuple[int, int, int] = (0, 0, 0)
    """See `vlmkd.data.shards`."""
    source: int = 0
    """Index of the source or stream that it was drawn from."""
    seed: str = ""
    """Seed of all that is random about its view."""
    turn: int | None = None
    """Number of its view, where the source decides on that; None: drawn by `seed`."""
    item: Any = None
    """The item itself."""

    @property
    def name(self) -> str:
        """`shard/key`, as in a batch's `keys`."""
        return "/".join(part for part in (self.shard, self.key) if part)


def view_config(cfg: DataConfig | LabelledDataConfig) -> ViewConfig:
    """The distribution of training views that `cfg` asks for."""
    (low, high), (narrow, wide) = cfg.crop_scale, cfg.crop_ratio
    colours = (cfg.hue, cfg.grayscale) if isinstance(cfg, LabelledDataConfig) else ()
    return ViewConfig((low, high), (narrow, wide), cfg.flip, cfg.color_jitter, *colours)


def members(cfg: DataConfig) -> frozenset[str]:
    """The tar members that a sample needs."""
    return frozenset([*cfg.image_keys, cfg.text_key])


def unpack(raw: RawSample, image_keys: Sequence[str], text_key: str) -> tuple[bytes, str]:
    """Image bytes and caption of a raw sample; with an empty `text_key` no caption is asked for.

    Raises:
        BadSample: it lacks one, or is a marker of what went wrong.
    """
    if raw.reason:
        raise BadSample(raw.reason, raw.detail)
    image = next((raw.members[key] for key in image_keys if key in raw.members), None)
    if image is None:
        raise BadSample("missing_image", f"has none of {', '.join(image_keys)}")
    text = raw.members.get(text_key, b"").decode("utf-8", errors="replace").strip()
    if text_key and not text:
        raise BadSample("missing_caption", f"has no text in {text_key}")
    return image, text


def checked_size(image: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height from the image's header.

    Raises:
        BadSample: `undecodable_image`; `oversized_image` above `max_pixels`.
    """
    width, height = image_size(image)
    if width * height > max_pixels:
        raise BadSample("oversized_image", f"{width}x{height} is more than data.max_pixels={max_pixels}")
    return width, height


def views_of(
    image: bytes, size: tuple[int, int], views: Sequence[View], specs: list[ImageSpec]
) -> list[list[Tensor]]:
    """uint8 [h,w,3] of each view for each spec, from one decoding; transparency lies on the first spec's fill.

    Raises:
        BadSample: `undecodable_image`.
    """
    reduction = min(reduction_for(view, specs) for view in views)
    pixels = decode(image, fill=specs[0].fill, reduction=reduction)
    width, height = size
    if pixels.shape[:2] != (-(-height // reduction), -(-width // reduction)):
        told = f"header says {width}x{height}, pixels are {tuple(pixels.shape)}"
        raise BadSample("undecodable_image", told)
    return [[render(pixels, view, spec, reduction) for spec in specs] for view in views]


def sample_digest(image: bytes, text: str) -> bytes:
    """sha256 over the image's bytes and the caption."""
    return hashlib.sha256(image + text.encode("utf-8")).digest()
