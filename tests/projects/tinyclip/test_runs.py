"""Whole runs in processes of their own: resume after kill -9 and SIGTERM is exact, stages chain, mistakes are one line."""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.projects.tinyclip.tiny_runs import ForkedRuns, Runs
from tests.projects.zygote import Zygote

pytestmark = pytest.mark.slow

MASKS = {"target_sparsity": 0.5, "sparsity_warmup_steps": 4, "lr": 0.5}


@pytest.fixture
def runs(tmp_path: Path, zygote: Zygote) -> ForkedRuns:
    """Configs and runs in a temporary folder."""
    return ForkedRuns(tmp_path, zygote)


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights of a run's export."""
    return load_file(run_dir / "export" / "open_clip_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    """Bit-identical exports."""
    first, second = exported(one), exported(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def lines(run_dir: Path) -> list[dict]:
    """Train lines of metrics.jsonl without what depends on the clock."""
    found = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    return [
        {k: v for k, v in line.items() if k.startswith("loss/") or k in ("loss", "step")} for line in found
    ]


def test_kill_and_sigterm_and_a_torn_checkpoint_change_nothing(runs: Runs) -> None:
    more = {"steps": 80, "checkpoint": {"every_steps": 5}}
    config = runs.config("distill", loss={"affinity": 1.0, "feature": 10.0}, ema_decay=0.5, **more)
    whole, broken = runs.folder / "whole", runs.folder / "broken"
    code, output = runs.finish("train_distill", config, f"run_dir={whole}")
    assert code == 0, output
    assert [line["step"] for line in lines(whole)] == list(range(1, 81))

    code, _ = runs.interrupt(
        signal.SIGKILL,
        (broken / "state" / "step_000010").exists,
        "train_distill",
        config,
        f"run_dir={broken}",
    )
    assert code == -signal.SIGKILL
    newest = sorted((broken / "state").glob("step_*"))[-1]
    shared = newest / "shared.pt"
    shared.write_bytes(shared.read_bytes()[:-10])

    def trains_again() -> bool:
        return "loss" in (broken / "log.txt").read_text().partition("resumed from")[2]

    code, output = runs.interrupt(signal.SIGTERM, trains_again, "train_distill", config, f"run_dir={broken}")
    assert code == 143 and "stopped by SIGTERM after step" in output, output
    assert f"{newest} is damaged (shared.pt does not match its sha256)" in output
    code, output = runs.finish("train_distill", config, f"run_dir={broken}")
    assert code == 0, output
    assert_same(whole, broken)
    assert lines(whole) == lines(broken)
    code, output = runs.finish("train_distill", config, f"run_dir={broken}")
    assert code == 0 and "is complete" in output


def test_mask_stages_resume_fuse_and_chain(runs: Runs) -> None:
    config = runs.config("mask", masks=MASKS, student={"model": str(runs.folder / "teacher.json")})
    whole, broken = runs.folder / "whole", runs.folder / "broken"
    code, output = runs.finish("train_mask", config, f"run_dir={whole}")
    assert code == 0 and "reloaded in a fresh process with equal outputs" in output, output
    code, _ = runs.interrupt(
        signal.SIGKILL, (broken / "state" / "step_000004").exists, "train_mask", config, f"run_dir={broken}"
    )
    code, output = runs.finish("train_mask", config, f"run_dir={broken}")
    assert code == 0 and "resumed from" in output, output
    assert_same(whole, broken)

    student = f"student.model=local-dir:{whole / 'export'}"
    distilled, again = runs.folder / "distilled", runs.folder / "again"
    code, output = runs.finish(
        "train_distill", runs.config("distill"), f"run_dir={distilled}", student, "steps=2"
    )
    assert code == 0, output
    kept = json.loads((whole / "export" / "open_clip_config.json").read_text())["model_cfg"]
    assert kept["vision_cfg"]["width"] < 48 and sum(kept["text_cfg"]["mlp"]) < 4 * 4 * 48
    stage = [
        f"student.model=local-dir:{distilled / 'export'}",
        "masks.start_sparsity=0.5",
        "masks.target_sparsity=0.75",
    ]
    code, output = runs.finish(
        "train_mask", config, f"run_dir={again}", *stage, "masks.freeze_pruned=true", "steps=4"
    )
    assert code == 0, output
    second = json.loads((again / "export" / "open_clip_config.json").read_text())["model_cfg"]
    assert second["vision_cfg"]["width"] <= kept["vision_cfg"]["width"]


def test_a_loss_that_is_not_finite_names_its_samples_and_keeps_the_last_state(runs: Runs) -> None:
    config = runs.config(
        "blow", optim={"lr": 2e9, "warmup_steps": 1, "clip_grad_norm": 0.0, "schedule": "constant"}
    )
    run_dir = runs.folder / "run"
    code, output = runs.finish("train_distill", config, f"run_dir={run_dir}", "checkpoint.every_steps=1")
    assert code == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: the loss is not finite at step") and "lower optim.lr" in last
    (dump,) = run_dir.glob("nonfinite_step_*_rank_0.json")
    assert len(json.loads(dump.read_text())["keys"]) == 8
    assert not (run_dir / "export").exists()


def test_a_folder_in_use_or_of_another_run_is_refused(runs: Runs) -> None:
    config = runs.config("distill")
    run_dir = runs.folder / "run"
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = runs.finish("train_distill", config, f"run_dir={run_dir}")
        assert code == 2 and f"run folder {run_dir} is in use" in output.strip().splitlines()[-1]
    (run_dir / "thesis.tex").write_text("precious")
    code, output = runs.finish("train_distill", config, f"run_dir={run_dir}")
    assert code == 2 and "holds files of something else" in output
    (run_dir / "thesis.tex").unlink()
    done = runs.finish("train_distill", config, f"run_dir={run_dir}", "steps=1")
    assert done[0] == 0, done[1]
    code, output = runs.finish("train_distill", config, f"run_dir={run_dir}", "steps=1", "optim.lr=0.5")
    assert code == 2 and "optim.lr=0.001, now 0.5" in output.strip().splitlines()[-1]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_train_like_one(runs: ForkedRuns, zero_stage: int) -> None:
    """The ranks of one of the two are started by scripts/launch.sh."""
    config = runs.config(
        "distill", loss={"affinity": 1.0, "contrastive": 0.5, "feature": 10.0, "interactive": 1.0}
    )
    one, two = runs.folder / "one", runs.folder / "two"
    code, output = runs.finish("train_distill", config, f"run_dir={one}", "steps=3")
    assert code == 0, output
    code, output = (runs.launch if zero_stage == 2 else runs.fork)(
        2, "train_distill", config, f"run_dir={two}", "steps=3", f"deepspeed.zero_stage={zero_stage}",
        f"deepspeed.shard_teacher={str(zero_stage == 3).lower()}",
    )  # fmt: skip
    assert code == 0, output
    first, second = exported(one), exported(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.endswith("in_proj_bias"):
            # No softmax sees a key's bias: its gradient is rounding, which Adam scales to a step of any size.
            (query, _, own), (other_query, _, other) = value.chunk(3), second[name].chunk(3)
            value, second[name] = torch.cat([query, own]), torch.cat([other_query, other])
        torch.testing.assert_close(
            second[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    losses = [[line["loss"] for line in lines(run_dir)] for run_dir in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_evaluates_and_exports_the_same_units(runs: Runs, zygote: Zygote, zero_stage: int) -> None:
    config = runs.config(
        "mask", masks={**MASKS, "lr": 1.0}, student={"model": str(runs.folder / "teacher.json")}
    )
    arguments = [str(config), f"run_dir={runs.folder / 'run'}", "deepspeed.precision=bf16"]
    code, output = zygote.run(
        "tests.projects.tinyclip.mask_worker", [*arguments, f"deepspeed.zero_stage={zero_stage}"],
        runs.folder / "output", ranks=2,
    )  # fmt: skip
    assert code == 0 and "MASKS AGREE" in output, output
