"""What a run does in every precision and ZeRO stage; on a CPU at toy size in what a CPU can do."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.projects.tinyclip.test_runs import assert_same, exported
from tests.projects.tinyclip.tiny_runs import Runs

pytestmark = pytest.mark.slow
GPU = pytest.mark.gpu


def one_step(runs: Runs, *overrides: str) -> dict[str, torch.Tensor]:
    """Weights after one optimiser step."""
    run_dir = runs.folder / "run"
    code, output = runs.finish(
        "train_distill", runs.config("c"), f"run_dir={run_dir}", "steps=1", "optim.warmup_steps=0", *overrides
    )
    assert code == 0, output
    (line,) = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()][:1]
    assert line["grad_norm"] > 0
    return exported(run_dir)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=GPU)])
def test_a_step_in_half_precision_is_the_fp32_step(runs: Runs, tmp_path: Path, precision: str) -> None:
    half = one_step(runs, f"deepspeed.precision={precision}")
    (tmp_path / "fp32").mkdir()
    exact = one_step(Runs(tmp_path / "fp32"))
    for name, value in exact.items():
        assert half[name].dtype == torch.float32
        # Adam's first step moves every weight by at most the learning rate, 1e-3, either way.
        torch.testing.assert_close(half[name], value, rtol=8e-3, atol=2.1e-3)


@GPU
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_steps_equal_those_on_the_device(runs: Runs, tmp_path: Path, stage: int) -> None:
    offloaded = one_step(runs, f"deepspeed.zero_stage={stage}", "deepspeed.offload=cpu")
    (tmp_path / "fp32").mkdir()
    plain = one_step(Runs(tmp_path / "fp32"), f"deepspeed.zero_stage={stage}")
    for name, value in plain.items():
        torch.testing.assert_close(offloaded[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=GPU)])
def test_a_killed_run_goes_on_to_the_same_weights(runs: Runs, precision: str) -> None:
    config = runs.config("c")
    whole, broken = runs.folder / "whole", runs.folder / "broken"
    override = f"deepspeed.precision={precision}"
    code, output = runs.finish("train_distill", config, f"run_dir={whole}", override)
    assert code == 0, output
    runs.interrupt(
        signal.SIGKILL, (broken / "state" / "step_000004").exists, "train_distill", config, f"run_dir={broken}", override
    )  # fmt: skip
    code, output = runs.finish("train_distill", config, f"run_dir={broken}", override)
    assert code == 0 and "resumed from" in output, output
    assert_same(whole, broken)
