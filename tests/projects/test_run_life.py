"""A run's life, killed and mistaken: nothing is lost, nothing of a foreign folder is run, and a mistake is one line."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.conftest import pair, write_tar
from tests.projects.tinyclip.tiny_runs import Runs
from tests.projects.zygote import Zygote
from vlmkd.train import checkpoint

pytestmark = pytest.mark.slow

TRAIN = "projects.tinyclip.train_distill"
UNCHECKED = ["projects.tinyclip.task:verify_export"]
"""The check of an export starts a process, which has tests of its own."""


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Configs and runs in a temporary folder."""
    return Runs(tmp_path)


def _exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "open_clip_model.safetensors")


def _train_lines(run_dir: Path) -> list[dict[str, float]]:
    """Step, loss and gradient norm of every train line; a line torn by a kill is none."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    names = ("step", "loss", "grad_norm")
    return [{name: line[name] for name in names} for line in read if line["kind"] == "train"]


def _trained(run_dir: Path) -> int:
    """The last step that the run has logged."""
    return int(max((line["step"] for line in _train_lines(run_dir)), default=0))


def test_ten_random_kills_change_no_bit(runs: Runs, zygote: Zygote) -> None:
    """Kills at random moments of start, step and save; each resumes, and the weights are those of a run without kills."""
    config = str(
        runs.config("kill", steps=60, checkpoint={"every_steps": 1}, loss={"affinity": 1.0, "feature": 10.0})
    )
    whole, broken, output = runs.folder / "whole", runs.folder / "broken", runs.folder / "output"
    code, said = zygote.run(
        TRAIN, [config, f"run_dir={whole}", "checkpoint.every_steps=0"], output, without=UNCHECKED
    )
    assert code == 0, said
    random_moments = random.Random(20261124)
    for _ in range(10):
        enough = _trained(broken) + random_moments.randrange(4)
        pause = random_moments.uniform(0.0, 0.3)

        def due(enough: int = enough, pause: float = pause) -> bool:
            if _trained(broken) < enough:
                return False
            until = time.monotonic() + pause
            while (
                time.monotonic() < until and _trained(broken) < enough + 2
            ):  # or a fast machine is done too soon
                time.sleep(0.01)
            return True

        zygote.kill(TRAIN, [config, f"run_dir={broken}"], output, due)
    assert 5 < _trained(broken) < 60
    (broken / "report.html").mkdir()  # and a page that cannot be written
    code, said = zygote.run(TRAIN, [config, f"run_dir={broken}"], output, without=UNCHECKED)
    assert code == 0 and "resumed from" in said, said
    assert "its page could not be drawn (" in said and (broken / "done.json").is_file()
    first, second = _exported(whole), _exported(broken)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert _train_lines(whole) == _train_lines(broken)


def test_one_rank_without_zero_trains_as_with_it(runs: Runs, zygote: Zygote) -> None:
    """The default of one rank against ZeRO 1: losses, gradient norms (before clipping, which acts) and weights."""
    config = str(runs.config("stage", optim={"lr": 1e-3, "warmup_steps": 2, "clip_grad_norm": 0.5}))
    output = runs.folder / "output"
    for name, more in (("plain", []), ("zero", ["deepspeed.zero_stage=1"])):
        code, said = zygote.run(
            TRAIN, [config, f"run_dir={runs.folder / name}", *more], output, without=UNCHECKED
        )
        assert code == 0, said
        stage = json.loads((runs.folder / name / "ds_config.json").read_text())["zero_optimization"]["stage"]
        assert stage == len(more)
    lines = [_train_lines(runs.folder / name) for name in ("plain", "zero")]
    assert len(lines[0]) == 8 and max(line["grad_norm"] for line in lines[0]) > 0.5
    for plain, zero in zip(*lines, strict=True):
        assert plain == pytest.approx(zero, rel=2e-5)
    first, second = _exported(runs.folder / "plain"), _exported(runs.folder / "zero")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5)
    code, said = zygote.run(
        TRAIN,
        [config, f"run_dir={runs.folder / 'bf'}", "deepspeed.precision=bf16", "deepspeed.zero_stage=0"],
        output,
    )
    assert code == 2 and said.strip().splitlines()[-1].startswith(
        "error: config field deepspeed.zero_stage is 0"
    )


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


def test_resuming_a_foreign_run_folder_runs_none_of_its_code(runs: Runs, zygote: Zygote) -> None:
    """Its manifest agrees with its files, for whoever wrote the one could write the other."""
    config = str(runs.config("foreign", steps=2))
    run_dir, output, mark = runs.folder / "run", runs.folder / "output", runs.folder / "ran"
    zygote.kill(TRAIN, [config, f"run_dir={run_dir}", "steps=500"], output, lambda: _trained(run_dir) > 3)
    folder = checkpoint._steps(run_dir / "state")[0]
    torch.save({"module": _Hostile(mark)}, next(folder.rglob("*model_states.pt")))
    facts = json.loads((folder / "manifest.json").read_text())
    facts["files"] = {name: checkpoint.sha256_of(folder / name) for name in facts["files"]}
    facts["sha256"] = checkpoint._digest_of({name: facts[name] for name in facts if name != "sha256"})
    (folder / "manifest.json").write_text(json.dumps(facts))
    code, said = zygote.run(TRAIN, [config, f"run_dir={run_dir}", "steps=500"], output)
    assert not mark.exists()
    assert code == 2 and "Traceback" not in said
    assert "error: checkpoint file" in said and "names posix.mkdir" in said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "first", ["log.txt", "config.yaml.partial", "ds_config.json.partial", "data.json.partial"]
)
def test_a_disk_that_is_full_at_the_start_is_one_line_and_the_folder_stays_usable(
    runs: Runs, zygote: Zygote, first: str
) -> None:
    config, run_dir, output = str(runs.config("full", steps=1)), runs.folder / "run", runs.folder / "output"
    run_dir.mkdir()
    (run_dir / first).symlink_to("/dev/full")
    code, said = zygote.run(TRAIN, [config, f"run_dir={run_dir}"], output)
    assert code == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last and "free disk space" in last
    (run_dir / first).unlink()
    code, said = zygote.run(
        TRAIN, [config, f"run_dir={run_dir}"], output, without=["vlmkd.train.run:_finish"]
    )
    assert code == 0, said


@pytest.mark.parametrize("order", [("whole", "bad"), ("bad", "whole")])
def test_a_mistake_in_one_ranks_data_is_one_line_of_that_rank(
    runs: Runs, zygote: Zygote, order: tuple[str, str]
) -> None:
    shards = [str(runs.folder / f"{name}.tar") for name in order]
    write_tar(runs.folder / "whole.tar", [member for number in range(16) for member in pair(0, number)])
    (runs.folder / "bad.tar").write_bytes(b"")
    config = str(
        runs.config("data", data={"kind": "webdataset", "workers": 0, "sources": [{"shards": shards}]})
    )
    code, said = zygote.run(
        TRAIN, [config, f"run_dir={runs.folder / 'run'}"], runs.folder / "output", ranks=2
    )
    assert code == 2, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert "broken_tar" in line
