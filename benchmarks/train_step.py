"""Training step with the teacher beside the student, the same with stored teacher embeddings, and the floor under it.

python benchmarks/train_step.py [--batch-size 128] [--steps 12] [--threads 2]

The first two go through the real engine on the emoji set; the floor is a bare loop: open_clip's model, the affinity loss
written out, torch's clip and AdamW, on the same loader's batches with stored embeddings. All run in turns, and the first
steps of each turn are left out. Prints samples/s, the ratio, and what the engine costs over the floor.
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
import torch.nn.functional as F

from data_tools.embed_teacher import embed_shards
from projects.tinyclip.build import distill_job
from projects.tinyclip.config import DistillConfig
from vlmkd import config, distributed
from vlmkd.datasets.emoji import resolve
from vlmkd.models.clip import build_clip, load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.train import engine
from vlmkd.train.trainer import to_device

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


def floor(cfg: DistillConfig, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds a step of the same arithmetic without engine, task and text trimming."""
    job = distill_job(cfg)
    model = build_clip(job.task.source.config).train()
    optim = cfg.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=tuple(optim.betas),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    scale = cfg.logit_scale.value
    batches = iter(job.loader)
    for step in range(_WARM + steps):
        if step == _WARM:
            begin = time.perf_counter()
        batch = next(batches)
        image = F.normalize(model.encode_image(batch["images"]), dim=-1)
        text = F.normalize(model.encode_text(batch["tokens"]), dim=-1)
        teacher = scale * batch["teacher_image_embeds"][0] @ batch["teacher_text_embeds"][0].T
        student = scale * image @ text.T
        loss = F.cross_entropy(student, teacher.softmax(-1)) + F.cross_entropy(
            student.T, teacher.T.softmax(-1)
        )
        optimizer.zero_grad()
        (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm)
        optimizer.step()
    return (time.perf_counter() - begin) / steps, {}


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
        kinds = {
            "teacher beside the student": (turn, live),
            "stored embeddings": (turn, stored),
            "bare loop, stored embeddings": (floor, stored),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        spans: dict[str, dict[str, float]] = {}
        for _ in range(args.turns):
            for name, (measure, cfg) in kinds.items():
                seconds, spans[name] = measure(cfg, args.steps)
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
    live_time, stored_time, floor_time = medians.values()
    over = 1000 * (stored_time - floor_time)
    print(f"\nratio {live_time / stored_time:.2f}; over the bare loop {over:+.0f} ms a step")
    distributed.leave()


if __name__ == "__main__":
    main()
