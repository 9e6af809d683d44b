"""open_clip and transformers compute the same embeddings from converted weights, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from scripts.export_hf import to_hf_config, to_hf_processor
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import build_clip, load_clip
from vlmkd.models.convert import (
    from_hf_config,
    from_hf_processor,
    from_hf_state,
    is_hf_state,
    mlp_ratio,
    to_hf_state,
)


def tiny(vocabulary: int = 64, **text: Any) -> dict[str, Any]:
    return {
        "embed_dim": 24,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 64,
            "layers": 2,
            "head_width": 32,
            "mlp_ratio": 3.0,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": vocabulary,
            "width": 48,
            "heads": 3,
            "layers": 3,
            **text,
        },
    }


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter random, so that no two are equal by their initialisation."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module.eval()


def transformers_model(config: dict[str, Any], state: dict[str, Tensor]) -> CLIPModel:
    model = CLIPModel(CLIPConfig.from_dict(to_hf_config(config))).eval()
    missing, unexpected = model.load_state_dict(to_hf_state(state), strict=False)
    assert not [name for name in missing if "position_ids" not in name] and not unexpected
    return model


def inputs(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Pixels, and texts of different lengths that end with the highest id and are padded with 0."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, vocabulary - 1, (4, 8), generator=generator)
    for row, end in enumerate((3, 5, 7, 2)):
        tokens[row, end] = vocabulary - 1
        tokens[row, end + 1 :] = 0
    return torch.randn(4, 3, 32, 32, generator=generator), tokens


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("vocabulary", [64, 49408])
def test_transformers_computes_the_same(vocabulary: int, quick_gelu: bool) -> None:
    config = tiny(vocabulary) | {"quick_gelu": quick_gelu}
    module = randomised(build_clip(config))
    other = transformers_model(config, module.state_dict())
    images, tokens = inputs(vocabulary)
    with torch.no_grad():
        image, text, scale = module(images, tokens)
        output = other(pixel_values=images, input_ids=tokens)
    assert torch.allclose(output.image_embeds, image, atol=1e-5)
    assert torch.allclose(output.text_embeds, text, atol=1e-5)
    assert torch.allclose(output.logits_per_image, scale * image @ text.T, atol=1e-4)


def test_the_wrong_activation_would_be_noticed() -> None:
    config = tiny()
    module = randomised(build_clip(config))
    other = transformers_model(config | {"quick_gelu": True}, module.state_dict())
    images, tokens = inputs(64)
    with torch.no_grad():
        difference = other(pixel_values=images, input_ids=tokens).image_embeds - module(images, tokens)[0]
    assert difference.abs().max() > 1e-4


def test_pooling_at_a_named_end_id() -> None:
    config = tiny(pool_type="eos", eos_id=7)
    module = randomised(build_clip(config))
    _, tokens = inputs(64)
    tokens[:, 4] = 7
    with torch.no_grad():
        text = module.encode_text(tokens, normalize=True)
        features = transformers_model(config, module.state_dict()).text_model(input_ids=tokens).pooler_output
        other = features @ module.text_projection
    assert torch.allclose(F.normalize(other, dim=-1), text, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_round_trip_is_the_identity(quick_gelu: bool) -> None:
    config = tiny() | {"quick_gelu": quick_gelu}
    state = build_clip(config, seed=0).state_dict()
    converted = to_hf_state(state)
    assert is_hf_state(converted) and not is_hf_state(state)
    back = from_hf_state(converted)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    again = to_hf_state(back)
    assert again.keys() == converted.keys()
    assert all(torch.equal(again[name], converted[name]) for name in converted)
    assert from_hf_config(to_hf_config(config), "x") == config


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(("eos", "vocabulary"), [(2, 50), (49, 50), (9, 50)])
def test_a_transformers_folder_loads(activation: str, eos: int, vocabulary: int, tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 2, "hidden_act": activation}
    config = CLIPConfig(
        text_config=tower
        | {
            "num_hidden_layers": 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": 8,
            "eos_token_id": eos,
        },
        vision_config=tower
        | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-3},
        projection_dim=20,
    )
    other = randomised(CLIPModel(config))
    other.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]})
    )
    from tests.small_tokenizer import train_tokenizer, write_tokenizer

    write_tokenizer(train_tokenizer(["a red cat", "a red dog", "red red"] * 3, 269), tmp_path, 8)
    loaded = load_clip(f"hf:{tmp_path}")
    assert loaded.config["quick_gelu"] is (activation == "quick_gelu")
    assert loaded.image_spec == ImageSpec(size=(32, 32), mean=(0.5, 0.4, 0.3), std=(1, 1, 1))
    assert loaded.tokenizer_folder == tmp_path
    images = torch.randn(3, 3, 32, 32)
    tokens = torch.randint(10, vocabulary - 1, (3, 8))
    tokens[:, 5] = vocabulary - 1 if eos == 2 else eos
    with torch.no_grad():
        output = other(pixel_values=images, input_ids=tokens)
        image, text, _ = loaded.module(images, tokens)
    assert torch.allclose(output.image_embeds, image, atol=1e-5)
    assert torch.allclose(output.text_embeds, text, atol=1e-5)


def test_a_transformers_folder_with_clips_vocabulary_uses_open_clips_tokenizer(tmp_path: Path) -> None:
    config = tiny(49408)
    save_file(to_hf_state(build_clip(config, seed=0).state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config)))
    loaded = load_clip(f"hf:{tmp_path}")
    assert loaded.tokenizer_folder is None
    assert loaded.tokenizer(["a cat"]).tolist() == [[49406, 320, 2368, 49407, 0, 0, 0, 0]]
    assert loaded.config == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}}, "no ResNet tower"),
        ({"vision_cfg": {"timm_model_name": "test_vit", "image_size": 32}}, "vision_cfg.timm_model_name"),
        ({"init_logit_bias": -10.0}, "init_logit_bias"),
        ({"text_cfg": {"no_causal_mask": True}}, "text_cfg.no_causal_mask"),
        ({"text_cfg": {"pool_type": "last"}}, "text_cfg.pool_type='last'"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type"),
        ({"vision_cfg": {"image_size": [32, 48]}}, "square"),
    ],
)
def test_what_transformers_lacks_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_hf_config(tiny() | change)


def test_foreign_tensors_are_named() -> None:
    state = build_clip(tiny()).state_dict()
    with pytest.raises(UserError, match="no place for visual.strange"):
        to_hf_state(state | {"visual.strange": torch.zeros(1)})
    with pytest.raises(UserError, match="no place for vision_model.strange.weight"):
        from_hf_state(to_hf_state(state) | {"vision_model.strange.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "siglip"}, "model_type is 'siglip'"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu_new"}}, "hidden_act"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "both towers need gelu"),
    ],
)
def test_foreign_transformers_configs_are_refused(hf: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf_config(hf, "config.json")


def test_defaults_are_transformers_own() -> None:
    from_ours = from_hf_config({"model_type": "clip"}, "x")
    assert from_ours == from_hf_config(CLIPConfig().to_dict(), "x")


def test_every_mlp_width_survives_open_clips_rounding() -> None:
    for width in (48, 63, 170, 512):
        for channels in range(1, 3000, 7):
            assert int(width * mlp_ratio(channels, width)) == channels


def tupled(preprocess: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in preprocess.items()}


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixel_statistics_round_trip_and_transformers_agrees(mode: str, interpolation: str) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessor

    spec = ImageSpec(
        size=(24, 24),
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
        interpolation=interpolation,
        resize_mode=mode,
    )
    processor = to_hf_processor(spec)
    assert ImageSpec(size=(24, 24), **tupled(from_hf_processor(processor))) == spec
    grey = Image.new("RGB", (40, 30), (51, 102, 255))
    values = CLIPImageProcessor(**processor)(images=grey, return_tensors="pt")["pixel_values"]
    expected = (torch.tensor([0.2, 0.4, 1.0]) - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    assert values.shape == (1, 3, 24, 24)
    assert torch.allclose(values, expected.view(1, 3, 1, 1).expand_as(values), atol=1e-5)


def test_padding_cannot_be_told_to_transformers() -> None:
    with pytest.raises(UserError, match="longest"):
        to_hf_processor(ImageSpec(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), resize_mode="longest"))
