"""What a GPU does with TinyCLIP's step: ViT-B/32 teacher, 40M/32 student; stored teacher or not, dense and chunked affinity.

python benchmarks/gpu.py [--batch-size 1024] [--precision bf16] [--peak-tflops 989]
python benchmarks/gpu.py --toy                                       (nano models; any machine)

Random weights and random pictures that lie on the device, so that no loader is measured; the steps go through the real
engine. Model FLOPs are those of the matrix products of one step, student forward and backward and teacher forward,
counted by torch; utilisation is their rate over the device's dense peak (by name where it is known).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from projects.tinyclip.build import distill_job
from projects.tinyclip.config import DistillConfig
from vlmkd import config, distributed, memory
from vlmkd.train import engine
from vlmkd.train.task import Task

MODELS = Path(__file__).resolve().parents[1] / "projects" / "tinyclip" / "configs" / "models"
STUDENT, TEACHER = str(MODELS / "TinyCLIP-ViT-40M-32-Text-19M.json"), "ViT-B-32"
TOY_STUDENT, TOY_TEACHER = str(MODELS / "emoji_student.json"), str(MODELS / "emoji_teacher.json")
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "V100": 125}  # bf16/fp16, dense
_WARM = 3


def batch_of(job: Any, rows: int, device: torch.device, stored: bool) -> dict[str, Any]:
    """Random pictures and captions, and with `stored` the teacher's embeddings of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, *job.task.source.image_spec.size, generator=generator)
    tokens = job.task.source.tokenizer([f"a photo of the thing number {row}" for row in range(rows)])
    batch: dict[str, Any] = {"images": images, "tokens": tokens}
    if stored:
        width = job.task.teachers[0].clip.config["embed_dim"]
        for name in ("image", "text"):
            batch[f"teacher_{name}_embeds"] = F.normalize(
                torch.randn(rows, width, generator=generator), dim=-1
            )
    batch = {name: value.to(device) for name, value in batch.items()}
    batch |= {name: [batch[name]] for name in batch if name.startswith("teacher_")}
    return batch


def measure(cfg: DistillConfig, stored: bool, steps: int) -> dict[str, float]:
    """Median seconds, FLOPs and peak memory (MB) of a step."""
    job = distill_job(cfg)
    around = engine.Engine(job.task, cfg)
    if not stored:
        around.place_teacher(job.task.teachers[0], shard=False)
    batch = batch_of(job, cfg.batch_size, around.device, stored)
    batch["images"] = batch["images"].to(around.dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def step(number: int, task: Task = job.task) -> None:
        around.backward(task.step(batch, number).loss)
        around.update()

    with FlopCounterMode(display=False) as counter:
        step(0)
    times = []
    for number in range(1, _WARM + steps):
        start = time.perf_counter()
        step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= _WARM:
            times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "flops": float(counter.get_total_flops()),
        "memory": memory.peak() / 1e6,
    }


def peak_tflops(given: float) -> float:
    """The device's peak: as given, else by its name, else 0."""
    if given or not torch.cuda.is_available():
        return given
    name = torch.cuda.get_device_name()
    return next((float(value) for key, value in PEAK_TFLOPS.items() if key in name), 0.0)


def main(argv: list[str]) -> None:
    """Print the table."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=0, help="default: 1024, with --toy 32")
    parser.add_argument("--precision", choices=engine.PRECISIONS, default="bf16" if gpu else "fp32")
    parser.add_argument("--chunk", type=int, default=512, help="tile of the chunked affinity")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="the device's dense peak")
    parser.add_argument("--toy", action="store_true", help="nano models in place of ViT-B/32 and 40M/32")
    args = parser.parse_args(argv)
    rows = args.batch_size or (32 if args.toy else 1024)
    student, teacher = (TOY_STUDENT, TOY_TEACHER) if args.toy else (STUDENT, TEACHER)
    engine.start_ranks()
    peak = peak_tflops(args.peak_tflops)
    device = torch.cuda.get_device_name() if gpu else str(distributed.device())
    print(
        f"{Path(student).stem} from {Path(teacher).stem}, batch {rows}, {args.precision}, {device}, torch {torch.__version__}\n"
    )
    print("| teacher | affinity | s/step | samples/s | TFLOPs/s | utilisation | peak memory, MB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for stored in (False, True):
            for chunk in (0, args.chunk):
                cfg = config.load(
                    DistillConfig,
                    [
                        f"run_dir={folder}/run", f"student.model={student}", f"teachers=[{{model: {teacher}}}]",
                        f"batch_size={rows}", f"loss.affinity_chunk={chunk}", "data.kind=synthetic",
                        f"deepspeed.precision={args.precision}",
                    ],
                )  # fmt: skip
                found = measure(cfg, stored, args.steps)
                rate = found["flops"] / found["seconds"] / 1e12
                print(
                    f"| {'stored' if stored else 'beside the student'} | {f'chunks of {chunk}' if chunk else 'dense'} "
                    f"| {found['seconds']:.3f} | {rows / found['seconds']:.0f} | {rate:.2f} "
                    f"| {f'{rate / peak:.0%}' if peak else '-'} | {found['memory']:.0f} |",
                    flush=True,
                )
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
