"""Text towers over the positions that count, against the same models' own encode_text over all of them."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from transformers import BertConfig, RobertaConfig

from vlmkd.models.clip import build_clip
from vlmkd.models.pruned_clip import PrunedCLIP
from vlmkd.models.text_tower import encode_text, needed

END, CONTEXT = 59, 20
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": CONTEXT, "vocab_size": 60, "width": 16, "heads": 2, "layers": 3}


def made(quick: bool = False, custom: bool = False, **text: Any) -> nn.Module:
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {**TEXT, **text}, "quick_gelu": quick}
    return build_clip({**config, "custom_text": custom}, seed=1)


def pruned() -> nn.Module:
    """Ragged layers, one without heads, one without channels."""
    tower = {"head_width": 8, "heads": [2, 0, 1], "mlp": [30, 8, 0], "width": 12}
    return build_clip(
        {
            "embed_dim": 8,
            "pruned": True,
            "activation": "gelu",
            "vision_cfg": {**tower, "image_size": 16, "patch_size": 8},
            "text_cfg": {**tower, "context_length": CONTEXT, "vocab_size": 60},
        },
        seed=1,
    )


def hugging_face(kind: str) -> nn.Module:
    """A CLIP around a tiny BERT (class token) or RoBERTa (mean over what is no padding)."""
    torch.manual_seed(1)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "vocab_size": 60,
        "max_position_embeddings": CONTEXT + 4,
        "pad_token_id": 0,
    }
    config, pooler = (BertConfig, "cls_pooler") if kind == "bert" else (RobertaConfig, "mean_pooler")
    model = made(custom=True)
    model.text = HFTextEncoder("", 8, config=config(**shape), pooler_type=pooler, proj_type="linear")
    return model.eval()


TOWERS = {
    "clip": made,
    "quick_gelu": lambda: made(quick=True),
    "eos": lambda: made(pool_type="eos", eos_id=END),
    "biased_projection": lambda: made(proj_bias=True),
    "no_projection": lambda: made(proj_type="none", width=8, heads=1),
    "custom": lambda: made(custom=True),
    "pruned": pruned,
    "bert": lambda: hugging_face("bert"),
    "roberta": lambda: hugging_face("roberta"),
}
WHOLE = {
    "both_ways": lambda: made(custom=True, no_causal_mask=True, pad_id=0),
    "last": lambda: made(custom=True, pool_type="last"),
    "class_token": lambda: made(custom=True, embed_cls=True, pad_id=0),
}
"""Towers whose padding counts."""


def texts(lengths: list[int], seed: int = 0) -> Tensor:
    """Random words, the end token at position `length` - 1, zeros behind it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, END, (length - 1,), generator=generator)
        row[length - 1] = END
    return tokens


def positions(model: nn.Module) -> list[int]:
    """Fills with the number of positions that the first block of the text tower computes."""
    text: Any = getattr(model, "text", model)
    blocks = text.transformer.encoder.layer if isinstance(text, HFTextEncoder) else text.transformer.resblocks
    seen: list[int] = []
    blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(TOWERS))
def test_features_are_those_of_the_whole_context(name: str, dtype: torch.dtype) -> None:
    model: Any = TOWERS[name]().to(dtype).eval()
    seen = positions(model)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    for lengths in ([1], [CONTEXT], [2, 9, 5], [3, CONTEXT, 1], [7] * 4):
        tokens = texts(lengths)
        with torch.no_grad():
            found, expected = encode_text(model, tokens), model.encode_text(tokens)
        assert seen[-2:] == [max(lengths), CONTEXT] and found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=limit * float(expected.abs().max()))


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_lengths(lengths: list[int], seed: int) -> None:
    """A text's feature depends neither on its padding nor on the texts beside it."""
    tokens = texts(lengths, seed)
    for model in PROPERTY:
        with torch.no_grad():
            found, expected = encode_text(model, tokens), model.encode_text(tokens)
            alone = torch.cat([encode_text(model, row[None]) for row in tokens])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-11)


PROPERTY: list[Any] = [TOWERS[name]().double().eval() for name in ("clip", "eos", "pruned", "roberta")]


@pytest.mark.parametrize("name", list(WHOLE))
def test_towers_whose_padding_counts_compute_it(name: str) -> None:
    model: Any = WHOLE[name]().eval()
    seen = positions(model)
    tokens = texts([3, 6])
    assert torch.equal(encode_text(model, tokens), model.encode_text(tokens))
    assert seen[0] >= CONTEXT


def test_a_coca_computes_everything() -> None:
    model: Any = build_clip(
        {
            "embed_dim": 8,
            "custom_text": True,
            "vision_cfg": {**VISION, "output_tokens": True, "attentional_pool": True},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {
                "context_length": CONTEXT,
                "vocab_size": 60,
                "width": 16,
                "heads": 2,
                "layers": 1,
            },
        },
        seed=1,
    ).eval()
    assert isinstance(model, open_clip.CoCa)
    tokens = texts([3, 6])
    with torch.no_grad():
        assert torch.equal(encode_text(model, tokens), model.encode_text(tokens))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["clip", "custom", "pruned"])
def test_gradients_are_those_of_the_whole_context(name: str, checkpointing: bool) -> None:
    tokens = texts([2, 9, 5])
    gradients = []
    for whole in (True, False):
        model: Any = TOWERS[name]().double().train()
        model.set_grad_checkpointing(checkpointing)
        features = model.encode_text(tokens) if whole else encode_text(model, tokens)
        features.square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    whole, found = gradients
    assert whole.keys() == found.keys()
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "custom", "eos", "pruned"])
def test_nothing_waits_for_a_device(name: str) -> None:
    """Where tokens lie on a device their length is not asked for; cut before they get there, they are taken as they are."""
    model: Any = TOWERS[name]().eval()
    tokens = texts([2, 9, 5])
    cut = needed(model, tokens)
    assert cut.shape == (3, 9) and torch.equal(cut, tokens[:, :9])
    elsewhere = model.to("meta")  # refuses whatever reads a value
    seen = positions(elsewhere)
    for part in (cut, tokens):
        assert encode_text(elsewhere, part.to("meta")).shape == (3, 8)
    assert seen == [9, CONTEXT]
    with pytest.raises((RuntimeError, NotImplementedError)):
        needed(elsewhere, tokens.to("meta"))


def test_dropout_of_a_training_tower_sees_all_positions() -> None:
    model: Any = hugging_face("bert").train()
    seen = positions(model)
    encode_text(model, texts([3, 6]))
    assert seen == [CONTEXT]


def test_a_batch_of_padding_alone_is_encoded() -> None:
    model = hugging_face("roberta")
    assert encode_text(model, torch.zeros(2, CONTEXT, dtype=torch.long)).shape == (2, 8)


def test_pruned_and_plain_models_are_told_apart() -> None:
    assert isinstance(pruned(), PrunedCLIP) and isinstance(made(), open_clip.CLIP)
