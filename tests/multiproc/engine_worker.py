"""Run by test_engine.py in one process or two: train, save, restore, compare; prints one JSON line on rank 0."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vlmkd import distributed
from vlmkd.config import DeepSpeedConfig, OptimConfig, RunConfig
from vlmkd.errors import UserError
from vlmkd.train import checkpoint, engine
from vlmkd.train.task import Task

BOUND = 0.1


class ToyTask(Task):
    """A small network one of whose weights is clamped."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
        self.student.register_buffer("note", torch.arange(3.0))
        self.clamped = self.student[3].weight
        self.teachers = []

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """The last weight stays in [-BOUND, BOUND]."""
        return [(self.clamped, -BOUND, BOUND)]


def train(task: Task, around: engine.Engine, begin: int, end: int) -> None:
    """Optimiser steps on seeded global batches of eight rows, of which each rank takes its share."""
    share = 8 // distributed.world_size()
    for step in range(begin, end):
        rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        local = rows[distributed.rank() * share : (distributed.rank() + 1) * share].to(around.dtype)
        around.set_lr(1.0)
        around.backward(task.student(local).float().pow(2).mean())
        assert around.update()


OPTIMISERS = {
    "adamw": OptimConfig(lr=1e-2, warmup_steps=0),
    "adam": OptimConfig(
        name="adam", lr=1e-2, warmup_steps=0, weight_decay=0.05, decay_all=True, clip_grad_norm=0.0
    ),
    "sgd": OptimConfig(name="sgd", lr=5e-2, warmup_steps=0, weight_decay=0.05, decay_all=True, momentum=0.9),
}


class Hostile:
    """Its pickle makes a file when it is read without restriction."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


def hostile_states(state_dir: Path, around: engine.Engine) -> dict[str, str]:
    """What is said to a checkpoint some of whose files would run code, and whose manifest agrees with them."""
    said = {}
    for kind in ("model_states.pt", "optim_states.pt", "shared.pt", "rank_*.pt"):
        forged = state_dir.parent / "forged" / "step_000003"
        if not list((state_dir / "step_000003").rglob(f"*{kind}")):
            continue  # without ZeRO the optimiser's state lies in the model's file
        distributed.barrier()  # nobody reads the one before any more
        if distributed.is_main():
            shutil.rmtree(forged.parent, ignore_errors=True)
            shutil.copytree(state_dir / "step_000003", forged)
            for path in forged.rglob(f"*{kind}"):
                torch.save({"x": Hostile(state_dir.parent / "ran")}, path)
            manifest = json.loads((forged / "manifest.json").read_text())
            manifest.pop("sha256")
            manifest["files"] = {name: checkpoint.sha256_of(forged / name) for name in manifest["files"]}
            manifest["sha256"] = checkpoint._digest_of(manifest)
            (forged / "manifest.json").write_text(json.dumps(manifest))
        distributed.barrier()
        try:
            checkpoint.load(checkpoint.latest(forged.parent), around)
            said[kind] = "nothing"
        except UserError as error:
            said[kind] = str(error)
    return said


def main(state_dir: Path, stage: int, precision: str, optimiser: str) -> None:
    """Straight through against save and restore after three of six steps."""
    engine.start_ranks()
    cfg = RunConfig(
        run_dir="unused",
        batch_size=8,
        deepspeed=DeepSpeedConfig(zero_stage=stage, precision=precision),  # type: ignore[arg-type]
        optim=OPTIMISERS[optimiser],
    )
    first = ToyTask()
    around = engine.Engine(first, cfg)
    train(first, around, 0, 3)
    checkpoint.save(state_dir, 3, around, shared={"step": 3}, per_rank={"rank": distributed.rank()}, keep=2)
    train(first, around, 3, 6)
    straight = around.student_weights()

    second = ToyTask()
    again = engine.Engine(second, cfg)
    shared, own = checkpoint.load(checkpoint.latest(state_dir), again)
    assert own == {"rank": distributed.rank()} and shared == {"step": 3}
    train(second, again, 3, 6)
    resumed = again.student_weights()
    said = hostile_states(state_dir, again)
    if straight is not None and resumed is not None:
        result = {
            "hostile": said,
            "ran": (state_dir.parent / "ran").exists(),
            "equal": all(torch.equal(straight[name], resumed[name]) for name in straight),
            "names": sorted(straight),
            "dtypes": sorted({str(value.dtype) for value in straight.values()}),
            "largest_clamped": straight["3.weight"].abs().max().item(),
            "weights": {name: value.tolist() for name, value in straight.items()},
        }
        print("RESULT " + json.dumps(result), flush=True)
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
