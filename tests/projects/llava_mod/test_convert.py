"""Layouts of other code: bit-exact round trips, transformers' own Qwen2-MoE, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
)

from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.convert import main, read_folder
from projects.llava_mod.experts import sparse_layers
from projects.llava_mod.layouts import (
    DECODER,
    HEAD,
    TOWER,
    UNUSED,
    Whole,
    from_layout,
    plain_config,
    to_layout,
)
from projects.llava_mod.student import SPARSE_FACTS, build_student, surgery
from tests.chat_parts import byte_tokenizer
from vlmkd.chat_config import MllmConfig
from vlmkd.config import load
from vlmkd.errors import UserError
from vlmkd.export.mllm import build_mllm, export_mllm, load_mllm

FACTS = {"layers": [0, 2], "experts": 4, "top_k": 2}
TINY_CLIP = {
    "embed_dim": 8, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
}  # fmt: skip


def decoder_config(*, tied: bool, kv_heads: int = 4) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 7000.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def clip_tower(tmp_path_factory) -> str:
    """A random CLIP, as load_backbone takes it."""
    from open_clip.model import CLIP

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(5)
    sizes = {name: value for name, value in TINY_CLIP.items()}
    (folder / "clip.json").write_text(json.dumps(TINY_CLIP))
    save_file(CLIP(**sizes).state_dict(), folder / "clip.safetensors")
    return f"clip:{folder / 'clip.json'}@{folder / 'clip.safetensors'}"


def stock_decoder(folder, *, tied: bool, kv_heads: int = 4) -> str:
    torch.manual_seed(1)
    decoder = Qwen2ForCausalLM(decoder_config(tied=tied, kv_heads=kv_heads))
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    decoder.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return f"hf:{folder}"


def whole_of(tower: str, decoder: str, *, sparse: bool):
    """A trained export's parts."""
    parts = build_mllm(MllmConfig(tower=tower, decoder=decoder))
    if sparse:
        parts.facts = {SPARSE_FACTS: FACTS}
        surgery(parts.module.decoder, parts.facts)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in parts.module.named_parameters():
        if name.startswith("projector") or ".mlp." in name or "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            parts.trained.add(name)
    return parts


def as_whole(parts) -> Whole:
    config = plain_config(parts.module.decoder.config)
    left = {UNUSED, HEAD} if config["tie_word_embeddings"] else {UNUSED}
    state = {name: value for name, value in parts.module.state_dict().items() if name not in left}
    return Whole(state, config, parts.facts.get(SPARSE_FACTS, {}), parts.config.tower)


def equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("layout", "sparse"),
    [("llava_mod", False), ("llava_mod", True), ("llava", False), ("moe_llava", False), ("moe_llava", True),
     ("qwen2_moe", False), ("qwen2_moe", True)],
)  # fmt: skip
def test_round_trips_are_bit_exact(layout, sparse, tied, clip_tower, tmp_path) -> None:
    whole = as_whole(whole_of(clip_tower, stock_decoder(tmp_path, tied=tied), sparse=sparse))
    state, config = to_layout(whole, layout)
    config = json.loads(json.dumps(config))
    assert tied == ("lm_head.weight" not in state)
    back = from_layout(state, config)
    has_tower = layout != "qwen2_moe"
    equal(back.weights, {n: v for n, v in whole.weights.items() if has_tower or not n.startswith(TOWER)})
    assert (back.sparse, back.decoder, back.tower, back.tower_layer) == (
        whole.sparse,
        whole.decoder,
        whole.tower,
        -2,
    )
    again, config_again = to_layout(Whole(whole.weights, back.decoder, back.sparse, back.tower), layout)
    equal(again, state)
    assert json.loads(json.dumps(config_again)) == config


