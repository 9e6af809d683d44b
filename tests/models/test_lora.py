"""Low-rank updates against the merged weights in float64, and what an export of them holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import export
from tests.chat_parts import byte_tokenizer
from vlmkd.chat_config import MllmConfig
from vlmkd.export.mllm import (
    WEIGHTS,
    ChatParts,
    build_mllm,
    check_mllms,
    export_digest,
    export_mllm,
    load_mllm,
)
from vlmkd.models.lora import LoraLinear, add_lora, merge_lora

RANK = 3


def decoder() -> LlamaForCausalLM:
    sizes = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(sizes).eval()


def shaken(module: torch.nn.Module) -> None:
    """Updates that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)


def test_an_update_is_zero_at_first_and_adds_its_product() -> None:
    model, ids = decoder().double(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        add_lora(model.model, RANK)
        assert torch.equal(model(ids).logits, before)
        shaken(model)
        after = model(ids).logits
        assert not torch.allclose(after, before)
        plain = decoder().double()
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLinear):
                plain.get_submodule(name).weight += layer.lora_B @ layer.lora_A
        torch.testing.assert_close(after, plain(ids).logits)
        merged = merge_lora(model.model)
        torch.testing.assert_close(model(ids).logits, after, rtol=1e-5, atol=1e-7)
    assert len(merged) == 14 and not any("lora" in name for name in model.state_dict())
    assert model.state_dict().keys() == plain.state_dict().keys()


def small(tmp_path: Path) -> ChatParts:
    """An image model with updates that are not zero."""
    decoder().save_pretrained(tmp_path / "decoder")
    byte_tokenizer().save_pretrained(tmp_path / "decoder")
    cfg = MllmConfig(
        tower="efficientnet-lite0", tower_layers=[-1], grid=2, image_size=64, lora_rank=RANK,
        decoder=f"hf:{tmp_path / 'decoder'}",
    )  # fmt: skip
    parts = build_mllm(cfg, keep_lora=True)
    shaken(parts.module)
    parts.trained = {name for name in parts.module.state_dict() if ".lora_" in name or "projector" in name}
    return parts


def test_an_export_is_written_anew_in_half_precision(tmp_path: Path) -> None:
    parts = replace(small(tmp_path), project="llava_mod")
    run, half = tmp_path / "run", tmp_path / "half"
    export_mllm(run / "export", parts, parts.module.state_dict())
    assert export.main([str(run), str(half), "--half"]) == 0
    loaded = load_mllm(half, keep_lora=True)
    assert loaded.trained == parts.trained and loaded.project == "llava_mod"
    for name in parts.trained:
        was = parts.module.state_dict()[name]
        assert torch.equal(loaded.module.state_dict()[name], was.half().float()), name
    whole, small_one = ((one / WEIGHTS).stat().st_size for one in (run / "export", half))
    assert small_one < 0.6 * whole
    assert export_digest(str(run)) == export_digest(str(run / "export")) != export_digest(str(half))


def test_an_export_holds_the_updates_and_loads_with_or_without_them(tmp_path: Path) -> None:
    parts, folder = small(tmp_path), tmp_path / "export"
    probe = export_mllm(folder, parts, parts.module.state_dict())
    check_mllms({folder: probe})
    kept, merged = load_mllm(folder, keep_lora=True), load_mllm(folder)
    assert kept.trained == parts.trained and kept.config.lora_rank == RANK
    for name, value in parts.module.state_dict().items():
        assert torch.equal(kept.module.state_dict()[name], value), name
    assert merged.config.lora_rank == 0 and not any("lora" in name for name in merged.module.state_dict())
    # The merged model is a plain one: its export holds the changed weights.
    again = tmp_path / "plain"
    export_mllm(again, merged, merged.module.state_dict())
    plain = load_mllm(again)
    assert all(torch.equal(plain.module.state_dict()[n], v) for n, v in merged.module.state_dict().items())
    layer = "decoder.model.layers.1.mlp.up_proj"
    update = parts.module.get_submodule(layer)
    assert isinstance(update, LoraLinear)
    expected = update.weight.double() + update.lora_B.double() @ update.lora_A.double()
    actual = merged.module.get_submodule(layer).weight.double()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert merged.trained >= {f"{layer}.weight"}


@pytest.mark.parametrize("fixed", ["decoder.model.layers.0.mlp.up_proj.weight", "decoder.model.norm.weight"])
def test_what_is_updated_is_not_trained_itself(tmp_path: Path, fixed: str) -> None:
    from projects.llava_mod.config import LlavaModConfig
    from projects.llava_mod.student import train_parts
    from vlmkd import config

    model = torch.nn.ModuleDict({"decoder": decoder(), "projector": torch.nn.Linear(2, 2)})
    cfg = config.load(
        LlavaModConfig,
        ["stage=sft", "student.tower=a", "student.decoder=hf:b", "data.chats=[c]", f"run_dir={tmp_path}"],
    )
    train_parts(model, cfg)
    parameters = dict(model.named_parameters())
    assert parameters[fixed].requires_grad
    add_lora(model["decoder"].model, RANK)
    train_parts(model, cfg)
    parameters = dict(model.named_parameters())
    assert not parameters[fixed].requires_grad
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert trained == {name for name in parameters if ".lora_" in name or "projector" in name}
