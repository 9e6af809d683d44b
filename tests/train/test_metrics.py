"""Metrics reach metrics.jsonl and every tracker; a rewrite that is cut short loses no line."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vlmkd.config import LogConfig
from vlmkd.errors import UserError
from vlmkd.train.metrics import Metrics


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_json_with_null_for_what_is_no_number(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogConfig(), {})
    metrics.write("train", 3, {"loss": 0.5, "grad_norm": math.nan, "model": "student"})
    metrics.close()
    (line,) = _lines(tmp_path)
    assert line.pop("time") > 0
    assert line == {"step": 3, "kind": "train", "loss": 0.5, "grad_norm": None, "model": "student"}


def test_a_resumed_run_drops_what_was_lost_and_a_torn_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogConfig(), {})
    for step in (1, 2, 3):
        metrics.write("train", step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    Metrics(tmp_path, LogConfig(), {}, resume_step=3).write("train", 3, {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Metrics(tmp_path, LogConfig(), {}).write("train", 1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(*paths: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Metrics(tmp_path, LogConfig(), {}, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_tensorboard_holds_every_number_by_step(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path, LogConfig(tensorboard=True), {})
    for step, loss in ((1, 0.5), (2, 0.25)):
        metrics.write("train", step, {"loss": loss, "grad_norm": math.nan})
    metrics.write("eval", 2, {"model": "student", "emoji/top1": 0.75})
    metrics.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["eval/emoji/top1", "train/loss"]
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in read.Scalars("eval/emoji/top1")] == [(2, 0.75)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_project_config_and_numbers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the three functions that both packages have."""
    calls: list[tuple[str, Any]] = []
    module: Any = types.ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda scalars, step: calls.append(("log", (step, scalars)))
    module.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, module)
    metrics = Metrics(tmp_path / "my_run", LogConfig(**{name: "my project"}), {"seed": 7})
    (tmp_path / "my_run").mkdir()
    metrics.write("train", 4, {"loss": 0.5, "grad_norm": math.inf, "model": "student"})
    metrics.close()
    assert calls == [
        ("init", {"project": "my project", "name": "my_run", "config": {"seed": 7}}),
        ("log", (4, {"train/loss": 0.5})),
        ("finish", None),
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_there_is_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"log.{name} needs the package: pip install {name}"):
        Metrics(tmp_path, LogConfig(**{name: "project"}), {})
