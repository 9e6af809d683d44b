"""Prompted towers against an independent implementation in plain tensor operations, in float64."""

from __future__ import annotations

import copy
import math

import open_clip
import pytest
import torch
from torch import Tensor

from projects.promptkd.prompts import PromptedCLIP, PromptedEncoder, PromptShape, class_tokens, with_room
from tests.projects.promptkd import tiny
from vlmkd.errors import UserError
from vlmkd.models.class_vectors import encode_classes
from vlmkd.predictors import DualEncoder

NAMES = ["cat", "hot_dog", "a much longer name"]
TEMPLATE = "a photo of a {}."


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Layer normalisation over the last axis, eps 1e-5."""
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block(x: Tensor, weights: dict[str, Tensor], prefix: str, causal: bool, quick: bool) -> Tensor:
    """One pre-norm transformer block on [T,w], heads of 16 channels, written with loops over heads."""
    tokens, width = x.shape
    y = norm(x, weights, f"{prefix}.ln_1")
    q, k, v = (y @ weights[f"{prefix}.attn.in_proj_weight"].T + weights[f"{prefix}.attn.in_proj_bias"]).split(
        width, 1
    )
    heads = []
    for start in range(0, width, 16):
        part = slice(start, start + 16)
        scores = q[:, part] @ k[:, part].T / math.sqrt(16)
        if causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    attended = torch.cat(heads, 1)
    x = x + attended @ weights[f"{prefix}.attn.out_proj.weight"].T + weights[f"{prefix}.attn.out_proj.bias"]
    y = (
        norm(x, weights, f"{prefix}.ln_2") @ weights[f"{prefix}.mlp.c_fc.weight"].T
        + weights[f"{prefix}.mlp.c_fc.bias"]
    )
    y = y * torch.sigmoid(1.702 * y) if quick else y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ weights[f"{prefix}.mlp.c_proj.weight"].T + weights[f"{prefix}.mlp.c_proj.bias"]


def plain_image(
    image: Tensor, weights: dict[str, Tensor], prompts: Tensor | None, layers: int, quick: bool
) -> Tensor:
    """Feature of one image [3,H,W]: prompts behind the patches, block 0's through ln_pre."""
    patch = 8
    rows = [
        (image[:, top : top + patch, left : left + patch] * weights["visual.conv1.weight"]).flatten(1).sum(1)
        for top in range(0, image.shape[1], patch)
        for left in range(0, image.shape[2], patch)
    ]
    x = torch.stack([weights["visual.class_embedding"], *rows]) + weights["visual.positional_embedding"]
    count = len(x)
    if prompts is not None:
        x = torch.cat([x, prompts[0]])
    x = norm(x, weights, "visual.ln_pre")
    for layer in range(layers):
        if prompts is not None and 1 <= layer < len(prompts):
            x = torch.cat([x[:count], prompts[layer]])
        x = block(x, weights, f"visual.transformer.resblocks.{layer}", causal=False, quick=quick)
    return norm(x[0], weights, "visual.ln_post") @ weights["visual.proj"]


def plain_text(ids: Tensor, weights: dict[str, Tensor], prompts: Tensor, layers: int, quick: bool) -> Tensor:
    """Feature of one prompt [T]: positions 1 to n hold prompts; all T positions are computed."""
    n = prompts.shape[1]
    x = weights["token_embedding.weight"][ids].clone()
    x[1 : 1 + n] = prompts[0]
    x = x + weights["positional_embedding"]
    for layer in range(layers):
        if 1 <= layer < len(prompts):
            x = torch.cat([x[:1], prompts[layer], x[1 + n :]])
        x = block(x, weights, f"transformer.resblocks.{layer}", causal=True, quick=quick)
    return norm(x[int(ids.argmax())], weights, "ln_final") @ weights["text_projection"]


