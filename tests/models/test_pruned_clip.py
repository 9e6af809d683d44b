"""PrunedCLIP against open_clip, and the ragged checkpoints of TinyCLIP's training code."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from vlmkd.errors import UserError
from vlmkd.models.pruned_clip import (
    PrunedCLIP,
    canonical_names,
    config_from_clip,
    config_from_state_dict,
    count_macs,
    count_parameters,
)

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}


def tiny_clip(seed: int = 0, **changes: Any) -> open_clip.CLIP:
    """A small open_clip CLIP whose biases and norms are not at their defaults."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (batch, 12), generator=generator)
    tokens[torch.arange(batch), torch.arange(batch) + 3] = 59
    return torch.randn(batch, 3, 32, 32, generator=generator), tokens


RAGGED = {
    "embed_dim": 24,
    "pruned": True,
    "activation": "gelu",
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 29,
        "heads": [2, 0, 1],
        "mlp": [70, 31, 0],
        "head_width": 16,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 60,
        "width": 21,
        "heads": [0, 1],
        "mlp": [0, 13],
        "head_width": 16,
    },
}


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_full_size_equals_open_clip(quick_gelu: bool) -> None:
    reference = tiny_clip(quick_gelu=quick_gelu)
    config = config_from_clip(reference)
    assert config["activation"] == ("quick_gelu" if quick_gelu else "gelu")
    assert config["vision_cfg"]["heads"] == [3, 3, 3] and config["text_cfg"]["heads"] == [2, 2]
    model = PrunedCLIP.from_config(config).eval()
    model.load_upstream_state(reference.state_dict())
    images, tokens = inputs()
    with torch.no_grad():
        for ours, theirs in zip(model(images, tokens), reference(images, tokens), strict=True):
            assert (ours - theirs).abs().max() < 1e-6
        assert (model.encode_image(images) - reference.encode_image(images)).abs().max() < 5e-6
    back = canonical_names(model.state_dict())
    assert back.keys() == reference.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in reference.state_dict().items())


def test_full_size_gradients_equal_open_clip_also_with_checkpointing() -> None:
    reference = tiny_clip().double()
    model = PrunedCLIP(config_from_clip(reference)).double()
    model.load_upstream_state(reference.state_dict())
    images, tokens = inputs()
    (lambda o: (o[0] * o[1]).sum() * o[2])(reference(images.double(), tokens)).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        (lambda o: (o[0] * o[1]).sum() * o[2])(model(images.double(), tokens)).backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.grad, wanted[name.removeprefix("text.")], atol=1e-10), name


def test_text_tower_is_causal_and_pooled_at_the_highest_id() -> None:
    model = PrunedCLIP(RAGGED).eval()
    _, tokens = inputs()
    changed = tokens.clone()
    changed[0, 4:] = 7  # behind the end of text (position 3) of row 0
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens), model.encode_text(changed))
        changed[0, 2] = 8
        assert not torch.allclose(model.encode_text(tokens)[0], model.encode_text(changed)[0])


def upstream(model: PrunedCLIP, keep_empty_mlp: bool) -> dict[str, torch.Tensor]:
    """What TinyCLIP's training code saves after fusing: removed attention absent with its bias, empty FFN kept."""
    named = {}
    for name, tensor in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        part = model.get_submodule(parent) if parent else model
        if parent.endswith("attn.out_proj") and not isinstance(part, nn.Linear):
            continue
        if keep_empty_mlp and parent.endswith("mlp.c_proj") and not isinstance(part, nn.Linear):
            width = len(tensor)
            block = parent.removesuffix("mlp.c_proj")
            named[f"{block}mlp.c_fc.weight"] = torch.zeros(0, width)
            named[f"{block}mlp.c_fc.bias"] = torch.zeros(0)
            named[f"{block}mlp.c_proj.weight"] = torch.zeros(width, 0)
            named[f"{block}ln_2.weight"] = torch.ones(width)
            named[f"{block}ln_2.bias"] = torch.zeros(width)
        named[name] = tensor
    tower = {
        "visual": "_image_encoder.module.",
        "text": "_text_encoder.module.",
        "logit_scale": "_logit_scale.module.",
    }
    result = {}
    for name, tensor in named.items():
        result[tower[name.split(".")[0]] + name.removeprefix("text.")] = tensor.half()
    for name in list(result):
        if name.startswith(("_image", "_text")):
            part, rest = name[1:].split(".module.", 1)
            result[f"{part}_without_ddp.{rest}"] = torch.full_like(result[name], 3.0)  # must not be preferred
    return result


@pytest.mark.parametrize("keep_empty_mlp", [False, True])
def test_reads_ragged_checkpoints_of_the_training_code(keep_empty_mlp: bool) -> None:
    torch.manual_seed(3)
    original = PrunedCLIP(RAGGED).eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("out_proj.bias") and name.split(".")[-5:-3] in (
                ["resblocks", "1"],
                ["resblocks", "0"],
            ):
                if not isinstance(original.get_submodule(name.removesuffix(".bias")), nn.Linear):
                    parameter.zero_()  # the reference drops this bias
        for parameter in original.parameters():
            parameter.copy_(parameter.half())
    state = upstream(original, keep_empty_mlp)
    config = config_from_state_dict(state, head_width=16)
    assert config == RAGGED
    model = PrunedCLIP(config).eval()
    model.load_upstream_state(state)
    images, tokens = inputs()
    with torch.no_grad():
        for ours, theirs in zip(model(images, tokens), original(images, tokens), strict=True):
            assert torch.equal(ours, theirs)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    without_first = {n: t for n, t in state.items() if n.startswith(("image_", "text_", "_logit"))}
    assert config_from_state_dict(without_first, head_width=16) == RAGGED