def test_names_of_the_released_layouts(clip_tower, tmp_path) -> None:
    whole = as_whole(whole_of(clip_tower, stock_decoder(tmp_path, tied=True), sparse=True))
    state, config = to_layout(whole, "llava_mod")
    moe = "model.layers.2.mlp.deepspeed_moe"
    stacked = whole.weights[f"{DECODER}model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(state[f"{moe}.experts.deepspeed_experts.3.up_proj.weight"], stacked[3, 24:])
    assert torch.equal(state[f"{moe}.experts.deepspeed_experts.1.gate_proj.weight"], stacked[1, :24])
    assert state[f"{moe}.gate.wg.weight"].shape == (4, 16)
    assert torch.equal(
        state["model.mm_projector.image_spatial_proj.2.bias"], whole.weights["projector.2.bias"]
    )
    assert "model.layers.1.mlp.gate_proj.weight" in state
    assert "model.image_tower.image_tower.vision_model.encoder.layers.2.self_attn.k_proj.bias" in state
    assert (config["model_type"], config["architectures"]) == ("moe_llava_qwen2", ["LlavaQwen2ForCausalLM"])
    assert (config["moe"]["moe_layers_idx"], config["moe"]["num_experts"]) == ([0, 2], [4, 4])
    assert (config["rope_theta"], config["mm_hidden_size"]) == (7000.0, 32)
    old, config = to_layout(whole, "moe_llava")
    experts = "transformer.h.2.mlp.deepspeed_moe.experts.deepspeed_experts.3"
    assert torch.equal(old[f"{experts}.w1.weight"], stacked[3, 24:])  # Qwen-1.0: w1(x) * silu(w2(x))
    assert torch.equal(old[f"{experts}.w2.weight"], stacked[3, :24])
    q, _, v = old["transformer.h.1.attn.c_attn.bias"].chunk(3)
    layer = f"{DECODER}model.layers.1.self_attn"
    assert torch.equal(q, whole.weights[f"{layer}.q_proj.bias"]) and torch.equal(
        v, whole.weights[f"{layer}.v_proj.bias"]
    )
    assert (config["model_type"], config["intermediate_size"], config["rotary_emb_base"]) == (
        "moe_llava_qwen",
        48,
        7000.0,
    )
    dense = as_whole(whole_of(clip_tower, stock_decoder(tmp_path, tied=True), sparse=False))
    state, config = to_layout(dense, "llava")
    assert torch.equal(state["model.mm_projector.0.weight"], dense.weights["projector.0.weight"])
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in state
    assert config["model_type"] == "llava_qwen" and config["mm_vision_tower"] == clip_tower


def test_the_tower_that_is_written_gives_our_features_in_transformers(clip_tower, tmp_path) -> None:
    parts = whole_of(clip_tower, stock_decoder(tmp_path, tied=True), sparse=False)
    state, _ = to_layout(as_whole(parts), "llava_mod")
    prefix = "model.image_tower.image_tower."
    tower = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16,
        hidden_act="quick_gelu",
    ))  # fmt: skip
    held = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    names = tower.state_dict().keys()
    if not any(name.startswith("vision_model.") for name in names):  # transformers 5 has no such level
        held = {name.removeprefix("vision_model."): value for name, value in held.items()}
    missing, unexpected = tower.load_state_dict(held, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = tower.eval()(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(parts.module.tower(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_transformers_qwen2_moe_gives_equal_logits(sparse, kv_heads, clip_tower, tmp_path) -> None:
    decoder = stock_decoder(tmp_path / "decoder", tied=True, kv_heads=kv_heads)
    parts = whole_of(clip_tower, decoder, sparse=sparse)
    export_mllm(tmp_path / "export", parts, parts.module.state_dict())
    assert main([str(tmp_path / "export"), str(tmp_path / "moe"), "--to", "qwen2_moe"]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert type(model) is Qwen2MoeForCausalLM and not any(
        report[key] for key in ("missing_keys", "unexpected_keys")
    )
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = parts.module.eval().decoder(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=0, atol=1e-5)
    beside = load_file(tmp_path / "moe" / "mm_projector.safetensors")
    assert beside.keys() == {
        f"model.mm_projector.image_spatial_proj.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")
    }
    assert (tmp_path / "moe" / "tokenizer.json").is_file()


def test_a_foreign_folder_becomes_an_export_with_the_tensors_that_differ(
    clip_tower, tmp_path, monkeypatch
) -> None:
    decoder = stock_decoder(tmp_path / "decoder", tied=True)
    parts = whole_of(clip_tower, decoder, sparse=True)
    export_mllm(tmp_path / "ours", parts, parts.module.state_dict())
    assert main([str(tmp_path / "ours"), str(tmp_path / "any_name"), "--to", "llava_mod"]) == 0
    # As the released code saves: shards of torch.save, the tied head a second time.
    state = load_file(tmp_path / "any_name" / "model.safetensors")
    (tmp_path / "any_name" / "model.safetensors").unlink()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    names = sorted(state)
    torch.save(
        {name: state[name] for name in names[::2]}, tmp_path / "any_name" / "pytorch_model-00001-of-00002.bin"
    )
    torch.save(
        {name: state[name] for name in names[1::2]},
        tmp_path / "any_name" / "pytorch_model-00002-of-00002.bin",
    )
    args = [str(tmp_path / "any_name"), str(tmp_path / "back"), "--to", "ours", "--decoder", decoder]
    assert main(args) == 0
    back = load_mllm(tmp_path / "back", surgery=surgery)
    equal(back.module.state_dict(), parts.module.state_dict())
    assert back.facts == parts.facts and len(sparse_layers(back.module.decoder)) == 2
    assert back.trained == {n for n in parts.trained if n != HEAD}
    assert (
        read_folder(tmp_path / "back")[0].weights.keys()
        == read_folder(tmp_path / "any_name")[0].weights.keys()
    )
    half = build_mllm(MllmConfig(init_from=str(tmp_path / "back"), precision="bf16"), surgery=surgery)
    equal(half.module.state_dict(), {n: v.bfloat16() for n, v in parts.module.state_dict().items()})
    with pytest.raises(UserError, match="needs --decoder"):
        main(args[:4])
    other = stock_decoder(tmp_path / "other", tied=False)
    with pytest.raises(
        UserError, match="is of another architecture: tie_word_embeddings False instead of True"
    ):
        main([*args[:-1], other])


def test_an_export_holds_sparse_layers_that_were_not_trained(clip_tower, tmp_path) -> None:
    decoder = stock_decoder(tmp_path / "decoder", tied=True)
    given = [f"student.tower={clip_tower}", f"student.decoder={decoder}", "data.chats=[x]", "run_dir=r"]
    cfg = load(LlavaModConfig, [*given, "stage=sft", "train=projector", "moe.mode=sparse"])
    parts = build_student(cfg)
    assert all(".mlp." not in name for name, p in parts.module.named_parameters() if p.requires_grad)
    export_mllm(tmp_path / "export", parts, parts.module.state_dict())
    back = load_mllm(tmp_path / "export", surgery=surgery)
    equal(back.module.state_dict(), parts.module.state_dict())  # routers and all
    assert len(sparse_layers(back.module.decoder)) == 2


@pytest.mark.parametrize(
    ("changed", "only"),
    [
        ({"grid": 1}, "grid=0 or the tower's own"),
        ({"tower_norm": True}, "tower_norm=false"),
        ({"drop_first": True}, "drop_first=false"),
        ({"resize": "shortest"}, "resize=longest"),
        ({"tower_layers": [-2, -1]}, "one of tower_layers"),
        ({"grid": 2}, ""),  # what the tower has
    ],
)
def test_settings_of_the_tower_that_no_layout_says_are_refused(changed, only, clip_tower, tmp_path) -> None:
    cfg = MllmConfig(tower=clip_tower, decoder=stock_decoder(tmp_path / "decoder", tied=True), **changed)
    parts = build_mllm(cfg)
    export_mllm(tmp_path / "export", parts, parts.module.state_dict())
    args = [str(tmp_path / "export"), str(tmp_path / "out"), "--to", "llava_mod"]
    if not only:
        assert main(args) == 0
        return
    with pytest.raises(UserError, match=f"layout ours goes elsewhere with {only} only"):
        main(args)


def test_what_does_not_fit_is_one_error(clip_tower, tmp_path) -> None:
    whole = as_whole(whole_of(clip_tower, stock_decoder(tmp_path / "a", tied=True), sparse=True))
    state, config = to_layout(whole, "llava_mod")
    experts = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts."
    with pytest.raises(
        UserError,
        match="model.layers.0 is sparse, but 1 tensors are missing, .*experts.3.up_proj.weight first",
    ):
        from_layout({n: v for n, v in state.items() if n != f"{experts}3.up_proj.weight"}, config)
    with pytest.raises(UserError, match="1 missing: projector.2.bias"):
        from_layout({n: v for n, v in state.items() if not n.endswith("image_spatial_proj.2.bias")}, config)
    with pytest.raises(UserError, match="1 unexpected: decoder.model.extra"):
        from_layout(state | {"model.extra": torch.zeros(1)}, config)
    with pytest.raises(UserError, match="unexpected: .*deepspeed_moe"):  # a sparse checkpoint opened as dense
        from_layout(state, {**config, "moe": {"moe_enable": False}})
    flat = as_whole(whole_of(clip_tower, stock_decoder(tmp_path / "c", tied=True), sparse=False))
    dense, dense_config = to_layout(flat, "llava_mod")
    with pytest.raises(UserError, match="model.layers.0 is sparse, but 13 tensors are missing"):
        from_layout(dense, {**dense_config, "moe": config["moe"]})
    with pytest.raises(UserError, match="config.json lacks 'moe_layers_idx' of layout llava_mod"):
        from_layout(state, {**config, "moe": {"moe_enable": True, "num_experts": [4]}})
    with pytest.raises(UserError, match="head and embeddings differ"):
        from_layout(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, config)
    with pytest.raises(UserError, match="model_type 'qwen2' and neither"):
        from_layout(state, {"model_type": "qwen2"})
    with pytest.raises(UserError, match="not read with image_projector_type=linear"):
        from_layout(state, {**config, "image_projector_type": "linear"})
    with pytest.raises(UserError, match="use_residual"):
        from_layout(state, {**config, "moe": {**config["moe"], "use_residual": True}})
    with pytest.raises(UserError, match="layout llava has no sparse layers"):
        to_layout(whole, "llava")
    moe, moe_config = to_layout(whole, "qwen2_moe")
    shared = "model.layers.0.mlp.shared_expert.down_proj.weight"
    with pytest.raises(UserError, match="without a shared expert only"):
        from_layout(moe | {shared: torch.ones_like(moe[shared])}, moe_config)
    with pytest.raises(UserError, match="norm_topk_prob"):
        from_layout(moe, {**moe_config, "norm_topk_prob": False})
    grouped = as_whole(
        whole_of(clip_tower, stock_decoder(tmp_path / "b", tied=True, kv_heads=2), sparse=False)
    )
    with pytest.raises(UserError, match="Qwen without grouped heads; choose llava_mod"):
        to_layout(grouped, "moe_llava")
    with pytest.raises(UserError, match="has a ViT of CLIP as tower"):
        to_layout(
            Whole({n: v for n, v in whole.weights.items() if not n.startswith(TOWER)}, whole.decoder, {}, ""),
            "llava",
        )
    with pytest.raises(UserError, match="config.json"):
        read_folder(tmp_path)
