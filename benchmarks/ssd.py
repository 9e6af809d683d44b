"""Mamba-2's scan, ours against transformers' PyTorch path and against causal attention, as a Markdown table.

    python benchmarks/ssd.py [--lengths 256 1024 4096 16384] [--heads 32 --kv-heads 32 --head-dim 80] [--train] [--threads 1]

The defaults are one layer of Phi-2; `--heads 9 --kv-heads 3 --head-dim 64` is SmolLM2-135M. Mixing alone, without
projections. Every measurement is a process of its own, so that its peak memory is its own; the forms take turns, and
the table gives medians. CPU milliseconds are steadier than wall time on a machine that does other work.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from projects.matvlm.ssd import CHUNK, ssd  # noqa: E402
from vlmkd.memory import peak  # noqa: E402

MIB = 2**20
FORMS = ("ours", f"transformers, chunk {CHUNK}", "transformers, chunk 256", "attention (SDPA)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=80)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--rounds", type=int, default=3, help="processes per form and length")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import transformers.models.mamba2.modeling_mamba2  # noqa: F401, the children find it imported

    passes = "forward + backward" if args.train else "forward"
    print(
        f"{passes}, {args.heads} heads of {args.head_dim} on {args.kv_heads}, batch {args.batch}, fp32, "
        f"{args.threads} thread(s), torch {torch.__version__}\n"
    )
    print("| tokens | form | CPU ms | over ours | added memory MiB | over ours |")
    print("|---:|---|---:|---:|---:|---:|")
    ratios: list[tuple[int, float]] = []
    for length in sorted(args.lengths):
        found: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
        for _ in range(args.rounds):
            for form in FORMS:
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    found[form].append(pool.apply(measure, (form, length, args)))
        medians = {
            form: [statistics.median(column) for column in zip(*rows, strict=True)]
            for form, rows in found.items()
        }
        ratios.append((length, medians[FORMS[-1]][0] / medians[FORMS[0]][0]))
        for form, (cpu, memory) in medians.items():
            ours = medians[FORMS[0]]
            print(
                f"| {length:,} | {form} | {cpu:.1f} | {cpu / ours[0]:.2f} | {memory / MIB:.0f} | {memory / ours[1]:.2f} |",
                flush=True,
            )
    for (short, less), (long, more) in itertools.pairwise(ratios):
        if less < 1 <= more:  # a straight line between the logarithms
            share = math.log(1 / less) / math.log(more / less)
            print(f"\nAttention takes longer from about {short * (long / short) ** share:,.0f} tokens on.")


def inputs(length: int, args: argparse.Namespace) -> list[Tensor]:
    """x, dt, A, B, C, D."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(args.batch, length, heads, args.head_dim, generator=generator)

    dt = torch.rand(args.batch, length, args.heads, generator=generator) / 10
    A = -torch.linspace(1, 16, args.heads)
    return [draw(args.kv_heads), dt, A, draw(args.kv_heads), draw(args.heads), torch.ones(args.heads)]


def form_of(name: str, args: argparse.Namespace) -> Callable[..., Tensor]:
    """The mixing by its name, from x, dt, A, B, C, D to y."""
    repeats = args.heads // args.kv_heads

    def transformers_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        x, B = (t.repeat_interleave(repeats, 2) for t in (x, B))
        return mamba2_chunk_scan(x, dt, A, B, C, int(name.split()[-1]), D=D)

    def attention(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (C, B, x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=repeats > 1)

    if name == FORMS[0]:
        return lambda *given: ssd(*given)[0]
    return transformers_scan if name.startswith("transformers") else attention


def measure(name: str, length: int, args: argparse.Namespace) -> tuple[float, float]:
    """CPU milliseconds and added bytes of one pass in this process."""
    torch.set_num_threads(args.threads)
    form = form_of(name, args)

    def once(given: list[Tensor]) -> None:
        if not args.train:
            with torch.no_grad():
                form(*given)
            return
        form(*(t.detach().requires_grad_() for t in given)).square().sum().backward()

    once(inputs(64, args))
    given = inputs(length, args)
    before = peak()
    times = []
    for _ in range(3 if length <= 4096 else 1):
        start = time.process_time()
        once(given)
        times.append(time.process_time() - start)
    return 1000 * min(times), float(max(peak() - before, MIB))


if __name__ == "__main__":
    main()
