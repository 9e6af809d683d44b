"""Chunked against dense affinity loss: time and peak memory of one forward and backward pass, as a Markdown table.

    python benchmarks/affinity.py [--threads 1] [--rounds 3] [--rows 1024:1024 8192:8192 1024:32768 32768:32768]

Every measurement is a process of its own, so that its peak memory is its own; the two forms take turns, and the
table gives medians. Memory is what the pass adds to the embeddings (resident set on a CPU, allocator on a GPU).
CPU seconds are steadier than wall seconds on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vlmkd.losses.affinity import PairEmbeds, affinity_loss  # noqa: E402

DENSE_BLOCKS = 8  # [b, B] blocks alive at once in the dense form, rounded up from what its memory test counts
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="processes per form and size")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["1024:1024", "8192:8192", "1024:32768", "32768:32768"],
        help="local rows:gathered columns; equal numbers mean one process without gathering",
    )
    parser.add_argument(
        "--case", nargs=3, type=int, metavar=("ROWS", "COLUMNS", "CHUNK"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure(*args.case, args.width)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} thread(s)"
    print(
        f"Affinity loss forward + backward, width {args.width}, chunk {args.chunk}, torch {torch.__version__}, {device}\n"
    )
    print("| local rows | columns | form | wall s | CPU s | added memory MiB | wall ratio | CPU ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for pair in args.rows:
        rows, columns = map(int, pair.split(":"))
        rounds = 1 if rows * columns > 2**27 else args.rounds
        print_rows(rows, columns, rounds, args)


def print_rows(rows: int, columns: int, rounds: int, args: argparse.Namespace) -> None:
    """Measure both forms in turns and print their two lines of the table."""
    forms = {"dense": 0, "chunked": args.chunk}
    needed = DENSE_BLOCKS * rows * columns * 4
    if needed > available_bytes():
        forms.pop("dense")
        reason = (
            f"skipped: needs about {needed / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are free"
        )
        print(f"| {rows} | {columns} | dense | {reason} | | | | |")
    results: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for _ in range(rounds):
        for form, chunk in forms.items():
            case = ["--case", str(rows), str(columns), str(chunk)]
            options = ["--threads", str(args.threads), "--width", str(args.width)]
            done = subprocess.run(
                [sys.executable, __file__, *options, *case],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            )
            results[form].append(json.loads(done.stdout))
    median = {
        form: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for form, found in results.items()
    }
    for form, found in median.items():
        ratios = [
            f"{found[key] / median['dense'][key]:.2f}" if "dense" in median else "" for key in ("wall", "cpu")
        ]
        print(
            f"| {rows} | {columns} | {form} | {found['wall']:.3f} | {found['cpu']:.3f} | {found['memory'] / MIB:.0f} | "
            f"{' | '.join(ratios)} |",
            flush=True,
        )


def available_bytes() -> int:
    """Free memory of the device that the loss runs on."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def embeddings(rows: int, columns: int, width: int, device: str) -> tuple[list[Tensor], PairEmbeds]:
    """Pairs that share a direction, so that the softmax is neither flat nor saturated."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(columns, width, generator=generator)
    images, texts, teacher_images, teacher_texts = (
        F.normalize(shared + 2 * torch.randn(columns, width, generator=generator), dim=-1).to(device)
        for _ in range(4)
    )
    if rows == columns:
        return [images, texts], PairEmbeds(teacher_images, teacher_texts, 50.0)
    local = [x[:rows].clone() for x in (images, texts)]
    teacher = PairEmbeds(teacher_images[:rows], teacher_texts[:rows], 50.0, teacher_images, teacher_texts)
    return [*local, images, texts], teacher


def measure(rows: int, columns: int, chunk: int, width: int) -> dict[str, float]:
    """Seconds and added bytes of one pass in this process; the first pass warms up only at small sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves, teacher = embeddings(rows, columns, width, device)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    scale = torch.tensor(50.0, device=device, requires_grad=True)
    names = ["image_embeds", "text_embeds", "all_image_embeds", "all_text_embeds"][: len(leaves)]

    def once() -> None:
        for leaf in (*leaves, scale):
            leaf.grad = None
        affinity_loss(
            **dict(zip(names, leaves, strict=True)), logit_scale=scale, teachers=[teacher], chunk=chunk
        ).ce.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    warm = F.normalize(torch.randn(64, width, device=device), dim=-1).requires_grad_()
    affinity_loss(warm, warm, scale, [PairEmbeds(warm, warm, 50.0)], chunk=chunk).ce.backward()
    before = torch.cuda.memory_allocated() if device == "cuda" else resident_bytes()
    times = []
    for _ in range(10 if rows * columns <= 2**21 else 1):
        wall, cpu = time.perf_counter(), time.process_time()
        once()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {"wall": wall, "cpu": cpu, "memory": peak - before}


def resident_bytes() -> int:
    """Resident set of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
