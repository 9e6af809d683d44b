"""load_clip, the encoder and the predictor, on tiny models; parameter counts of TinyCLIP's table (e)."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from projects.tinyclip.encoder import CLIPEncoder
from vlmkd import zoo
from vlmkd.errors import UserError
from vlmkd.models.clip import build_clip, load_clip, weights_digest
from vlmkd.models.pruned_clip import PrunedCLIP
from vlmkd.models.towers import ClipPredictor

CONFIGS = Path(__file__).parents[2] / "projects" / "tinyclip" / "configs" / "models"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


def tiny(**top: Any) -> dict[str, Any]:
    return {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2},
        **top,
    }


def siglip_like() -> dict[str, Any]:
    config = tiny(custom_text=True, init_logit_bias=-10.0, init_logit_scale=math.log(10.0))
    config["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return config


def write_json(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "model.json"
    path.write_text(json.dumps(config))
    return str(path)


def batch(vocabulary: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    return images, torch.randint(1, vocabulary, (3, 8), generator=generator)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A tiny architecture known to open_clip, with tags whose weights are a local file."""
    weights = tmp_path / "weights.pt"
    torch.save(build_clip(tiny(), seed=3).state_dict(), weights)
    openai = {"file": str(weights), "mean": OPENAI_MEAN, "std": (0.2, 0.2, 0.2), "interpolation": "bicubic"}
    tags = {
        "openai": openai | {"quick_gelu": True, "resize_mode": "shortest"},
        "plain": openai | {"resize_mode": "shortest"},
        "half_grey": {
            "file": str(weights),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.5, 0.5),
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", tiny())
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", tags)
    return tags


# ------------------------------------------------------------------------------------------------------- loading


def test_random_initialisation_depends_on_the_seed_alone(tmp_path: Path) -> None:
    model = write_json(tmp_path, tiny())
    torch.manual_seed(1)
    first = load_clip(model, seed=5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the global random state moved"
    torch.manual_seed(2)
    second, other = load_clip(model, seed=5), load_clip(model, seed=6)
    assert weights_digest(first.module.state_dict()) == weights_digest(second.module.state_dict())
    assert weights_digest(first.module.state_dict()) != weights_digest(other.module.state_dict())
    assert first.digest == ""


def test_weights_file_and_digest(tmp_path: Path) -> None:
    model, weights = write_json(tmp_path, tiny()), tmp_path / "weights.pt"
    original = build_clip(tiny(), seed=3)
    torch.save(original.state_dict(), weights)
    loaded = load_clip(model, str(weights))
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name]), name
    assert loaded.digest == weights_digest(original.state_dict())
    changed = original.state_dict()
    changed["ln_final.bias"] = changed["ln_final.bias"] + 1e-6
    assert loaded.with_weights(changed).digest != loaded.digest
    assert loaded.source == f"{model}@{weights}"
    assert not loaded.module.training


@pytest.mark.parametrize(("tag", "activation"), [("openai", QuickGELU), ("plain", nn.GELU)])
def test_activation_comes_from_the_tag(
    registered: dict[str, Any], tag: str, activation: type[nn.Module]
) -> None:
    loaded = load_clip("tiny-clip", tag)
    assert {type(part) for part in loaded.module.modules() if "GELU" in type(part).__name__} == {activation}
    assert loaded.image_spec.mean == OPENAI_MEAN


