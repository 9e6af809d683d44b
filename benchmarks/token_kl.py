"""Token KL from hidden states against dense logits and Liger's: time and peak memory, as a Markdown table.

    python benchmarks/token_kl.py [--threads 1] [--rounds 3] [--rows 384] [--entries 151936] [--widths 896 1536]

One forward and backward pass: the forward KL of a teacher with its own head, and a student whose hidden states and head
are trained. Liger Kernel's chunked loss (`pip install liger-kernel`, torch alone) takes part where it is installed. Every
measurement is a process of its own; the forms take turns, and the table gives medians. Memory is what the pass adds to
states and heads (resident set on a CPU, allocator on a GPU), gradients included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vlmkd import memory  # noqa: E402
from vlmkd.losses.logits import kl_divergence  # noqa: E402
from vlmkd.losses.tokens import TeacherStates, TokenObjective, token_loss  # noqa: E402


def dense(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_head.T
    return kl_divergence(hidden @ head.T, teacher)


def chunked(chunk: int) -> Callable[..., Tensor]:
    def form(hidden: Tensor, head: Tensor, *teacher: Tensor) -> Tensor:
        found = token_loss(hidden, head, TeacherStates(*teacher), TokenObjective(chunk=chunk))
        return found.total / found.num_rows

    return form


def liger(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=hidden.is_cuda, chunk_size=128
    )
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    return loss(hidden, head, teacher_hidden, teacher_head, labels)


FORMS: dict[str, Callable[..., Tensor]] = {
    "dense": dense, "chunked, 128 rows": chunked(128), "chunked, 32 rows": chunked(32), "Liger, 128 rows": liger,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--entries", type=int, default=151_936)
    parser.add_argument("--widths", type=int, nargs=2, default=[896, 1536], help="of student and teacher")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.form:
        print(json.dumps(measure(FORMS[args.form], args)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} thread(s)"
    print(
        f"{args.rows} rows, {args.entries} entries, widths {args.widths}, torch {torch.__version__}, {device}\n"
    )
    forms = [name for name in FORMS if "Liger" not in name or importlib.util.find_spec("liger_kernel")]
    results: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for _ in range(args.rounds):
        for form in forms:
            command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            results[form].append(json.loads(done.stdout.splitlines()[-1]))
    print("| form | wall s | CPU s | added memory MiB | wall ratio | memory ratio | loss |")
    print("|---|---|---|---|---|---|---|")
    median = {
        f: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for f, runs in results.items()
    }
    for form, found in median.items():
        wall, bytes_ = (found[key] / median["dense"][key] for key in ("wall", "memory"))
        print(
            f"| {form} | {found['wall']:.3f} | {found['cpu']:.3f} | {found['memory'] / 2**20:.0f} | {wall:.2f} | "
            f"{bytes_:.2f} | {found['loss']:.5f} |"
        )


def measure(form: Callable[..., Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Seconds and added bytes of one pass in this process; a GPU passes once to warm up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    states = []
    for width in args.widths:
        hidden, head = torch.randn(args.rows, width, generator=generator), torch.empty(args.entries, width)
        states += [
            hidden.to(device, dtype),
            head.normal_(std=width**-0.5, generator=generator).to(device, dtype),
        ]
    del hidden, head
    leaves = [state.requires_grad_() for state in states[:2]]

    def once() -> float:
        for leaf in leaves:
            leaf.grad = None
        loss = form(*states)
        loss.backward()
        return loss.item()

    small = [state[:8].detach().requires_grad_() for state in states]
    form(*small).backward()  # libraries are loaded
    if device == "cuda":
        once()
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else memory.held()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = once()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "memory": memory.peak() - before, "loss": loss}


if __name__ == "__main__":
    main()
