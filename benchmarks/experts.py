"""Experts of a sparse layer: ours against a loop over experts and transformers' Qwen2-MoE, as a Markdown table.

    python benchmarks/experts.py [--threads 1] [--rounds 3] [--tokens 256 1024 4096] [--dim 1024] [--inner 2816]

One forward and backward pass of four gated experts, two for each token, with the same weights and the same choices, whose
outputs must agree; `dense` is one such network for all tokens, which has half of the products. The forms take turns,
and the table gives medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock  # noqa: E402
from projects.llava_mod.experts import Experts, Routing, route  # noqa: E402

COUNT, TOP_K = 4, 2


def looped(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Every expert on the tokens that chose it, one after the other."""
    out = torch.zeros_like(x)
    for index in range(COUNT):
        token, place = torch.where(routing.experts == index)
        gate, up = F.linear(x[token], gate_up[index]).chunk(2, dim=-1)
        part = F.linear(F.silu(gate) * up, down[index]) * routing.weights[token, place, None]
        out = out.index_add(0, token, part)
    return out


def forms(dim: int, inner: int) -> tuple[dict[str, Callable[[Tensor, Routing], Tensor]], list[Tensor]]:
    """The forms by name, and the weights of all."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    torch.manual_seed(0)
    ours = Experts(COUNT, dim, inner)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    gate_up, down = ours.gate_up_proj, ours.down_proj

    def stock(implementation: str) -> Callable[[Tensor, Routing], Tensor]:
        config = Qwen2MoeConfig(
            hidden_size=dim, moe_intermediate_size=inner, num_experts=COUNT, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = implementation
        block = Qwen2MoeExperts(config)
        block.gate_up_proj, block.down_proj = gate_up, down
        return lambda x, routing: block(x, routing.experts, routing.weights)

    def dense(x: Tensor, _: Routing) -> Tensor:
        gate, up = F.linear(x, gate_up[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down[0])

    return {
        "ours": lambda x, routing: ours(x, routing, F.silu),
        "loop": lambda x, routing: looped(x, gate_up, down, routing),
        "transformers, eager": stock("eager"),
        "transformers, grouped_mm": stock("grouped_mm"),
        "dense": dense,
    }, [gate_up, down]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named, weights = forms(args.dim, args.inner)
    for weight in weights:
        weight.data = weight.data.to(device)
    print(f"{device}, {args.threads} thread(s), {COUNT} experts of {args.inner}, width {args.dim}, fp32")
    print("| tokens | form | s | ratio to ours |\n|---:|---|---:|---:|")
    for tokens in args.tokens:
        x = torch.randn(tokens, args.dim, device=device, requires_grad=True)
        routing = route(torch.randn(tokens, COUNT, device=device), TOP_K)
        expected = named["loop"](x, routing).detach()
        seconds: dict[str, list[float]] = {name: [] for name in named}
        for turn in range(args.rounds + 1):
            for name, form in named.items():
                x.grad = None
                for weight in weights:
                    weight.grad = None
                began = clock(device)
                out = form(x, routing)
                out.square().mean().backward()
                if turn:  # the first warms up
                    seconds[name].append(clock(device) - began)
                elif name != "dense":
                    torch.testing.assert_close(out.detach(), expected, rtol=1e-3, atol=1e-4)
        base = statistics.median(seconds["ours"])
        for name, found in seconds.items():
            middle = statistics.median(found)
            print(f"| {tokens} | {name} | {middle:.3f} | {middle / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
