"""PrunedCLIP against open_clip, and the ragged checkpoints of TinyCLIP's training code."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from vlmkd.errors import UserError
from vlmkd.models.checkpoints import load_weights, normalise_names
from vlmkd.models.pruned_clip import PrunedCLIP, config_from_state_dict

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


def full_size(model: open_clip.CLIP) -> dict[str, Any]:
    return config_from_state_dict(normalise_names(model.state_dict()), head_width=16)


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
    config = full_size(reference) | {"activation": "quick_gelu" if quick_gelu else "gelu"}
    assert config["vision_cfg"]["heads"] == [3, 3, 3] and config["text_cfg"]["heads"] == [2, 2]
    model = PrunedCLIP(config).eval()
    load_weights(model, reference.state_dict(), "reference")
    images, tokens = inputs()
    with torch.no_grad():
        for ours, theirs in zip(model(images, tokens), reference(images, tokens), strict=True):
            assert (ours - theirs).abs().max() < 1e-6
        assert (model.encode_image(images) - reference.encode_image(images)).abs().max() < 5e-6
    back = normalise_names(model.state_dict())
    assert back.keys() == reference.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in reference.state_dict().items())


def test_full_size_gradients_equal_open_clip_also_with_checkpointing() -> None:
    reference = tiny_clip().double()
    model = PrunedCLIP(full_size(reference))
    load_weights(model, reference.state_dict(), "reference")
    model.double()
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
    config = config_from_state_dict(normalise_names(state), head_width=16)
    assert config == RAGGED
    model = PrunedCLIP(config).eval()
    load_weights(model, state, "released")
    images, tokens = inputs()
    with torch.no_grad():
        for ours, theirs in zip(model(images, tokens), original(images, tokens), strict=True):
            assert torch.equal(ours, theirs)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    without_first = {n: t for n, t in state.items() if n.startswith(("image_", "text_", "_logit"))}
    assert config_from_state_dict(normalise_names(without_first), head_width=16) == RAGGED


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


def test_refusals_name_the_thing() -> None:
    with pytest.raises(UserError, match=r"text_cfg\.heads is missing"):
        PrunedCLIP({**RAGGED, "text_cfg": {k: v for k, v in RAGGED["text_cfg"].items() if k != "heads"}})
    with pytest.raises(UserError, match="activation is 'relu'"):
        PrunedCLIP({**RAGGED, "activation": "relu"})
    with pytest.raises(UserError, match=r"vision_cfg\.heads and vision_cfg\.mlp"):
        PrunedCLIP({**RAGGED, "vision_cfg": {**RAGGED["vision_cfg"], "mlp": [1]}})
    model = PrunedCLIP(RAGGED)
    state = model.state_dict()
    for changed, message in (
        (
            {k: v for k, v in state.items() if k != "visual.ln_pre.weight"},
            r"1 missing: visual\.ln_pre\.weight",
        ),
        ({**state, "visual.extra": torch.ones(1)}, r"1 unexpected: visual\.extra"),
        ({**state, "visual.proj": torch.ones(3, 24)}, r"visual\.proj \[3, 24\] instead of \[29, 24\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(model, changed, "weights")
    with pytest.raises(UserError, match="multiple of 3 x head width 64"):
        config_from_state_dict(state)


def test_initial_logit_scale_is_clips() -> None:
    assert math.isclose(PrunedCLIP(RAGGED).logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-6)