def test_pixel_statistics_come_from_the_tag(registered: dict[str, Any]) -> None:
    spec = load_clip("tiny-clip", "half-grey").image_spec
    assert (spec.size, spec.mean, spec.std) == ((32, 32), (0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    assert (spec.interpolation, spec.resize_mode) == ("bilinear", "squash")
    expected = open_clip.create_model_from_pretrained("tiny-clip", "half_grey", return_transform=False)
    assert expected.visual.preprocess_cfg["size"] == spec.size


def test_outputs_equal_open_clips_own_loader(registered: dict[str, Any]) -> None:
    images, tokens = batch()
    theirs = open_clip.create_model("tiny-clip", "openai", force_quick_gelu=True).eval()
    ours = load_clip("tiny-clip", "openai").module
    with torch.no_grad():
        for mine, other in zip(ours(images, tokens), theirs(images, tokens), strict=True):
            assert torch.equal(mine, other)


def test_config_beside_a_weights_file_gives_activation_and_statistics(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    torch.save(build_clip(tiny()).state_dict(), folder / "weights.pt")
    content = {
        "model_cfg": tiny(quick_gelu=True),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    loaded = load_clip(write_json(tmp_path, tiny()), str(folder / "weights.pt"))
    assert loaded.config["quick_gelu"] is True
    assert loaded.image_spec.mean == (0.1, 0.2, 0.3)


def test_zoo_entry_without_architecture_is_read_from_its_shapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = tmp_path / "zoo.pt"
    original = build_clip(tiny(), seed=1)
    torch.save({"state_dict": {f"module.{k}": v.half() for k, v in original.state_dict().items()}}, weights)
    entry = zoo.Entry(name="x", project="x", kind="release", source="", licence="", link="")
    monkeypatch.setattr(zoo, "entry", lambda name: entry)
    monkeypatch.setattr(zoo, "fetch", lambda name: weights)
    loaded = load_clip("zoo:x")
    assert loaded.source == "zoo:x"
    assert loaded.config["vision_cfg"]["layers"] == 2
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name].half().float())


def test_zoo_entry_with_a_config_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Activation and image preparation come from the entry, since a bare file does not hold them; others are no CLIP."""
    torch.save(build_clip(tiny(), seed=1).state_dict(), tmp_path / "zoo.bin")
    stated = {"architecture": tiny(quick_gelu=True), "preprocess": {"resize_mode": "squash"}}
    entry = zoo.Entry(name="x", project="x", kind="release", source="", licence="", link="", **stated)
    monkeypatch.setattr(zoo, "entry", lambda name: entry)
    monkeypatch.setattr(zoo, "fetch", lambda name: tmp_path / "zoo.bin")
    loaded = load_clip("zoo:x")
    assert loaded.config["quick_gelu"] is True and loaded.image_spec.resize_mode == "squash"
    assert loaded.image_spec.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    entry = dataclasses.replace(entry, format="dho")
    with pytest.raises(UserError, match="zoo:x is no CLIP"):
        load_clip("zoo:x")


def test_openais_zoo_entries_are_those_of_open_clip() -> None:
    """Address, sizes and activation are what open_clip has for the same name."""
    found = 0
    for entry in zoo.entries().values():
        if entry.name.startswith("OpenAI-CLIP-"):
            name = entry.name.removeprefix("OpenAI-CLIP-")
            assert entry.source == open_clip.pretrained.get_pretrained_url(name, "openai")
            assert entry.architecture == open_clip.get_model_config(f"{name}-quickgelu")
            found += 1
    assert found == 5
    dfn = zoo.entry("DFN5B-CLIP-ViT-H-14-378")
    assert dfn.architecture == open_clip.get_model_config("ViT-H-14-378-quickgelu")
    tag = open_clip.get_pretrained_cfg("ViT-H-14-378-quickgelu", "dfn5b")
    assert tag["hf_hub"].strip("/") in dfn.source
    assert {field: tag[field] for field in dfn.preprocess} == dfn.preprocess


def test_tokenizer_json_beside_the_config(tmp_path: Path) -> None:
    from tests.small_tokenizer import text_config, train_tokenizer, write_tokenizer

    config = tiny()
    config["text_cfg"] |= text_config(269, 8)
    model = write_json(tmp_path, config)
    with pytest.raises(UserError, match="tokenizer tokenizer.json is neither"):
        load_clip(model)
    write_tokenizer(train_tokenizer(["a red cat", "a red dog", "red red"] * 3, 269), tmp_path, 8)
    beside = load_clip(model)
    assert beside.tokenizer_folder == tmp_path
    ids = beside.tokenizer(["a red cat", ""])
    assert ids.shape == (2, 8) and ids.max() == 268


def test_token_ids_beyond_the_table_are_refused(tmp_path: Path) -> None:
    loaded = load_clip(write_json(tmp_path, tiny()))
    with pytest.raises(UserError, match="gives id 49407 for a table of 64 rows"):
        loaded.tokenizer(["a cat"])


def test_siglip_like_custom_text_loads(tmp_path: Path) -> None:
    original = build_clip(siglip_like(), seed=1)
    assert isinstance(original, open_clip.CustomTextCLIP)
    torch.save(original.state_dict(), tmp_path / "w.pt")
    loaded = load_clip(write_json(tmp_path, siglip_like()), str(tmp_path / "w.pt"))
    assert loaded.digest == weights_digest(original.state_dict())


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-33", "", "did you mean ViT-B-32"),
        ("ViT-B-32", "no_such_tag", "neither a file nor one of ViT-B-32's tags: openai"),
        ("missing.json", "", "model config missing.json does not exist"),
        ("local-dir:/nowhere", "", "no such folder"),
        ("hf:/nowhere", "", "no such folder"),
        ("zoo:TinyCLIP-ViT-39M", "", "did you mean"),
        ("zoo:x", "openai", "leave pretrained"),
    ],
)
def test_what_is_not_there_is_named(model: str, pretrained: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_clip(model, pretrained)


def test_a_tag_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_clip("ViT-B-32", "laion2b_e16")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "ViT-B-32@laion2b_e16",
        "hub repository timm/",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "scripts/download.py",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_cfg": {"image_size": 32, "widht": 64}},
            r"unknown field vision_cfg.widht; did you mean width\?",
        ),
        ({"mask_image": True}, "unknown field mask_image; remove it"),
        ({"embed_dim": None}, "field embed_dim is missing"),
    ],
)
def test_a_wrong_config_names_its_field(change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (tiny() | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        build_clip(config)


def test_folder_of_the_other_kind_is_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no open_clip_config.json; name it hf:PATH"):
        load_clip(f"local-dir:{tmp_path}")


def test_big_vision_and_timm_towers_are_built_by_open_clip() -> None:
    config = tiny()
    config["vision_cfg"] = {
        "timm_model_name": "test_vit",
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    }
    module = build_clip(config, seed=0)
    encoder = CLIPEncoder(module, activation_checkpointing=True)
    output = encoder(torch.randn(2, 3, 64, 64), batch()[1][:2])
    assert output.image_embeds.shape == (2, 32)


# ------------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("config", [tiny(), siglip_like()], ids=["clip", "siglip"])
def test_encoder_equals_open_clips_forward(config: dict[str, Any]) -> None:
    module = build_clip(config, seed=0).eval()
    images, tokens = batch()
    expected = module(images, tokens)
    output = CLIPEncoder(copy.deepcopy(module))(images, tokens)
    assert torch.allclose(output.image_embeds, expected[0], atol=1e-6)
    assert torch.allclose(output.text_embeds, expected[1], atol=1e-6)
    assert output.logit_scale.item() == pytest.approx(expected[2].item())
    if len(expected) == 4:
        assert output.logit_bias.item() == expected[3].item() == -10.0
    else:
        assert output.logit_bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_scale_is_exact_and_untrained_in_any_precision(dtype: torch.dtype) -> None:
    encoder = CLIPEncoder(build_clip(tiny(), seed=0), fixed_scale=50.0).to(dtype)
    output = encoder(*batch())
    assert output.logit_scale.item() == 50.0 and output.logit_scale.dtype == torch.float32
    (output.logit_scale * (output.image_embeds * output.text_embeds).sum()).backward()
    missing = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert missing == ["model.logit_scale"]
    assert encoder.logit_scale.item() == pytest.approx(math.log(50.0), rel=4e-3)  # bf16 cannot hold it better


def test_half_precision_embeddings_are_normalised_in_single() -> None:
    output = CLIPEncoder(build_clip(tiny(), seed=0)).to(torch.bfloat16)(*batch())
    for embeds in (output.image_embeds, output.text_embeds):
        assert embeds.dtype == torch.float32
        assert torch.allclose(
            embeds.norm(dim=-1), torch.ones(3), atol=1e-6
        )  # bf16 would be off by up to 4e-3


@pytest.mark.parametrize("config", [tiny(), siglip_like()], ids=["clip", "siglip"])
def test_checkpointing_changes_no_gradient(config: dict[str, Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = CLIPEncoder(build_clip(config, seed=0), activation_checkpointing=checkpointing)
        output = encoder(*batch())
        (output.image_embeds @ output.text_embeds.T).diag().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-7), name


def test_checkpointing_a_resnet_warns() -> None:
    config = tiny()
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    with pytest.warns(UserWarning, match="no effect on open_clip's ResNet"):
        encoder = CLIPEncoder(build_clip(config), activation_checkpointing=True)
    assert encoder.model.transformer.grad_checkpointing  # the text tower's works


def test_parameters_have_a_dimension_and_exports_get_their_shape_back(tmp_path: Path) -> None:
    loaded = load_clip(write_json(tmp_path, siglip_like()), seed=0)
    encoder = CLIPEncoder(copy.deepcopy(loaded.module), fixed_scale=30.0)
    assert all(parameter.ndim for parameter in encoder.parameters())  # DeepSpeed cannot broadcast the others
    again = loaded.with_weights(encoder.model.state_dict()).module
    assert again.logit_scale.shape == again.logit_bias.shape == ()
    assert again.logit_scale.exp().item() == pytest.approx(30.0)


def test_pruned_clip_in_the_encoder() -> None:
    tower = {"width": 48, "heads": [1, 0], "mlp": [40, 0], "head_width": 32}
    config = {
        "embed_dim": 32,
        "pruned": True,
        "activation": "gelu",
        "vision_cfg": {"image_size": 32, "patch_size": 16, **tower},
        "text_cfg": {"context_length": 8, "vocab_size": 64, **tower},
    }
    module = build_clip(config, seed=4)
    assert isinstance(module, PrunedCLIP)
    images, tokens = batch()
    expected = module(images, tokens)
    output = CLIPEncoder(module, fixed_scale=50.0)(images, tokens)
    assert torch.allclose(output.image_embeds, expected[0], atol=1e-6)
    assert torch.allclose(output.text_embeds, expected[1], atol=1e-6)


# ----------------------------------------------------------------------------------------------------- predictor


def test_predictor_embeds_in_eval_mode_and_restores_training(tmp_path: Path) -> None:
    config = tiny()
    config["vision_cfg"] |= {"patch_dropout": 0.5}  # acts in training mode only
    config["text_cfg"] |= {"vocab_size": 49408}
    loaded = load_clip(write_json(tmp_path, config), seed=0)
    images, _ = batch()
    with torch.no_grad():
        image = loaded.module.encode_image(images, normalize=True)
        text = loaded.module.encode_text(loaded.tokenizer(["a cat", "dogs"]), normalize=True)
    predictor = ClipPredictor("mine", CLIPEncoder(loaded.module).train(), loaded.image_spec, loaded.tokenizer)
    assert torch.allclose(predictor.encode_image(images), image, atol=1e-6)
    assert torch.allclose(predictor.encode_text(["a cat", "dogs"]), text, atol=1e-6)
    assert predictor.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert loaded.module.training
    assert not predictor.encode_image(images).requires_grad


def test_predictor_of_a_frozen_model_leaves_it_frozen(tmp_path: Path) -> None:
    loaded = load_clip(write_json(tmp_path, siglip_like()), seed=0)
    loaded.module.requires_grad_(False).eval()
    predictor = ClipPredictor.of(loaded)
    predictor.encode_image(batch()[0])
    assert not any(part.training for part in loaded.module.modules())
    assert predictor.name == loaded.source
    assert predictor.logit_scale == pytest.approx(10.0)
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.module.logit_scale.shape == ()


# --------------------------------------------------------------------------------------- table (e), timm students


@pytest.mark.parametrize(
    ("name", "vision", "text", "total"),
    [
        ("TinyCLIP-ViT-39M-16-Text-19M", 38.587, 19.22, 83.10),
        ("TinyCLIP-ViT-8M-16-Text-3M", 8.277, 2.52, 23.45),
        ("TinyCLIP-ResNet-30M-Text-29M", 29.584, 28.94, 83.82),
        ("TinyCLIP-ResNet-19M-Text-19M", 18.597, 19.48, 63.37),
        ("TinyCLIP-ViT-61M-32-Text-29M", 61.411, 28.67, 115.38),
        ("TinyCLIP-ViT-40M-32-Text-19M", 39.692, 19.22, 84.21),
    ],
)
def test_parameter_counts_of_the_paper(name: str, vision: float, text: float, total: float) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        model = build_clip(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    image = sum(parameter.numel() for parameter in model.visual.parameters())
    tokens = model.token_embedding.weight.numel()
    assert image / 1e6 == pytest.approx(vision, abs=5e-4)
    assert (count - image - tokens) / 1e6 == pytest.approx(text, abs=5e-3)
    assert count / 1e6 == pytest.approx(total, abs=5e-3)
    assert not config["quick_gelu"]


def test_zoo_architectures_are_the_shipped_configs() -> None:
    for entry in zoo.entries().values():
        if entry.architecture and entry.project == "tinyclip":
            name = entry.name.rpartition("-")[0]  # without the data's name
            config = json.loads((CONFIGS / f"{name}.json").read_text())
            assert config.pop("quick_gelu") is False
            assert config == entry.architecture, entry.name
