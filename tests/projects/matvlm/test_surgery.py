"""Attention-to-Mamba-2 surgery on tiny Phi, Llama and Qwen2 decoders; generation with the hybrid cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from projects.matvlm.config import HybridConfig
from projects.matvlm.mixer import Mamba2Mixer
from projects.matvlm.surgery import chosen_layers, mixers_of, to_hybrid
from vlmkd.errors import UserError
from vlmkd.models.mllm import masks

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
KINDS = {
    "phi": lambda **more: PhiForCausalLM(PhiConfig(**SIZES, **more)),
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **more)),
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=3, **more)),
}
FIRST = HybridConfig(layers=[0, 2])


def made(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = KINDS[kind](**more).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Three rows with padding on the left, their mask and positions."""
    mask = (torch.arange(12) >= torch.tensor([[0], [5], [10]])).long()
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0)) * mask
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    assert found.shape == wanted.shape and wanted.std() > 0.01
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("preset", "layers"),
    [(12.5, [0, 6, 12, 18]), (25, [0, 4, 8, 12, 16, 20, 24, 28]), (50, list(range(0, 31, 2)))],
)
def test_presets_are_the_paper_s_lists(preset: Any, layers: list[int]) -> None:
    assert list(chosen_layers(HybridConfig(preset=preset), 32)) == layers
    shorter = chosen_layers(HybridConfig(preset=preset), 30)  # SmolLM2's depth
    assert list(shorter) == [layer for layer in layers if layer < 30]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (HybridConfig(layers=[0, 4]), r"layers \[4\] are not among the decoder's, 0 to 3"),
        (HybridConfig(layers=[-1, 2]), r"layers \[-1\] are not among"),
        (HybridConfig(layers=[2, 2]), r"layers \[2, 2\] name a layer twice"),
        (HybridConfig(layers=[0, 1, 2, 3]), "all 4 layers are to become Mamba-2; one has to stay attention"),
        (HybridConfig(), "give either preset .* or layers"),
        (HybridConfig(preset=25, layers=[1]), "give either preset .* or layers"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(options: HybridConfig, message: str) -> None:
    model = made("llama")
    with pytest.raises(UserError, match=message):
        to_hybrid(model, options)
    assert not mixers_of(model)


@pytest.mark.parametrize("bias", ["never", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_the_attention_s_to_the_bit(kind: str, bias: Any) -> None:
    model = made(kind)
    old = copy.deepcopy(model)
    others = {name: parameter for name, parameter in model.named_parameters()}
    to_hybrid(model, replace(FIRST, bias=bias))
    for index in (0, 2):
        mixer, attention = model.model.layers[index].self_attn, old.model.layers[index].self_attn
        assert isinstance(mixer, Mamba2Mixer) and mixer.layer_idx == index
        groups = {"phi": 6, "llama": 2, "qwen2": 3}[kind]
        assert (mixer.shape.heads, mixer.shape.kv_heads, mixer.shape.head_dim) == (6, groups, 8)
        out = attention.dense if kind == "phi" else attention.o_proj
        for name in ("weight", "bias"):
            if name == "bias" and (bias == "never" or kind == "llama"):
                assert mixer.in_proj.bias is None and mixer.out_proj.bias is None
                continue
            _, x, B, C, _ = getattr(mixer.in_proj, name).split(mixer.shape.rows)
            for rows, layer in ((x, attention.v_proj), (B, attention.k_proj), (C, attention.q_proj)):
                assert rows.equal(getattr(layer, name))
            copied = getattr(mixer.out_proj, name)
            assert copied.equal(getattr(out, name)) if getattr(out, name) is not None else not copied.any()
    for name, parameter in model.named_parameters():
        if ".layers.0.self_attn." not in name and ".layers.2.self_attn." not in name:
            assert parameter is others[name]
    assert model.config.layer_types == ["linear_attention", "full_attention"] * 2
    assert list(mixers_of(model)) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


def test_other_starts() -> None:
    attention = made("llama").model.layers[0].self_attn
    mixer = (
        to_hybrid(made("llama"), replace(FIRST, conv_start="identity", fold_scale=True, norm_start=0.1))
        .model.layers[0]
        .self_attn
    )
    C = mixer.in_proj.weight.split(mixer.shape.rows)[3]
    assert C.equal(attention.q_proj.weight * 8**-0.5)
    granite = GraniteForCausalLM(GraniteConfig(**SIZES, attention_multiplier=0.5))  # its own scale
    q_proj = granite.model.layers[0].self_attn.q_proj
    folded = to_hybrid(granite, replace(FIRST, fold_scale=True)).model.layers[0].self_attn
    assert folded.in_proj.weight.split(folded.shape.rows)[3].equal(q_proj.weight * 0.5)
    assert (mixer.norm.weight == 0.1).all()
    xBC = torch.randn(2, 5, 80, dtype=torch.float64)
    close(mixer._convolve(xBC, None, None, None)[0], torch.nn.functional.silu(xBC), 1e-15)
    random = to_hybrid(made("llama"), replace(FIRST, start="random")).model.layers[0].self_attn
    assert (random.norm.weight == 1).all()
    assert random.in_proj.weight.abs().max() <= 48**-0.5 and not random.out_proj.weight.equal(
        attention.o_proj.weight
    )
    again = to_hybrid(made("llama"), FIRST, torch.Generator().manual_seed(0)).model.layers[0].self_attn
    default = to_hybrid(made("llama"), FIRST).model.layers[0].self_attn
    assert all(a.equal(b) for a, b in zip(again.parameters(), default.parameters(), strict=True))


def test_a_higher_share_keeps_the_mixers_of_the_lower_one() -> None:
    model = to_hybrid(made("llama"), HybridConfig(layers=[0]))
    trained = model.model.layers[0].self_attn
    to_hybrid(model, FIRST)
    assert model.model.layers[0].self_attn is trained and len(mixers_of(model)) == 2
    to_hybrid(model, HybridConfig(layers=[0, 2, 3], chunk=16, backend="torch"))
    assert {(mixer.chunk, mixer.backend) for mixer in mixers_of(model).values()} == {(16, "torch")}
    assert model.config.matvlm["layers"] == [0, 2, 3] and len(model.model._forward_pre_hooks) == 1


@pytest.mark.parametrize(("preset", "trained"), [(12.5, 131_563_904), (25, 263_127_808), (50, 526_255_616)])
def test_the_paper_s_counts_on_the_meta_device(preset: Any, trained: int) -> None:
    config = PhiConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = PhiForCausalLM(config)
    before = sum(parameter.numel() for parameter in model.parameters())
    mixers = mixers_of(to_hybrid(model, HybridConfig(preset=preset))).values()
    assert sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters()) == trained
    grown = sum(parameter.numel() for parameter in model.parameters()) - before
    assert grown == len(mixers) * (32_890_976 - 26_224_640)


def test_attention_that_is_something_else_is_refused() -> None:
    with pytest.raises(
        UserError, match="layer 0: the attention has q_norm, k_norm, which a mixer has no place for"
    ):
        to_hybrid(Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)), FIRST)
    with pytest.raises(UserError, match="layer 0: the attention has q_layernorm, k_layernorm"):
        to_hybrid(made("phi", qk_layernorm=True), FIRST)
    gemma = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)
    with pytest.raises(UserError, match="Gemma2Model has sliding attention in a form of its own"):
        to_hybrid(Gemma2ForCausalLM(gemma), FIRST)
    model = made("llama")
    model.model.layers[2].self_attn = torch.nn.Identity()
    with pytest.raises(UserError, match="layer 2 has no attention with q, k, v and o projections: Identity"):
        to_hybrid(model, FIRST)
    assert not mixers_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_padding_is_each_row_alone(kind: str) -> None:
    model = to_hybrid(made(kind), FIRST)
    ids, mask, positions = prompts()
    right = [t.flip(1) for t in (ids, mask)]
    with torch.no_grad():
        left = model(ids, attention_mask=mask, position_ids=positions).logits
        flipped = model(right[0], right[1]).logits  # the mask by its place
        for row in range(3):
            close(left[row, mask[row] > 0], model(ids[row : row + 1, mask[row] > 0]).logits[0])
            close(
                flipped[row, right[1][row] > 0], model(right[0][row : row + 1, right[1][row] > 0]).logits[0]
            )


