"""The published layout: names of transformers' SigLIP, strict loading, its configs, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM, SiglipVisionConfig, SiglipVisionModel

from projects.matvlm.config import HybridConfig
from projects.matvlm.convert import (
    MAMBA_CONFIG,
    WEIGHTS,
    fill,
    from_published,
    read_published,
    to_published,
    write_published,
)
from projects.matvlm.student import surgery
from projects.matvlm.surgery import mixers_of, to_hybrid
from tests.chat_parts import byte_tokenizer
from vlmkd.chat_config import MllmConfig
from vlmkd.errors import UserError
from vlmkd.export.folder import write_tensors
from vlmkd.export.mllm import ChatParts
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import Backbone
from vlmkd.models.mllm import Mllm, Projector, VisionTower
from vlmkd.tensor_files import read_safetensors

SPEC = ImageSpec(size=(24, 24), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def tower(seed: int) -> VisionTransformer:
    """A ViT as timm's SigLIPs are, 3 x 3 patches."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, class_token=False, global_pool="map",
        num_classes=0, act_layer="gelu_tanh",
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def siglip() -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval()


def parts(seed: int) -> ChatParts:
    """A stock model: tower, projector, Phi."""
    backbone = Backbone(tower(seed), 16, SPEC, {}, "timm:tiny")
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=260, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.3, eos_token_id=256, pad_token_id=256, bos_token_id=None,
    )  # fmt: skip
    decoder = PhiForCausalLM(config)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    module = Mllm(VisionTower(backbone, drop_first=True), Projector(16, 32), decoder).eval()
    cfg = MllmConfig(tower="timm:tiny", decoder="hf:tiny", resize="squash", drop_first=True)
    return ChatParts(module, byte_tokenizer(), backbone.image_spec, cfg, {}, "0")


def hybrid(seed: int, bias: Any = "never") -> ChatParts:
    made = parts(seed)
    to_hybrid(made.module.decoder, HybridConfig(layers=[0, 2], bias=bias))  # type: ignore[arg-type]
    return made


def logits(made: ChatParts) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (1, 14), generator=generator)
    ids[0, 2:10] = -200
    images = torch.randn(1, 3, 24, 24, generator=generator)
    batch = {
        "input_ids": ids, "segments": torch.ones_like(ids), "images": images,
        "image_rows": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    with torch.no_grad():
        return made.module.head(made.module(batch))


def test_the_tower_is_transformers_siglip_and_drops_the_first_of_its_places() -> None:
    torch.manual_seed(0)
    theirs, ours = siglip(), tower(1)
    for prefix in ("vision_tower._vision_tower.", "vision_tower._vision_tower.vision_model."):
        state = {prefix + name: value for name, value in theirs.state_dict().items()}
        found = from_published(state)
        ours.load_state_dict({name.removeprefix("tower.backbone."): value for name, value in found.items()})
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        out: Any = theirs(images, output_hidden_states=True)
        whole = VisionTower(Backbone(ours, 16, SPEC, {}))
        short = VisionTower(Backbone(ours, 16, SPEC, {}), drop_first=True)
        assert (whole.tokens, short.tokens) == (9, 8)
        torch.testing.assert_close(whole(images), out.hidden_states[-2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(short(images), out.hidden_states[-2][:, 1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(images), out.pooler_output, rtol=1e-4, atol=1e-5)
    back = to_published({f"tower.backbone.{name}": value for name, value in ours.state_dict().items()}, [])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("bias", ["never", "auto"])
def test_a_folder_goes_there_and_back_with_its_own_head(tmp_path: Path, bias: str) -> None:
    theirs = hybrid(1, bias)
    write_published(tmp_path / "published", theirs)
    told = json.loads((tmp_path / "published" / MAMBA_CONFIG).read_text())
    assert told["attn_layers"] == [1, 3] and told["is_bias"] == (bias == "auto")
    assert (told["d_inner"], told["d_xb"], told["ssm_cfg"]["d_state"]) == (32, 32, 8)
    state = read_safetensors(tmp_path / "published" / WEIGHTS)
    assert "language_model.model.layers.2.mamba.A_log" in state and "language_model.lm_head.bias" in state
    ours = parts(2)
    stock = {name: value.clone() for name, value in ours.module.state_dict().items()}
    fill(ours, tmp_path / "published")
    assert list(mixers_of(ours.module.decoder)) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert torch.equal(ours.module.head.weight, theirs.module.head.weight)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0)
    assert "decoder.lm_head.weight" in ours.trained
    assert ours.trained == {
        name
        for name, value in ours.module.state_dict().items()
        if not torch.equal(value, stock.get(name, value + 1))
    }
    again = parts(2)
    surgery(again.module.decoder, ours.facts)
    assert mixers_of(again.module).keys() == mixers_of(ours.module).keys()


def test_the_teacher_has_no_mixers_and_no_config_of_them(tmp_path: Path) -> None:
    write_published(tmp_path / "published", parts(1))
    assert not (tmp_path / "published" / MAMBA_CONFIG).exists()
    ours = parts(2)
    fill(ours, tmp_path / "published")
    torch.testing.assert_close(logits(ours), logits(parts(1)), rtol=0, atol=0)
    assert not ours.facts


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    write_published(folder, hybrid(1))
    weights, told = read_safetensors(folder / WEIGHTS), json.loads((folder / MAMBA_CONFIG).read_text())

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            fill(parts(2), folder)

    (folder / MAMBA_CONFIG).write_text(json.dumps({**told, "attn_layers": [0, 3]}))
    refused(r"attn_layers and is_bias are \[0, 3\] and False, the weights have attention in \[1, 3\]")
    (folder / MAMBA_CONFIG).write_text(json.dumps({**told, "attn_layers": 5}))
    refused("attn_layers and is_bias are 5 and False")
    (folder / MAMBA_CONFIG).unlink()
    refused("has mixers and no mamba_config.json")
    (folder / MAMBA_CONFIG).write_text(json.dumps(told))
    head = weights.pop("language_model.lm_head.weight")
    write_tensors(folder / WEIGHTS, weights)
    refused("1 missing: decoder.lm_head.weight")
    weights["language_model.lm_head.weight"] = head[:-1]
    write_tensors(folder / WEIGHTS, weights)
    refused("1 resized: ")
    weights["language_model.lm_head.weight"] = head
    write_tensors(folder / WEIGHTS, {**weights, "language_model.model.extra": head})
    refused("1 unexpected: decoder.model.extra")
    write_tensors(folder / WEIGHTS, {**weights, "language_model.model.layers.0.self_attn.q_proj.bias": head})
    refused(r"layers \[0\] have attention and a mixer")
    name = "language_model.model.layers.0.mamba.conv1d.weight"
    write_tensors(folder / WEIGHTS, {**weights, name: weights[name].repeat(2, 1, 1)})
    refused(r"conv1d.weight has 192 channels, not 96: keys and values are repeated before the convolution")
    other = hybrid(1)
    other.config = replace(other.config, tower_norm=True)
    with pytest.raises(UserError, match="one layer of a SigLIP of timm as it is, not .* tower_norm=True"):
        write_published(tmp_path / "other", other)


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    write_published(tmp_path / "published", hybrid(1))
    weights = read_safetensors(tmp_path / "published" / WEIGHTS)
    names = sorted(weights)
    folder = tmp_path / "published"
    for number, half in enumerate((names[::2], names[1::2])):
        write_tensors(folder / f"{number}.safetensors", {name: weights[name] for name in half})
    index = {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / WEIGHTS).unlink()
    state, mamba, biased = read_published(folder)
    assert state.keys() == weights.keys() and mamba == [0, 2] and not biased
