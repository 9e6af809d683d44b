"""Routing, experts and their balance against loops written out; up-cycling changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from projects.llava_mod.experts import (
    Experts,
    SparseFfn,
    balance,
    balance_loss,
    grouped,
    mark_valid,
    moe_layers,
    route,
    sparse_layers,
    upcycle,
)
from vlmkd.errors import UserError


def by_hand(logits, top_k, capacity, valid):
    """Token by token: experts and weights, all first choices before any second one."""
    tokens, count = logits.shape
    probs = logits.double().softmax(-1)
    room = math.ceil(sum(valid) / count * top_k * capacity) if capacity else tokens
    taken = [0] * count
    kept = [[] for _ in range(tokens)]
    order = [logits[token].argsort(descending=True)[:top_k].tolist() for token in range(tokens)]
    for choice in range(top_k):
        for token in range(tokens):
            if valid[token]:
                expert = order[token][choice]
                if taken[expert] < room:
                    kept[token].append(expert)
                taken[expert] += 1
    weights = torch.zeros(tokens, count, dtype=torch.float64)
    for token, experts in enumerate(kept):
        total = sum(probs[token, expert] for expert in experts)
        for expert in experts:
            weights[token, expert] = probs[token, expert] / total
    return weights


@pytest.mark.parametrize(("top_k", "capacity"), [(1, 0.0), (2, 0.0), (2, 0.6), (2, 1.5), (3, 0.3)])
def test_routing_by_hand(top_k, capacity):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 4, generator=generator) * 2
    valid = torch.rand(40, generator=generator) < 0.8
    routing = route(logits, top_k, valid=valid, capacity=capacity)
    found = torch.zeros(40, 4).scatter(1, routing.experts, routing.weights)
    expected = by_hand(logits, top_k, capacity, valid.tolist())
    torch.testing.assert_close(found[valid].double(), expected[valid], rtol=0, atol=1e-6)


def test_noise_moves_the_second_choice_alone_and_not_its_weight():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    routing = route(logits, 2, noise=torch.tensor([[9.0, 0.0, 0.0, 5.0]]))
    assert routing.experts.tolist() == [[0, 3]]
    probs = logits.softmax(-1)[0]
    torch.testing.assert_close(routing.weights[0], probs[[0, 3]] / probs[[0, 3]].sum())


@pytest.mark.parametrize("counts", ["first", "all"])
def test_balance_by_hand(counts):
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(4))
    valid = torch.arange(30) % 3 != 0
    routing = route(logits, 2)
    probs = logits.double().softmax(-1)
    expected = 0.0
    kept = [token for token in range(30) if valid[token]]
    for expert in range(5):
        number = 1 if counts == "first" else 2
        chosen = sum(expert in logits[token].argsort(descending=True)[:number].tolist() for token in kept)
        mean = sum(float(probs[token, expert]) for token in kept) / len(kept)
        expected += 5 * chosen / len(kept) * mean
    assert float(balance_loss(routing, valid, counts)) == pytest.approx(expected, rel=1e-5)
    alike = route(torch.eye(4).repeat(5, 1) * 1e-4, 2)
    assert float(balance_loss(alike, None, counts)) == pytest.approx(1 if counts == "first" else 2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_products_equal_a_loop_with_empty_groups(dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(11, 16, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(4, 8, 16, generator=generator).to(dtype).requires_grad_()
    sizes = torch.tensor([3, 0, 7, 1])
    found = grouped(x, weights, sizes)
    parts = [part @ weight.T for part, weight in zip(x.split(sizes.tolist()), weights, strict=True)]
    expected = torch.cat(parts)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)
    for one, other in zip(
        torch.autograd.grad(found.sum(), [x, weights]),
        torch.autograd.grad(expected.sum(), [x, weights]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("inner", [24, 5])  # 5: no width that the grouped product takes
def test_experts_equal_a_loop_over_tokens(inner):
    torch.manual_seed(6)
    experts = Experts(4, 8, inner)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(13, 8, requires_grad=True)
    routing = route(torch.randn(13, 4), 2)
    found = experts(x, routing, F.silu)
    rows = []
    for token in range(13):
        row = torch.zeros(8)
        for expert, weight in zip(routing.experts[token], routing.weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            row = row + weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(row)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(found.square().sum(), [x, *experts.parameters()])
    others = torch.autograd.grad(torch.stack(rows).square().sum(), [x, *experts.parameters()])
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_an_upcycled_decoder_says_what_it_said(rows):
    dense, sparse = decoder().eval(), decoder().eval()
    upcycle(sparse, moe_layers("sparse", 4))
    assert len(sparse_layers(sparse)) == 2 and isinstance(sparse.model.layers[2].mlp, SparseFfn)
    ids = torch.randint(50, (rows, 9), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=0, atol=5e-6)


def test_evaluation_is_deterministic_and_training_drops_and_draws_only_where_asked():
    sparse = decoder()
    upcycle(sparse, [0, 2], second="gumbel", capacity=0.5)
    for layer in sparse_layers(sparse):
        torch.nn.init.normal_(layer.experts.down_proj)
    ids = torch.randint(50, (2, 9))
    sparse.train()
    assert not torch.equal(sparse(ids).logits, sparse(ids).logits)
    assert any((layer.routing.weights == 0).any() for layer in sparse_layers(sparse))
    sparse.eval()
    assert torch.equal(sparse(ids).logits, sparse(ids).logits)
    assert not any((layer.routing.weights == 0).any() for layer in sparse_layers(sparse))


def test_padding_counts_in_no_balance():
    sparse = decoder().eval()
    upcycle(sparse, [1])
    ids = torch.randint(50, (2, 9))
    valid = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    sparse(ids)
    found = balance(sparse, valid)
    (layer,) = sparse_layers(sparse)
    kept = valid.flatten()
    part = type(layer.routing)(*(column[kept] for column in layer.routing))
    assert found.item() == pytest.approx(balance_loss(part).item())


@pytest.mark.parametrize("second", ["argmax", "gumbel"])
def test_recomputed_layers_route_as_before(second):
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(9))
    valid = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    found = []
    for recompute in (False, True):
        sparse = decoder().train()
        torch.manual_seed(10)
        upcycle(sparse, [0, 2], second=second, capacity=0.6)
        if recompute:
            sparse.gradient_checkpointing_enable({"use_reentrant": False})
        mark_valid(sparse, valid)
        torch.manual_seed(11)
        loss = sparse(ids, use_cache=False).logits.square().mean() + balance(sparse, valid)
        loss.backward()
        found.append([p.grad for p in sparse.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_and_decoders_that_do_not_fit_are_named():
    assert moe_layers("second_half", 5) == [2, 3, 4] and moe_layers("list", 5, [4]) == [4]
    for chosen in ([5], [1, 1], [], [-1]):
        with pytest.raises(UserError, match="config field moe.layers .*the decoder has layers 0 to 4"):
            moe_layers("list", 5, chosen)
    with pytest.raises(UserError, match="PhiMLP of layer 0 is no gated"):
        upcycle(PhiForCausalLM(PhiConfig(**SIZES)), [0])