@pytest.mark.parametrize("kind", KINDS)
def test_documents_packed_in_a_row_are_each_alone(kind: str) -> None:
    model = to_hybrid(made(kind), FIRST)
    ids = torch.randint(3, 97, (1, 14))
    positions = torch.cat([torch.arange(n) for n in (5, 2, 7)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = [model(document).logits for document in ids.split((5, 2, 7), 1)]
    close(packed, torch.cat(alone, 1))
    whole = masks(
        torch.tensor([[1] * 5 + [2] * 2 + [3] * 7])
    )  # attention's own, as a model's forward passes it
    with torch.no_grad():
        close(model(ids, use_cache=False, **whole).logits, packed)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_prefill_and_decoding_of_a_padded_batch_are_the_forward(kind: str, plain: bool) -> None:
    model = to_hybrid(made(kind), FIRST)
    ids, mask, positions = prompts()
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=positions).logits
        for cuts in ((7, 5), (1, 2, 9), (9, 1, 1, 1)):
            cache = DynamicCache() if plain else DynamicCache(config=model.config)
            found, start = [], 0
            for cut in cuts:
                end = start + cut
                found.append(
                    model(
                        ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                        cache=cache,
                    ).logits
                )  # fmt: skip
                start = end
                assert cache.get_seq_length() == end
            close(torch.cat(found, 1)[mask > 0], wanted[mask > 0])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_uncached_forward_s(kind: str, options: dict[str, Any]) -> None:
    model = to_hybrid(made(kind), FIRST)
    ids, mask, _ = prompts()
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, **common, **options)
    if "num_beams" in options:
        assert cached.equal(model.generate(ids, **common, **options, use_cache=False))
        return
    for row in range(3):
        alone = ids[row : row + 1, mask[row] > 0]
        for _ in range(8):
            with torch.no_grad():
                alone = torch.cat([alone, model(alone, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert cached[row, mask[row].argmax() :].equal(alone[0])
    assert len(set(cached[:, 12:].flatten().tolist())) > 4  # it says more than one thing


def test_gradients_reach_the_mixers_alone_and_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointed in (False, True):
        model = to_hybrid(made("llama"), FIRST).train().requires_grad_(False)
        for mixer in mixers_of(model).values():
            mixer.requires_grad_(True)
        if checkpointed:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        ids, mask, positions = prompts()
        model(ids, attention_mask=mask, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1]) and all(".self_attn." in name for name in grads[0])
    assert len(grads[0]) == 2 * 8
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
