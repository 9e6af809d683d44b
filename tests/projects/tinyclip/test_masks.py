"""Masks, sparsity, penalty and the masked student, against the specification's numbers and float64 oracles."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.tinyclip import masks
from projects.tinyclip.masked import MaskedCLIP, MaskedLayerNorm
from projects.tinyclip.masks import LOG_ALPHA_LIMIT, Multipliers, TowerMasks
from vlmkd.config import OptimConfig
from vlmkd.errors import UserError
from vlmkd.train.optim import decay_groups

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}


def tiny_clip(seed: int = 0, **changes: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    model = open_clip.CLIP(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (batch, 12), generator=generator)
    tokens[torch.arange(batch), torch.arange(batch) + 3] = 59
    return torch.randn(batch, 3, 16, 16, generator=generator), tokens


def spread_masks(model: MaskedCLIP, seed: int = 5, scale: float = 2.5) -> None:
    """Log alphas at random, so that the deterministic masks hold zeros and soft values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha, low, high in model.bounds():
            alpha.copy_((scale * torch.randn(alpha.shape, generator=generator) + 0.5).clamp(low, high))


@pytest.mark.parametrize(
    ("log_alpha", "probability"),
    [
        (10.0, 0.9999908),
        (4.60517, 0.9979823),
        (0.0, 0.8318222),
        (-2.0, 0.4009753),
        (-4.60517, 0.0471298),
        (-10.0, 2.2453e-4),
    ],
)
def test_keep_probability_vectors(log_alpha: float, probability: float) -> None:
    assert masks.keep_probability(torch.tensor(log_alpha)).item() == pytest.approx(probability, abs=6e-8)


@pytest.mark.parametrize(("log_alpha", "value"), [(4.60517, 0.9960347), (0.0, 0.5), (10.0, 0.9999938)])
def test_soft_mask_vectors(log_alpha: float, value: float) -> None:
    assert masks.soft_mask(torch.tensor(log_alpha)).item() == pytest.approx(value, abs=6e-8)


def test_sampled_masks_follow_the_hard_concrete_distribution() -> None:
    log_alpha = torch.tensor([2.0, 0.0, -2.0]).repeat(60_000, 1)
    generator = torch.Generator().manual_seed(0)
    sample = masks.sample_mask(log_alpha, generator)
    assert sample.min() == 0 and sample.max() == 1
    share = (sample > 0).double().mean(dim=0)
    assert torch.allclose(share, masks.keep_probability(log_alpha[0]).double(), atol=6e-3)
    # The same formula in float64, draw by draw.
    u = torch.rand(log_alpha.shape, generator=torch.Generator().manual_seed(0)).double()
    u = masks.EPSILON + u * (1 - 2 * masks.EPSILON)
    concrete = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha.double()) * 1.5) * 1.2 - 0.1
    assert (sample - concrete.clamp(0, 1)).abs().max() < 1e-5


def test_deterministic_mask_drops_the_expected_number_of_smallest_units() -> None:
    tower = TowerMasks(width=40, layers=2, heads=4, channels=30)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for alpha in tower.log_alphas():
            alpha.copy_(4 * torch.rand(alpha.shape, generator=generator) - 3)
    mask = tower.deterministic()
    for alpha, values in zip(tower.log_alphas(), mask, strict=True):
        for row, value in zip(alpha.view(-1, alpha.shape[-1]), values.view(-1, alpha.shape[-1]), strict=True):
            size = len(row)
            zeros = round(size - masks.keep_probability(row.detach()).double().sum().item())
            smallest = set(sorted(range(size), key=lambda i, row=row: row[i].item())[:zeros])
            assert zeros > 0
            for i in range(size):
                expected = 0.0 if i in smallest else 1 / (1 + math.exp(-0.8 / (2 / 3) * row[i].item()))
                assert value[i].item() == pytest.approx(expected, abs=1e-6)


def test_a_saturated_wide_family_still_loses_six_channels() -> None:
    tower = TowerMasks(width=64, layers=1, heads=1, channels=3072)
    with torch.no_grad():
        tower.intermediate.fill_(LOG_ALPHA_LIMIT)
    assert (tower.deterministic().intermediate == 0).sum() == round(3072 * (1 - 0.9979823)) == 6


def vit_b32() -> tuple[TowerMasks, TowerMasks]:
    return TowerMasks(768, 12, 12, 3072), TowerMasks(512, 12, 8, 2048)