def test_blocks_without_units_still_add_their_bias() -> None:
    model = PrunedCLIP({**RAGGED, "text_cfg": {**RAGGED["text_cfg"], "heads": [0, 0], "mlp": [0, 0]}}).eval()
    _, tokens = inputs()
    with torch.no_grad():
        biases = [torch.randn(21) for _ in range(4)]
        for layer, block in enumerate(model.text.transformer.resblocks):
            assert not hasattr(block, "ln_1") and not hasattr(block, "ln_2")
            block.attn.out_proj.bias.copy_(biases[2 * layer])
            block.mlp.c_proj.bias.copy_(biases[2 * layer + 1])
        last = tokens.argmax(-1)
        x = model.text.token_embedding(tokens)[torch.arange(4), last] + model.text.positional_embedding[last]
        expected = model.text.ln_final(x + sum(biases)) @ model.text.text_projection
        assert torch.allclose(model.encode_text(tokens), expected, atol=1e-6)


def test_counts_equal_the_built_model_and_published_sizes() -> None:
    model = PrunedCLIP(RAGGED)
    counts = count_parameters(RAGGED)
    assert counts["image"] == sum(p.numel() for p in model.visual.parameters())
    assert counts["text"] == sum(p.numel() for p in model.text.parameters())
    # Spec table (e): parameters in millions (vision, text without token table) and MACs of a pair in G.
    published = [
        (16, 12, 512, 6, 512, 38.587, 19.22, 9.48),
        (16, 10, 256, 3, 256, 8.277, 2.52, 1.98),
        (32, 12, 640, 9, 512, 61.411, 28.67, 5.32),
        (32, 12, 512, 6, 512, 39.692, 19.22, 3.49),
    ]
    for patch, layers, width, text_layers, text_width, vision, text, macs in published:
        config = {
            "embed_dim": 512,
            "activation": "gelu",
            "vision_cfg": {"image_size": 224, "patch_size": patch, **uniform(layers, width)},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, **uniform(text_layers, text_width)},
        }
        counts = count_parameters(config)
        assert round(counts["image"] / 1e6, 3) == vision
        assert round((counts["text"] - counts["tokens"]) / 1e6, 2) == text
        assert round(sum(count_macs(config).values()) / 1e9, 2) == macs


def uniform(layers: int, width: int) -> dict[str, Any]:
    return {"width": width, "heads": [width // 64] * layers, "mlp": [4 * width] * layers, "head_width": 64}


def test_macs_equal_counted_matrix_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = PrunedCLIP(RAGGED).eval()
    images, tokens = inputs(1)
    macs = count_macs(RAGGED)
    for part, run in (
        ("image", lambda: model.encode_image(images)),
        ("text", lambda: model.encode_text(tokens)),
    ):
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            run()
        assert counter.get_total_flops() == 2 * macs[part]


def test_refusals_name_the_thing() -> None:
    with pytest.raises(UserError, match=r"text_cfg\.heads is missing"):
        PrunedCLIP({**RAGGED, "text_cfg": {k: v for k, v in RAGGED["text_cfg"].items() if k != "heads"}})
    with pytest.raises(UserError, match="activation is 'relu'"):
        PrunedCLIP({**RAGGED, "activation": "relu"})
    with pytest.raises(UserError, match=r"vision_cfg\.heads and vision_cfg\.mlp"):
        PrunedCLIP({**RAGGED, "vision_cfg": {**RAGGED["vision_cfg"], "mlp": [1]}})
    model = PrunedCLIP(RAGGED)
    state = model.state_dict()
    with pytest.raises(UserError, match=r"ln_pre\.weight is missing"):
        model.load_upstream_state({k: v for k, v in state.items() if k != "visual.ln_pre.weight"})
    with pytest.raises(UserError, match="no place in this config"):
        model.load_upstream_state({**state, "visual.extra": torch.ones(1)})
    with pytest.raises(UserError, match=r"visual\.proj is \[3, 24\]"):
        model.load_upstream_state({**state, "visual.proj": torch.ones(3, 24)})
    with pytest.raises(UserError, match="multiple of 3 x head width 64"):
        config_from_state_dict(state)
    with pytest.raises(UserError, match="LayerScale"):
        config_from_clip(tiny_clip(vision_cfg={**TINY["vision_cfg"], "ls_init_value": 0.1}))
    resnet = {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1], "head_width": 16}
    with pytest.raises(UserError, match="ViT image tower"):
        config_from_clip(tiny_clip(vision_cfg=resnet))


def test_initial_logit_scale_is_clips() -> None:
    assert math.isclose(PrunedCLIP(RAGGED).logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-6)
