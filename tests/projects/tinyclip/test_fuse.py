"""Fusing is exact, counts what the masks say, rounds as asked, and can be undone for the next stage."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.tinyclip.fuse import costs, fuse, reenter
from projects.tinyclip.masked import MaskedCLIP, config_from_clip
from projects.tinyclip.masks import LOG_ALPHA_LIMIT, Mask
from vlmkd.errors import UserError
from vlmkd.models.pruned_clip import PrunedCLIP, embed_patches

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (batch, 12), generator=generator)
    tokens[torch.arange(batch), torch.arange(batch) + 3] = 59
    return torch.randn(batch, 3, 16, 16, generator=generator), tokens


def masked_clip(spread: float = 2.5, quick_gelu: bool = False) -> MaskedCLIP:
    """A masked CLIP with non-zero biases, soft masks, image layer 1 without heads and text layer 0 without channels."""
    torch.manual_seed(0)
    model = MaskedCLIP.from_clip(open_clip.CLIP(**TINY, quick_gelu=quick_gelu)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "masks." not in name and (name.endswith("bias") or "ln_" in name):
                parameter.add_(0.3 * torch.randn_like(parameter))
        for alpha, low, high in model.bounds():
            alpha.copy_((spread * torch.randn_like(alpha) + 0.5).clamp(low, high))
        model.image_masks.heads[1] = -LOG_ALPHA_LIMIT
        model.text_masks.intermediate[0] = -LOG_ALPHA_LIMIT - 20
    return model


def embeds(model: Any) -> list[Tensor]:
    images, tokens = inputs()
    with torch.no_grad():
        return list(model(images, tokens)[:2])


def distance(first: Any, second: Any) -> float:
    return max((a - b).abs().max().item() for a, b in zip(embeds(first), embeds(second), strict=True))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_fused_equals_masked_with_soft_masks_and_biases(quick_gelu: bool) -> None:
    model = masked_clip(quick_gelu=quick_gelu)
    fused = fuse(model.state_dict(), model.config)
    image, text = model.image_masks.deterministic(), model.text_masks.deterministic()
    soft = [value for mask in (image, text) for values in mask for value in values.flatten().tolist()]
    assert any(0 < value < 0.9 for value in soft) and any(value == 0 for value in soft)
    assert fused.config["vision_cfg"]["heads"][1] == 0 and fused.config["text_cfg"]["mlp"][0] == 0
    assert fused.config["activation"] == ("quick_gelu" if quick_gelu else "gelu")
    assert distance(model, fused.model()) < 1e-6


def test_dropping_the_bias_of_an_empty_attention_would_be_wrong() -> None:
    """Guards the check above: the toy can tell the difference."""
    model = masked_clip()
    fused = fuse(model.state_dict(), model.config).model()
    torch.nn.init.zeros_(fused.visual.transformer.resblocks[1].attn.out_proj.bias)
    assert distance(model, fused) > 1e-3


def test_parameter_count_equals_the_count_from_the_masks() -> None:
    model = masked_clip()
    fused = fuse(model.state_dict(), model.config)
    total = sum(parameter.numel() for parameter in fused.model().parameters())
    expected = 1  # logit scale
    for tower, mask in (
        (model.config["vision_cfg"], model.image_masks.deterministic()),
        (model.config["text_cfg"], model.text_masks.deterministic()),
    ):
        d = sum(value != 0 for value in mask.hidden.tolist())
        expected += d * 24  # projection
        if "patch_size" in tower:
            expected += d * (3 * 8 * 8) + d + d * 5 + 2 * d + 2 * d
        else:
            expected += d * 60 + d * 12 + 2 * d
        for heads, channels in zip(mask.heads.tolist(), mask.intermediate.tolist(), strict=True):
            inner = 16 * sum(value != 0 for value in heads)
            f = sum(value != 0 for value in channels)
            expected += (3 * inner * (d + 1) + inner * d + 2 * d if inner else 0) + d
            expected += (2 * f * d + f + 2 * d if f else 0) + d
    assert total == expected
    assert sum(count for count, _ in costs(fused.config)) + 1 == total


def test_expected_sparsity_is_about_the_real_one_when_masks_are_decided() -> None:
    model = masked_clip()
    with torch.no_grad():
        for alpha, low, high in model.bounds():
            alpha.copy_(torch.where(alpha > 0, high, 20 * low))
    fused = fuse(model.state_dict(), model.config)
    output = model(None, None)
    kept = total = 0
    for field, masks in (("vision_cfg", model.image_masks), ("text_cfg", model.text_masks)):
        tower = fused.config[field]
        kept += sum(
            4 * tower["width"] * 16 * h + 2 * tower["width"] * f
            for h, f in zip(tower["heads"], tower["mlp"], strict=True)
        )
        total += masks.full_size()
    assert output.joint_sparsity.item() == pytest.approx(1 - kept / total, abs=0.02)


def released_tower(model: MaskedCLIP, field: str, x: Tensor, pick: Any) -> Tensor:
    """What the released code's fused tower computes from embedded tokens x [B, T, D]; `pick` pools [B, T, D].

    Written from its rules on the full-size weights, one head at a time: units whose mask is zero are left out, an
    attention without heads is left out whole, and every matrix that writes a hidden channel, the output projection's
    rows too, is scaled by that channel's mask.
    """
    image = field == "vision_cfg"
    tower, masks = (model.visual, model.image_masks) if image else (model.text, model.text_masks)
    mask, width = masks.deterministic(), model.config[field]["head_width"]
    kept = mask.hidden != 0
    z = mask.hidden[kept]

    def norm(layer: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, (len(z),), layer.weight[kept], layer.bias[kept])

    x = x[..., kept] * z
    if image:
        x = norm(tower.ln_pre, x)
    for block, heads, channels in zip(
        tower.transformer.resblocks, mask.heads, mask.intermediate, strict=True
    ):
        if heads.sum() > 0:
            h, added = norm(block.ln_1, x), block.attn.out_proj.bias[kept] * z
            for head in heads.nonzero().flatten().tolist():
                rows = slice(head * width, (head + 1) * width)
                q, k, v = (
                    F.linear(h, w[rows][:, kept], b[rows])
                    for w, b in zip(
                        block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
                    )
                )
                scores = q @ k.transpose(1, 2) / width**0.5
                if not image:
                    scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
                out = block.attn.out_proj.weight[kept][:, rows] * z[:, None] * heads[head]
                added = added + F.linear(scores.softmax(-1) @ v, out)
            x = x + added
        h, alive = norm(block.ln_2, x), channels != 0
        hidden = F.gelu(F.linear(h, block.mlp.c_fc.weight[alive][:, kept], block.mlp.c_fc.bias[alive]))
        out = block.mlp.c_proj.weight[kept][:, alive] * channels[alive] * z[:, None]
        x = x + F.linear(hidden, out, block.mlp.c_proj.bias[kept] * z)
    projection = tower.proj if image else tower.text_projection
    pooled = norm(tower.ln_post if image else tower.ln_final, pick(x))
    return F.normalize(pooled @ (projection[kept] * z[:, None]), dim=-1)


def test_legacy_fusing_replays_the_released_code() -> None:
    model = masked_clip()
    with torch.no_grad():
        model.text_masks.heads[1] = -LOG_ALPHA_LIMIT - 20
        legacy = fuse(model.state_dict(), model.config, legacy_projection_scale=True)
        assert legacy.config["vision_cfg"]["heads"][1] == legacy.config["text_cfg"]["heads"][1] == 0
        images, tokens = inputs()
        ends = tokens.argmax(-1)
        released = [
            released_tower(model, "vision_cfg", embed_patches(model.visual, images), lambda x: x[:, 0]),
            released_tower(
                model, "text_cfg", model.text.embed(tokens), lambda x: x[torch.arange(len(x)), ends]
            ),
        ]
    for mine, other in zip(embeds(legacy.model()), released, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    assert distance(model, legacy.model()) > 1e-2  # the released dense model is not its masked one


@pytest.mark.parametrize("round_to", [8, 16])
def test_round_to_keeps_the_top_units_and_stays_exact(round_to: int) -> None:
    model = masked_clip()
    plain, rounded = (
        fuse(model.state_dict(), model.config),
        fuse(model.state_dict(), model.config, round_to=round_to),
    )
    for field, masks in (("vision_cfg", model.image_masks), ("text_cfg", model.text_masks)):
        before, after = plain.config[field], rounded.config[field]
        sizes = [(before["width"], after["width"]), *zip(before["mlp"], after["mlp"], strict=True)]
        for old, new in sizes:
            assert new % round_to == 0
            assert abs(new - old) <= round_to / 2 or new == round_to
            assert (new == 0) == (old == 0)
        assert before["heads"] == after["heads"]
        order = masks.hidden.detach().argsort(descending=True)[: after["width"]]
        kept = masks.deterministic(round_to).hidden.nonzero().flatten()
        assert set(kept.tolist()) == set(order.tolist())
    with torch.no_grad():
        images, tokens = inputs()
        image = model.visual(images, model.image_masks.deterministic(round_to))
        text = model.text(tokens, model.text_masks.deterministic(round_to))
        dense = rounded.model()
        assert (dense.encode_image(images) - image).abs().max() < 5e-6
        assert (dense.encode_text(tokens) - text).abs().max() < 5e-6


def test_report_lists_units_parameters_and_macs() -> None:
    model = masked_clip()
    fused = fuse(model.state_dict(), model.config)
    report = fused.report()
    width = fused.config["vision_cfg"]["width"]
    assert f"| image | {width}/48 |" in report
    assert "| image layer 1 | | 0/3 |" in report and "| text layer 0 | |" in report
    assert f"{sum(p.numel() for p in fused.model().visual.parameters()):,}" in report


def test_reentry_holds_the_pruned_model_in_front() -> None:
    model = masked_clip()
    pruned = fuse(model.state_dict(), model.config).model()
    again = reenter(pruned).eval()
    assert again.config["vision_cfg"] == model.config["vision_cfg"] and "unpruned" not in again.config
    masks = []
    for tower, field in ((again.image_masks, "vision_cfg"), (again.text_masks, "text_cfg")):
        small = pruned.config[field]
        assert tower.hidden.tolist() == [10.0] * small["width"] + [-10.0] * (tower.width - small["width"])
        for layer, (heads, channels) in enumerate(zip(small["heads"], small["mlp"], strict=True)):
            assert (tower.heads[layer] == 10).sum() == heads and (tower.heads[layer, :heads] == 10).all()
            assert (tower.intermediate[layer] == 10).sum() == channels
        masks.append(Mask(*((alpha > 0).float() for alpha in tower.log_alphas())))
    images, tokens = inputs()
    with torch.no_grad():
        assert (again.visual(images, masks[0]) - pruned.encode_image(images)).abs().max() < 5e-6
        assert (again.text(tokens, masks[1]) - pruned.encode_text(tokens)).abs().max() < 5e-6
    assert distance(again, pruned) < 1e-4  # the soft masks of log alpha 10
    with torch.no_grad():
        for alpha, _, _ in again.bounds():
            alpha.mul_(10)  # masks of exactly 1
    same = fuse(again.state_dict(), again.config)
    assert same.config["vision_cfg"] == pruned.config["vision_cfg"]
    assert all(torch.equal(same.state[name], tensor) for name, tensor in pruned.state_dict().items())


def test_reentry_after_the_first_clamp_loses_sparsity_unless_frozen() -> None:
    model = masked_clip()
    pruned = fuse(model.state_dict(), model.config).model()
    sparsity = {}
    for freeze in (False, True):
        again = reenter(pruned, freeze_pruned=freeze)
        with torch.no_grad():
            before = again.eval()(None, None).joint_sparsity.item()
            for alpha, low, high in again.bounds():
                alpha.clamp_(low, high)
            sparsity[freeze] = again(None, None).joint_sparsity.item() - before
            drawn = torch.stack([again.image_masks(seed)[0].hidden for seed in range(400)])
        absent = drawn[:, pruned.config["vision_cfg"]["width"] :]
        assert absent.numel() > 1000
        share = (absent > 0).double().mean().item()
        assert share == 0 if freeze else share == pytest.approx(0.0471, abs=0.012)
    assert sparsity[False] < -0.005
    assert sparsity[True] > 0


def test_frozen_units_get_no_gradient_and_stay_out_of_the_next_export() -> None:
    pruned = fuse((model := masked_clip()).state_dict(), model.config).model()
    again = reenter(pruned, freeze_pruned=True).train()
    for alpha, low, high in again.bounds():
        alpha.data.clamp_(low, high)
    images, tokens = inputs()
    output = again(images, tokens, seed=1, target=0.9)
    (output.penalty + output.image_embeds[:, 0].sum() + output.text_embeds[:, 0].sum()).backward()
    width = pruned.config["vision_cfg"]["width"]
    assert (again.image_masks.hidden.grad[width:] == 0).all() and (
        again.image_masks.hidden.grad[:width] != 0
    ).all()
    assert (again.visual.conv1.weight.grad[width:] == 0).all()
    after = fuse(again.state_dict(), again.config)
    assert after.config["vision_cfg"]["width"] <= width
    assert after.config["vision_cfg"]["heads"][1] == 0
    restored = MaskedCLIP(again.config)
    restored.load_state_dict(again.state_dict())
    assert torch.equal(restored.image_masks.hidden_present, again.image_masks.hidden_present)


def test_zero_padded_units_cannot_learn_even_when_they_are_sampled() -> None:
    pruned = fuse((model := masked_clip()).state_dict(), model.config).model()
    again = reenter(pruned).train()
    for alpha, low, high in again.bounds():
        alpha.data.clamp_(low, high)
    images, tokens = inputs()
    for seed in range(10):
        output = again(images, tokens, seed=seed)
        (output.image_embeds @ output.text_embeds.T).logsumexp(1).sum().backward()
    width, tower = pruned.config["vision_cfg"]["width"], again.visual
    channels = pruned.config["vision_cfg"]["mlp"][0]
    assert tower.conv1.weight.grad[:width].abs().max() > 0
    assert 0 < tower.conv1.weight.grad[width:].abs().max() < 1  # through the statistics
    for gradient in (
        tower.proj.grad[width:],
        tower.ln_post.weight.grad[width:],
        tower.transformer.resblocks[0].mlp.c_fc.weight.grad[channels:],
        tower.transformer.resblocks[0].mlp.c_proj.weight.grad[:, channels:],
    ):
        assert len(gradient) and (gradient == 0).all()


def test_refusals() -> None:
    model = masked_clip()
    fused = fuse(model.state_dict(), model.config)
    with torch.no_grad():
        gone = masked_clip()
        gone.text_masks.hidden.fill_(-20.0)
    with pytest.raises(UserError, match="no hidden channel of the text tower"):
        fuse(gone.state_dict(), gone.config)
    unknown = PrunedCLIP({key: value for key, value in fused.config.items() if key != "unpruned"})
    with pytest.raises(UserError, match="does not say what it was pruned from"):
        reenter(unknown)
    for field, change in (("width", 8), ("patch_size", 4), ("heads", [3, 3])):
        full = {**model.config, "vision_cfg": {**model.config["vision_cfg"], field: change}}
        with pytest.raises(UserError, match="vision_cfg"):
            reenter(unknown, full)


def uniform(layers: int, width: int) -> dict[str, Any]:
    return {"width": width, "heads": [width // 64] * layers, "mlp": [4 * width] * layers, "head_width": 64}


@pytest.mark.parametrize(
    ("patch", "layers", "width", "text_layers", "text_width", "vision", "text", "macs"),
    [
        (16, 12, 512, 6, 512, 38.587, 19.22, 9.48),
        (16, 10, 256, 3, 256, 8.277, 2.52, 1.98),
        (32, 12, 640, 9, 512, 61.411, 28.67, 5.32),
        (32, 12, 512, 6, 512, 39.692, 19.22, 3.49),
    ],
)
def test_costs_are_the_papers(
    patch: int,
    layers: int,
    width: int,
    text_layers: int,
    text_width: int,
    vision: float,
    text: float,
    macs: float,
) -> None:
    """Parameters in millions, the text tower's without its token table, and MACs of a pair in G."""
    config = {
        "embed_dim": 512,
        "activation": "gelu",
        "vision_cfg": {"image_size": 224, "patch_size": patch, **uniform(layers, width)},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **uniform(text_layers, text_width)},
    }
    (image, image_macs), (texts, text_macs) = costs(config)
    assert round(image / 1e6, 3) == vision
    assert round((texts - 49408 * text_width) / 1e6, 2) == text
    assert round((image_macs + text_macs) / 1e9, 2) == macs


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({**TINY["vision_cfg"], "ls_init_value": 0.1}, "LayerScale"),
        ({"image_size": 32, "width": 8, "layers": [1, 1, 1, 1], "head_width": 16}, "ViT image tower"),
    ],
)
def test_what_cannot_be_masked_is_named(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_clip(open_clip.CLIP(**{**TINY, "vision_cfg": vision}))