def test_sizes_of_vit_b32() -> None:
    image, text = vit_b32()
    assert image.full_size() == 85_017_600
    assert text.full_size() == 37_804_032
    with torch.no_grad():
        for tower in (image, text):
            for alpha in tower.log_alphas():
                alpha.fill_(math.inf)
    floor = masks.expected_sparsity((image.expected_size(), image.full_size())).item()
    assert floor == pytest.approx(5.4e-4, abs=5e-6)  # N leaves out the FFN biases


def saturated() -> tuple[TowerMasks, TowerMasks]:
    towers = vit_b32()
    with torch.no_grad():
        for tower in towers:
            for alpha in tower.log_alphas():
                alpha.fill_(4.60517)
    return towers


def test_expected_sparsity_of_saturated_vit_b32() -> None:
    image, _ = saturated()
    q = 1 - 1 / (1 + math.exp(-((2 / 3) * math.log((1 / 12) / (11 / 12)) - 4.60517)))
    size = 196_864 / 768 * (768 * q) * (144 * q) + 2 * (768 * q) * (12 * 3072 * q)
    assert image.expected_size().item() == pytest.approx(size, rel=1e-6)
    sparsity = masks.expected_sparsity((image.expected_size(), image.full_size()))
    # The reference gives 0.00457054 with fp32 sums of 28 million terms; exact arithmetic gives 0.00457122.
    assert sparsity.item() == pytest.approx(1 - size / 85_017_600, abs=1e-7)
    assert sparsity.item() == pytest.approx(0.00457054, abs=1e-6)


def test_lagrangian_fixture() -> None:
    image, text = saturated()
    target = masks.sparsity_target(1000, 0.0, 0.25, 1000)
    pairs = [(tower.expected_size(), tower.full_size()) for tower in (image, text)]
    multipliers = Multipliers(image.linear, image.quadratic)
    one = masks.lagrangian(masks.expected_sparsity(pairs[0]), target, multipliers)
    assert one.item() == pytest.approx(3.0567, abs=1e-4)
    joint = masks.lagrangian(masks.expected_sparsity(*pairs), target, multipliers)
    assert joint.item() == pytest.approx(
        3.05540, abs=1e-5
    )  # 10 (0.25 - p) + 10 (0.25 - p)^2 with p = 0.00465407


def test_penalty_is_one_sided_by_default() -> None:
    multipliers = Multipliers(torch.tensor(3.0), torch.tensor(5.0))
    dense, sparse = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    assert masks.lagrangian(dense, 0.4, multipliers).item() == pytest.approx(3 * 0.3 + 5 * 0.09)
    assert masks.lagrangian(sparse, 0.4, multipliers).item() == 0
    assert masks.lagrangian(dense, 0.4, multipliers, "two").item() == pytest.approx(-3 * 0.3 + 5 * 0.09)
    assert masks.lagrangian(sparse, 0.4, multipliers, "two").item() == pytest.approx(3 * 0.2 + 5 * 0.04)


def test_target_schedule() -> None:
    targets = [masks.sparsity_target(step, 0.25, 0.5, 1000) for step in (0, 500, 1000, 5000)]
    assert targets == [0.25, 0.375, 0.5, 0.5]
    assert masks.sparsity_target(0, 0.25, 0.5, 0) == 0.5