def prompted(
    depth: int, *, quick: bool = True, pool: str = "argmax", length: int = 2
) -> tuple[PromptedCLIP, dict]:
    """A PromptedCLIP in float64 with large prompts, and the weights of its CLIP."""
    clip = tiny.clip(quick=quick, pool=pool)
    clip.module.double()
    shape = PromptShape(image_depth=depth, image_length=length, text_depth=max(depth, 1), text_length=length)
    model = PromptedCLIP(clip, shape, seed=3).double()
    with torch.no_grad():
        for value in model.prompts().values():
            value.mul_(50)
    return model, dict(clip.module.state_dict())


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_image_tower_is_the_formula(depth: int, quick: bool) -> None:
    model, weights = prompted(depth, quick=quick)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prompts = None if model.image.prompts is None else model.image.prompts.detach()
    expected = torch.stack([plain_image(image, weights, prompts, 3, quick) for image in images])
    torch.testing.assert_close(model.image(images).detach(), expected, rtol=0, atol=1e-10)
    if depth == 0:
        torch.testing.assert_close(model.image.tower(images).detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_text_tower_is_the_formula(depth: int, pool: str) -> None:
    model, weights = prompted(depth, pool=pool)
    tokens = class_tokens(tiny.tokenizer, NAMES, TEMPLATE)
    expected = torch.stack([plain_text(ids, weights, model.text.prompts.detach(), 3, True) for ids in tokens])
    torch.testing.assert_close(model.text(tokens).detach(), expected, rtol=0, atol=1e-10)
    model.text.classes_per_chunk = 2
    torch.testing.assert_close(model.text(tokens).detach(), expected, rtol=0, atol=1e-10)


def test_chunks_and_activation_checkpoints_give_the_same_gradients() -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    tokens = class_tokens(tiny.tokenizer, NAMES, TEMPLATE)
    gradients = []
    for economical in (False, True):
        model, _ = prompted(3)
        model.text.classes_per_chunk = 2 if economical else 0
        model.image.activation_checkpointing = economical
        (model.image(images) @ model.text(tokens).T).square().sum().backward()
        gradients.append([value.grad for value in model.prompts().values()])
        assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("prompts"))
    for plain, economical in zip(*gradients, strict=True):
        assert plain.abs().max() > 1e-6
        torch.testing.assert_close(economical, plain, rtol=1e-9, atol=1e-12)


def test_the_clip_itself_is_left_as_it_was() -> None:
    clip = tiny.clip()
    before = {name: value.clone() for name, value in clip.module.state_dict().items()}
    images = torch.randn(1, 3, 16, 16)
    alone = clip.module.encode_image(images)
    model = PromptedCLIP(
        clip, PromptShape(image_depth=3, image_length=2, text_depth=3, text_length=2), init="a photo"
    )
    model.image(images).sum().backward()
    torch.testing.assert_close(clip.module.encode_image(images), alone.detach(), rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in clip.module.state_dict().items())


def test_initial_prompts_are_words_where_the_text_is_long_enough() -> None:
    clip = tiny.clip()
    table = clip.module.token_embedding.weight
    shape = PromptShape(image_depth=2, image_length=2, text_depth=3, text_length=4)
    model = PromptedCLIP(clip, shape, init="cats", seed=1)
    words = table[tiny.tokenizer(["cats"])[0, 1:5]]
    assert torch.equal(model.text.prompts[0], words)
    drawn = torch.cat([model.text.prompts[1:].flatten(), model.image.prompts.flatten()])  # type: ignore[union-attr]
    assert drawn.std().item() == pytest.approx(0.02, rel=0.15)
    short = PromptedCLIP(clip, shape, init="cat", seed=1)
    assert short.text.prompts[0].std().item() == pytest.approx(0.02, rel=0.3)
    again = PromptedCLIP(clip, shape, init="cats", seed=1)
    assert torch.equal(again.text.prompts, model.text.prompts)
    # With its own words as prompts at depth 1 the tower is the unprompted one.
    same = PromptedCLIP(
        clip, PromptShape(image_depth=0, image_length=0, text_depth=1, text_length=4), init="cats"
    )
    tokens = tiny.tokenizer(["cats and dogs"])
    torch.testing.assert_close(same.text(tokens), clip.module.encode_text(tokens), rtol=0, atol=1e-5)


