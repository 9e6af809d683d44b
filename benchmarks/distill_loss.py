"""open_clip's DistillClipLoss step against ours on the same tensors: forward and backward, in turns, as Markdown.

    python benchmarks/distill_loss.py [--threads 1] [--repeats 15] [--rows 256 1024 4096]

open_clip always computes the contrastive and the distillation term, so "both terms" is the like-for-like line;
"affinity only" is what TinyCLIP trains with (alpha = 1). Ours also gives the KL, open_clip's does not.
CPU seconds are steadier than wall seconds on a machine that does other work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vlmkd.losses.affinity import PairEmbeds, affinity_loss  # noqa: E402
from vlmkd.losses.contrastive import clip_loss  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"Width {args.width}, open_clip {open_clip.__version__}, torch {torch.__version__}, {name}\n")
    print("| rows | loss | wall ms | CPU ms | wall ratio | CPU ratio | loss value |")
    print("|---|---|---|---|---|---|---|")
    for rows in args.rows:
        print_rows(rows, args.width, args.repeats, device)


def steps(rows: int, width: int, device: str) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """The compared losses over one set of tensors, and the leaves they differentiate."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(rows, width, generator=generator)
    image, text, teacher_image, teacher_text = (
        F.normalize(shared + 2 * torch.randn(rows, width, generator=generator), dim=-1).to(device)
        for _ in range(4)
    )
    scale = torch.tensor(50.0, device=device)
    leaves = [x.requires_grad_() for x in (image, text, scale)]
    teacher = PairEmbeds(teacher_image, teacher_text, 50.0)
    reference = DistillClipLoss()

    def open_clip_step() -> Tensor:
        contrastive, distill = reference(image, text, scale, teacher_image, teacher_text, 50.0)
        return contrastive + distill

    def our_affinity(chunk: int = 0) -> Tensor:
        return affinity_loss(image, text, scale, [teacher], chunk=chunk).ce

    return {
        "open_clip, both terms": open_clip_step,
        "vlmkd, both terms": lambda: clip_loss(image, text, scale) + our_affinity(),
        "vlmkd, affinity only": our_affinity,
        "vlmkd, affinity only, chunk 512": lambda: our_affinity(512),
    }, leaves


def print_rows(rows: int, width: int, repeats: int, device: str) -> None:
    """Measure all losses in turns and print one line each, with ratios to open_clip."""
    losses, leaves = steps(rows, width, device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    values: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, loss in losses.items():
            for leaf in leaves:
                leaf.grad = None
            wall, cpu = time.perf_counter(), time.process_time()
            value = loss()
            value.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:  # the first turn warms up
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            values[name] = value.item()
    medians = {
        name: [statistics.median(c) for c in zip(*found, strict=True)] for name, found in times.items()
    }
    base = medians["open_clip, both terms"]
    for name, (wall, cpu) in medians.items():
        print(
            f"| {rows} | {name} | {1000 * wall:.1f} | {1000 * cpu:.1f} | {wall / base[0]:.2f} | {cpu / base[1]:.2f} | "
            f"{values[name]:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