def test_multipliers_ascend_under_a_descending_optimiser() -> None:
    """Equal to the reference's negative learning rate, step by step."""
    ours, reference = torch.nn.Parameter(torch.tensor(10.0)), torch.nn.Parameter(torch.tensor(10.0))
    ascent = torch.optim.AdamW([ours], lr=0.02, weight_decay=0.0)
    # torch refuses no negative rate that is set after construction.
    descent = torch.optim.AdamW([reference], lr=0.02, weight_decay=0.0)
    descent.param_groups[0]["lr"] = -0.02
    for step in range(20):
        deviation = 0.3 - 0.01 * step
        for parameter, optimiser in ((masks.reverse_gradient(ours), ascent), (reference, descent)):
            optimiser.zero_grad()
            (parameter * deviation).backward()
            optimiser.step()
    assert ours.item() == reference.item() > 10.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_layer_norm_equals_index_selection(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    norm = MaskedLayerNorm(37).double()
    with torch.no_grad():
        norm.weight.copy_(1 + torch.randn(37, generator=generator))
        norm.bias.copy_(torch.randn(37, generator=generator))
    norm = norm.to(dtype)
    kept = torch.rand(37, generator=generator) > 0.4
    x = (5 * torch.randn(3, 4, 37, generator=generator) + 2).to(dtype).requires_grad_()
    output = norm(x, kept)
    index = kept.nonzero().flatten()
    exact = x.detach().double().requires_grad_()
    expected = torch.zeros(3, 4, 37, dtype=torch.float64)
    expected[..., index] = torch.nn.functional.layer_norm(
        exact[..., index], (len(index),), norm.weight[index].double(), norm.bias[index].double(), norm.eps
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() < tolerance
    assert (output[..., ~kept] == 0).all()
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (output.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (x.grad.double() - exact.grad).abs().max() < 4 * tolerance


def test_all_kept_equals_open_clip() -> None:
    reference = tiny_clip().eval()
    model = MaskedCLIP.from_clip(reference).eval()
    images, tokens = inputs()
    ones = [
        masks.Mask(*(torch.ones_like(v) for v in tower(None)[0]))
        for tower in (model.image_masks, model.text_masks)
    ]
    with torch.no_grad():
        assert (model.visual(images, ones[0]) - reference.encode_image(images)).abs().max() < 5e-6
        assert (model.text(tokens, ones[1]) - reference.encode_text(tokens)).abs().max() < 5e-6


def oracle_block(
    block: Any, x: Tensor, hidden: Tensor, heads: Tensor, channels: Tensor, causal: bool
) -> Tensor:
    """One masked block of a single sequence [T, D] in float64, head by head and by index selection."""
    index = hidden.nonzero().flatten()

    def norm(layer: Any, value: Tensor) -> Tensor:
        result = torch.zeros_like(value)
        chosen = value[:, index]
        centred = chosen - chosen.mean(dim=1, keepdim=True)
        scaled = centred / (chosen.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        result[:, index] = scaled * layer.weight[index] + layer.bias[index]
        return result

    y = norm(block.ln_1, x)
    size = len(block.attn.in_proj_bias) // (3 * len(heads))
    inner = size * len(heads)
    total = block.attn.out_proj.bias.clone().expand(len(x), -1)
    for head, factor in enumerate(heads):
        rows = [slice(part * inner + head * size, part * inner + (head + 1) * size) for part in range(3)]
        q, k, v = (y @ block.attn.in_proj_weight[r].T + block.attn.in_proj_bias[r] for r in rows)
        scores = q @ k.T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        column = block.attn.out_proj.weight[:, head * size : (head + 1) * size]
        total = total + factor * (scores.softmax(dim=1) @ v) @ column.T
    x = x + hidden * total
    inside = block.mlp.c_fc(norm(block.ln_2, x))
    inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
    return x + hidden * block.mlp.c_proj(channels * inside)


def test_masked_block_equals_the_formula_head_by_head() -> None:
    model = MaskedCLIP.from_clip(tiny_clip()).double()
    spread_masks(model)
    generator = torch.Generator().manual_seed(0)
    for tower, stack, causal in (
        (model.image_masks, model.visual.transformer, False),
        (model.text_masks, model.text.transformer, True),
    ):
        mask, _, _ = tower(seed=11)
        mask = masks.Mask(*(value.double() for value in mask))
        assert (mask.hidden == 0).any() and (mask.heads == 0).any() and (mask.intermediate == 0).any()
        x = torch.randn(2, 7, len(mask.hidden), generator=generator, dtype=torch.float64) * mask.hidden
        expected = x
        with torch.no_grad():
            for layer, block in enumerate(stack.resblocks):
                parts = (mask.hidden, mask.heads[layer], mask.intermediate[layer])
                expected = torch.stack([oracle_block(block, row, *parts, causal) for row in expected])
            assert (stack(x, causal, mask) - expected).abs().max() < 1e-10


def test_sampling_is_a_function_of_the_seed_alone() -> None:
    model = MaskedCLIP.from_clip(tiny_clip()).train()
    spread_masks(model)
    images, tokens = inputs()
    first = model(images, tokens, seed=7, target=0.5)
    torch.rand(100)
    again = model(images, tokens, seed=7, target=0.5)
    other = model(images, tokens, seed=8, target=0.5)
    alone = model(None, tokens, seed=7)
    assert torch.equal(first.image_embeds, again.image_embeds)
    assert torch.equal(first.text_embeds, again.text_embeds)
    assert torch.equal(first.text_embeds, alone.text_embeds) and alone.image_embeds is None
    assert not torch.allclose(first.image_embeds, other.image_embeds)
    draws = [tower(7)[0].hidden for tower in (model.image_masks, model.text_masks)]
    assert not torch.equal(draws[0], model.image_masks(8)[0].hidden)
    assert first.penalty.item() == other.penalty.item()
    big = model(images, tokens, seed=2**63 - 1)
    assert torch.isfinite(big.image_embeds).all()


def test_evaluation_uses_the_deterministic_masks() -> None:
    model = MaskedCLIP.from_clip(tiny_clip()).eval()
    spread_masks(model)
    images, tokens = inputs()
    with torch.no_grad():
        output = model(images, tokens)
        image = model.visual(images, model.image_masks(None)[0])
        text = model.text(tokens, model.text_masks(None)[0])
        assert torch.equal(output.image_embeds, F.normalize(image, dim=-1))
        assert torch.equal(output.text_embeds, F.normalize(text, dim=-1))
        assert output.penalty is None
        assert output.image_embeds.norm(dim=-1).allclose(torch.ones(4))
    with pytest.raises(AssertionError, match="seed"):
        model.train()(images, tokens)


def test_joint_penalty_uses_both_towers_and_mean_multipliers() -> None:
    clip = tiny_clip()
    joint, apart = MaskedCLIP.from_clip(clip), MaskedCLIP.from_clip(clip, joint=False)
    for model in (joint, apart):
        spread_masks(model)
        with torch.no_grad():
            model.image_masks.linear.fill_(4.0)
            model.text_masks.linear.fill_(8.0)
    full = {}
    for tower in (joint.image_masks, joint.text_masks):
        d, heads, layers, channels = tower.width, tower.num_heads, tower.layers, tower.channels
        per_head = (4 * d * d + 4 * d) // heads
        q = [masks.keep_probability(alpha.detach()).double().sum().item() for alpha in tower.log_alphas()]
        size = per_head / d * q[0] * q[1] + 2 * q[0] * q[2]
        full[tower] = (size, layers * (heads * per_head + 2 * d * channels + d + channels))
    (n_i, p_i), (n_t, p_t) = full.values()
    delta = 0.9 - (1 - (n_i + n_t) / (p_i + p_t))
    images, tokens = inputs()
    output = joint(images, tokens, seed=0, target=0.9)
    assert output.joint_sparsity.item() == pytest.approx(0.9 - delta, abs=1e-7)
    assert output.penalty.item() == pytest.approx(6 * delta + 10 * delta**2, rel=1e-5)
    d_i, d_t = 0.9 - (1 - n_i / p_i), 0.9 - (1 - n_t / p_t)
    separate = apart(images, tokens, seed=0, target=0.9)
    assert separate.penalty.item() == pytest.approx(4 * d_i + 10 * d_i**2 + 8 * d_t + 10 * d_t**2, rel=1e-5)
    output.penalty.backward()
    assert joint.image_masks.linear.grad.item() == pytest.approx(-delta / 2, rel=1e-5)  # reversed
    assert joint.text_masks.quadratic.grad.item() == pytest.approx(-(delta**2) / 2, rel=1e-5)
    assert (joint.image_masks.hidden.grad > 0).all()  # descending makes the tower sparser


@pytest.mark.parametrize(("sides", "low", "high"), [("one", 0.5, 0.56), ("two", 0.495, 0.505)])
def test_masks_reach_the_target_sparsity(sides: masks.Sides, low: float, high: float) -> None:
    """With the published rates; the one-sided penalty stops pulling once it is below, so momentum carries it past."""
    tower = TowerMasks(48, 3, 3, 192, sides)
    groups = [{"params": tower.log_alphas()}, {"params": [tower.linear, tower.quadratic]}]
    optimiser = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0)
    for step in range(700):
        _, size, multipliers = tower(step)
        sparsity = masks.expected_sparsity((size, tower.full_size()))
        penalty = masks.lagrangian(sparsity, masks.sparsity_target(step, 0.0, 0.5, 400), multipliers, sides)
        optimiser.zero_grad()
        penalty.backward()
        optimiser.step()
        with torch.no_grad():
            for alpha in tower.log_alphas():
                alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)
    assert low < sparsity.item() < high


def test_every_parameter_gets_a_gradient_from_one_step() -> None:
    model = MaskedCLIP.from_clip(tiny_clip()).train()
    output = model(*inputs(), seed=0, target=0.5)
    (
        (output.image_embeds @ output.text_embeds.T * output.logit_scale).logsumexp(1).sum() + output.penalty
    ).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_parameter_groups_cover_every_parameter_once() -> None:
    model = MaskedCLIP.from_clip(tiny_clip())
    groups = {group["name"]: group for group in model.param_groups(decay_groups(model, OptimConfig(lr=1e-3)))}
    assert [*groups] == ["decay", "no_decay", "masks", "multipliers"]
    listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    for name, size in (("masks", 6), ("multipliers", 4)):
        group = groups[name]
        assert len(group["params"]) == size
        assert (group["lr"], group["weight_decay"], group["betas"], group["schedule"]) == (
            0.02,
            0.0,
            (0.9, 0.999),
            False,
        )
    assert [high for _, _, high in model.bounds()] == [pytest.approx(4.60517, abs=1e-5)] * 6


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_bfloat16_keeps_mask_arithmetic_in_fp32(precision: str) -> None:
    model = MaskedCLIP.from_clip(tiny_clip()).train()
    spread_masks(model)
    exact = model(*inputs(), seed=3, target=0.9)
    if precision == "weights":
        rounded = {
            name: value.bfloat16().float() for name, value in model.state_dict().items() if "masks." in name
        }
        model.load_state_dict({**model.state_dict(), **rounded})
        exact = model(*inputs(), seed=3, target=0.9)
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        output = model(*inputs(), seed=3, target=0.9)
    assert output.image_embeds.dtype == output.penalty.dtype == torch.float32
    assert output.penalty.item() == pytest.approx(exact.penalty.item(), rel=1e-6)
    assert (output.image_embeds * exact.image_embeds).sum(dim=-1).min() > 0.999
    (output.penalty + output.image_embeds.sum() + output.text_embeds.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_float64_stays_float64_with_exact_gradients() -> None:
    tower = TowerMasks(6, 2, 2, 5).double()
    with torch.no_grad():
        for alpha in tower.log_alphas():
            alpha.copy_(torch.randn(alpha.shape, generator=torch.Generator().manual_seed(2)))
    parts = [tower.deterministic(), *tower(seed=1)]
    assert {value.dtype for part in parts for value in (part if isinstance(part, tuple) else (part,))} == {
        torch.float64
    }

    def of(hidden: Tensor, heads: Tensor, intermediate: Tensor) -> tuple[Tensor, ...]:
        values = {"hidden": hidden, "heads": heads, "intermediate": intermediate}
        mask, size, multipliers = torch.func.functional_call(tower, values, (1,))
        sparsity = masks.expected_sparsity((size, tower.full_size()))
        return (*mask, masks.lagrangian(sparsity, 0.9, multipliers))

    inside = [alpha.detach().clone().requires_grad_() for alpha in tower.log_alphas()]
    assert torch.autograd.gradcheck(of, inside)  # to 1e-6, which float32 inside would fail


def test_activation_checkpointing_changes_nothing() -> None:
    model = MaskedCLIP.from_clip(tiny_clip()).train()
    spread_masks(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        output = model(*inputs(), seed=3, target=0.9)
        (
            output.penalty + output.image_embeds.square()[:, 0].sum() + output.text_embeds[:, 1].sum()
        ).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 60
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_training_step_never_waits_for_the_device() -> None:
    """Fake tensors refuse every operation whose result the host would have to read."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    config = MaskedCLIP.from_clip(tiny_clip()).config
    with FakeTensorMode() as mode:
        model = MaskedCLIP(config).train()
        images, tokens = (mode.from_tensor(value) for value in inputs())
        output = model(images, tokens, seed=3, target=0.9)
        (output.penalty + output.image_embeds.sum() + output.text_embeds.sum()).backward()
        assert all(alpha.grad is not None for alpha in model.image_masks.log_alphas())
        model.eval()(images, tokens)
        with pytest.raises(DataDependentOutputException):  # as they would have above
            output.penalty.item()


def test_mask_state_resumes_exactly() -> None:
    model = MaskedCLIP.from_clip(tiny_clip()).train()
    spread_masks(model)
    other = MaskedCLIP(model.config).train()
    other.load_state_dict(model.state_dict())
    ours, theirs = model(*inputs(), seed=9, target=0.9), other(*inputs(), seed=9, target=0.9)
    assert torch.equal(ours.image_embeds, theirs.image_embeds) and torch.equal(ours.penalty, theirs.penalty)


def test_pruned_models_must_reenter() -> None:
    config = MaskedCLIP.from_clip(tiny_clip()).config
    ragged = {**config, "vision_cfg": {**config["vision_cfg"], "heads": [3, 2, 3]}}
    with pytest.raises(UserError, match=r"image tower differ.*reenter"):
        MaskedCLIP(ragged)