def test_a_tokenizer_without_start_token_puts_prompts_first() -> None:
    clip = tiny.clip()
    clip.tokenizer = lambda texts: torch.cat(
        [tiny.tokenizer(texts)[:, 1:], torch.zeros(len(texts), 1).long()], 1
    )
    model = PromptedCLIP(
        clip, PromptShape(image_depth=0, image_length=0, text_depth=1, text_length=2), init="ab"
    )
    assert model.text.start == 0
    assert torch.equal(
        model.text.prompts[0], clip.module.token_embedding.weight[clip.tokenizer(["ab"])[0, :2]]
    )


@pytest.mark.parametrize("length", range(1, 9))
def test_prompts_never_take_the_place_of_the_class_name(length: int) -> None:
    """Up to four learned vectors stand for `a photo of a`, more for as many X."""
    given = with_room(open_clip.tokenize, TEMPLATE, length)
    wanted = (
        TEMPLATE if length <= 4 else " ".join(["X"] * length) + " {}."
    )  # CoOp's prompt_prefix + " " + name + "."
    assert torch.equal(
        class_tokens(open_clip.tokenize, NAMES, given), class_tokens(open_clip.tokenize, NAMES, wanted)
    )
    plain = class_tokens(open_clip.tokenize, ["cat", "dog"], given)
    assert int((plain[0] != plain[1]).int().argmax()) == 1 + max(
        length, 4
    )  # the name stands behind the prompts

    clip = tiny.clip()
    shape = PromptShape(image_depth=0, image_length=0, text_depth=2, text_length=length)
    encoder = PromptedEncoder(PromptedCLIP(clip, shape), clip, "prompted")
    template = with_room(clip.tokenizer, "{c}", length)
    vectors = encode_classes(encoder, ["a", "b", "c"], [template], teacher_digest="").vectors
    assert torch.cdist(vectors, vectors).add(torch.eye(3)).min() > 1e-3


def test_encoder_is_a_dual_encoder_of_unit_vectors() -> None:
    clip = tiny.clip()
    model = PromptedCLIP(
        clip, PromptShape(image_depth=1, image_length=2, text_depth=1, text_length=2), init="a photo"
    )
    encoder = PromptedEncoder(model, clip, "prompted")
    assert isinstance(encoder, DualEncoder)
    for vectors in (
        encoder.encode_text(["a photo of a cat."]),
        encoder.encode_image(torch.randn(2, 3, 16, 16)),
    ):
        assert vectors.dtype == torch.float32 and not vectors.requires_grad
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"image_depth": 4}, "prompts.image_depth is 4; this tower has 3 blocks"),
        ({"text_depth": 0}, "prompts.text_depth is 0"),
        ({"image_length": 0}, "prompts.image_length is 0"),
        ({"text_length": 39}, "reads 40 tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(shape: dict[str, int], message: str) -> None:
    fields = {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2, **shape}
    with pytest.raises(UserError, match=message):
        PromptedCLIP(tiny.clip(), PromptShape(**fields))


def test_towers_of_another_kind_are_refused() -> None:
    shape = PromptShape(image_depth=1, image_length=1, text_depth=1, text_length=1)
    clip = tiny.clip()
    clip.module.visual.pool_type = "avg"
    with pytest.raises(UserError, match="reads its class token"):
        PromptedCLIP(clip, shape)
    clip = tiny.clip()
    clip.module.text_pool_type = "last"
    with pytest.raises(UserError, match="reads its end token"):
        PromptedCLIP(clip, shape)
    with pytest.raises(UserError, match="ends before its 8 prompts"):
        model = PromptedCLIP(
            tiny.clip(), PromptShape(image_depth=0, image_length=0, text_depth=1, text_length=8)
        )
        model.text(tiny.tokenizer(["short"]))


def test_stored_prompts_must_fit() -> None:
    model, _ = prompted(2)
    stored = {name: value.detach().clone() for name, value in model.prompts().items()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.image.prompts.zero_()  # type: ignore[union-attr]
    other.set_prompts(stored, "file")
    assert all(torch.equal(other.prompts()[name], value) for name, value in stored.items())
    with pytest.raises(UserError, match="prompts file"):
        other.set_prompts({"text": stored["text"]}, "file")
    with pytest.raises(UserError, match="prompts file"):
        other.set_prompts({**stored, "image": stored["image"][:1]}, "file")
