"""Parameter and multiply-add counts against the published table of TinyCLIP and closed forms."""

from __future__ import annotations

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from scripts.evaluation_command import count_parameters, latency_ms
from vlmkd import zoo
from vlmkd.evaluation.efficiency import macs_of


@pytest.mark.parametrize(
    ("name", "vision", "text"),
    [
        ("TinyCLIP-ViT-8M-16-Text-3M-YFCC15M", 8.28, 2.52),
        ("TinyCLIP-ResNet-19M-Text-19M-LAION400M", 18.60, 19.48),
    ],
)
def test_published_parameters(name: str, vision: float, text: float) -> None:
    architecture = zoo.entry(name).architecture
    with torch.device("meta"):
        model = CLIP(**architecture)
    count = count_parameters(model)
    assert (round(count.vision / 1e6, 2), round(count.text / 1e6, 2)) == (vision, text)
    assert count.token_table == 49408 * architecture["text_cfg"]["width"]
    assert count.total == sum(parameter.numel() for parameter in model.parameters()) and count.other == 1


def test_custom_text_tower_is_split_the_same_way() -> None:
    architecture = zoo.entry("TinyCLIP-ViT-8M-16-Text-3M-YFCC15M").architecture
    with torch.device("meta"):
        assert count_parameters(CustomTextCLIP(**architecture)) == count_parameters(CLIP(**architecture))


def _closed_form(layers: int, width: int, tokens: int) -> int:
    """Multiply-adds of a transformer: projections and feed-forward 12 d^2 n, attention 2 n^2 d, per layer."""
    return layers * (12 * width**2 * tokens + 2 * tokens**2 * width)


def test_multiply_adds_equal_the_closed_form() -> None:
    """TinyCLIP-ViT-8M/16: the paper prints 2.0 G for one pair."""
    architecture = zoo.entry("TinyCLIP-ViT-8M-16-Text-3M-YFCC15M").architecture
    model = CLIP(**architecture)
    vision = macs_of(model, model.encode_image, torch.zeros(1, 3, 224, 224))
    text = macs_of(model, model.encode_text, torch.zeros(1, 77, dtype=torch.long))
    assert vision == _closed_form(10, 256, 197) + 196 * 3 * 16 * 16 * 256 + 256 * 512
    assert text == _closed_form(3, 256, 77) + 256 * 512
    assert round((vision + text) / 1e9, 1) == 2.0
    assert model.training and torch.backends.mha.get_fastpath_enabled()


def test_latency_is_the_median_of_the_measured_calls() -> None:
    calls = []
    value = latency_ms(lambda x: calls.append(1) or x, torch.zeros(1))
    assert value >= 0 and len(calls) == 13
