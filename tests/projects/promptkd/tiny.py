"""Tiny CLIPs for PromptKD's tests, made without files or network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import ClipModel, build_clip, weights_digest

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def config(
    *,
    width: int = 32,
    layers: int = 3,
    embed_dim: int = 16,
    size: int = 16,
    pool: str = "argmax",
    quick: bool = True,
) -> dict[str, Any]:
    """An open_clip config with heads of 16 channels and a vocabulary of bytes."""
    return {
        "embed_dim": embed_dim,
        "quick_gelu": quick,
        "vision_cfg": {
            "image_size": size,
            "layers": layers,
            "width": width,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 40,
            "vocab_size": 259,
            "pool_type": pool,
            "eos_id": 258,
            "width": width,
            "heads": width // 16,
            "layers": layers,
        },
    }


def tokenizer(texts: list[str]) -> Tensor:
    """Bytes between a start token (257) and an end token (258), padded with 0 to 40 positions."""
    rows = []
    for text in texts:
        ids = [257, *(byte + 1 for byte in text.encode()[:38]), 258]
        rows.append(ids + [0] * (40 - len(ids)))
    return torch.tensor(rows)


def clip(seed: int = 0, **fields: Any) -> ClipModel:
    """A random CLIP whose weights, unlike an initialisation's, are all far from 0 and 1."""
    made = config(**fields)
    module = build_clip(made, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    size = made["vision_cfg"]["image_size"]
    spec = ImageSpec(size=(size, size), mean=MEAN, std=STD)
    digest = weights_digest(module.state_dict())
    return ClipModel(module.eval(), made, spec, tokenizer, f"tiny{seed}", digest)
