"""A tiny CLIP, and small evaluation sets in the layouts that people have."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmkd.evaluation.base import Context
from vlmkd.image_spec import ImageSpec

SPEC = ImageSpec(
    size=(32, 32), mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
CLASSES = [
    "tench",
    "hot dog",
    "school bus",
    "goose",
    "daisy",
    "cup",
    "violin",
    "zebra",
    "igloo",
    "pizza",
    "fox",
    "oboe",
]


@dataclass
class Encoder:
    """A DualEncoder over any open_clip model."""

    model: torch.nn.Module
    name: str = "tiny"
    image_spec: ImageSpec = SPEC
    logit_scale: float = 100.0

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images, normalize=True)

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(open_clip.tokenize(texts, context_length=16), normalize=True)


def tiny_clip(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    return open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder(tiny_clip(0))


@pytest.fixture
def context() -> Context:
    return Context(batch_size=7, progress=False)


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture, so that JPEG keeps what tells it from others."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val/<class>/*.jpg with 8 pictures of each of 12 classes."""
    root = tmp_path_factory.mktemp("folders")
    for label in range(len(CLASSES)):
        folder = root / "val" / f"c{label:02d}"
        folder.mkdir(parents=True)
        for number in range(8):
            (folder / f"{number}.jpg").write_bytes(encoded(100 * label + number))
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root


class FixedEncoder:
    """A DualEncoder whose vectors are given: images by their top left red value, texts by number in the text."""

    name = "fixed"
    logit_scale = 10.0
    image_spec = ImageSpec(size=(2, 2), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self.images, self.texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.images[(images[:, 0, 0, 0] * 255).round().long()]

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.texts[[int("".join(filter(str.isdigit, text))) for text in texts]]


def numbered_png(number: int) -> bytes:
    """An image that FixedEncoder takes for image `number`."""
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()
