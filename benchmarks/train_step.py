"""Training step with the teacher beside the student against the same step with stored teacher embeddings.

python benchmarks/train_step.py [--batch-size 128] [--steps 12] [--threads 2]

Both runs go through the real engine on the emoji set, one after the other in turns; the first steps of each turn are
left out. Prints samples/s of both, the ratio, and where the time goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from projects.tinyclip.build import distill_job
from projects.tinyclip.config import DistillConfig
from vlmkd import config, distributed, engine
from vlmkd.data.embedded import resolve
from vlmkd.data.teacher_cache import embed_shards
from vlmkd.models.clip import ClipPredictor, load_clip
from vlmkd.trainer import to_device

CONFIGS = Path(__file__).resolve().parents[1] / "projects" / "tinyclip" / "configs" / "emoji"
TEACHER = "zoo:tinyclip-emoji-teacher"
_WARM = 2


def turn(cfg: DistillConfig, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds a step, and its spans, over `steps` steps after the warm ones."""
    job = distill_job(cfg)
    around = engine.Engine(job.task, cfg)
    for teacher in job.task.teachers:
        around.place_teacher(teacher, shard=False)
    batches = iter(job.loader)
    for step in range(_WARM + steps):
        if step == _WARM:
            job.task.watch.read()
            begin = time.perf_counter()
        output = job.task.step(to_device(next(batches), around.device), step)
        around.backward(output.loss)
        around.update()
    spent = (time.perf_counter() - begin) / steps
    return spent, {name: seconds / steps for name, seconds in job.task.watch.read().items()}


def main() -> None:
    """Alternate the two kinds of step and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="measured steps a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine.start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        shards = resolve("emoji:train")[:2]
        teacher = load_clip(TEACHER)
        common = [
            str(CONFIGS / "base.yaml"), str(CONFIGS / "distill.yaml"), f"run_dir={folder}/run",
            f"batch_size={args.batch_size}", f"data.sources=[{{shards: [{', '.join(shards)}]}}]",
        ]  # fmt: skip
        live = config.load(DistillConfig, common)
        embed_shards(
            ClipPredictor.of(teacher), shards, f"{folder}/cache", source=TEACHER, digest=teacher.digest, data=live.data,
            crops=2,
        )  # fmt: skip
        stored = config.load(DistillConfig, [*common, f"data.sources.0.teacher_caches=[{folder}/cache]"])
        times: dict[str, list[float]] = {"teacher beside the student": [], "stored embeddings": []}
        spans: dict[str, dict[str, float]] = {}
        for _ in range(args.turns):
            for name, cfg in zip(times, (live, stored), strict=True):
                seconds, spans[name] = turn(cfg, args.steps)
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"batch {args.batch_size}, {args.threads} threads, device {distributed.device()}, torch {torch.__version__}\n"
    )
    print("| step | s/step | samples/s | of it teacher s | loss s |\n|---|---:|---:|---:|---:|")
    for name, seconds in medians.items():
        span = spans[name]
        print(
            f"| {name} | {seconds:.3f} | {args.batch_size / seconds:.0f} | {span.get('teacher', 0.0):.3f} "
            f"| {span.get('loss', 0.0):.3f} |"
        )
    live_time, stored_time = medians.values()
    print(f"\nratio {live_time / stored_time:.2f}")
    engine.stop_ranks()


if __name__ == "__main__":
    main()
