"""The loop's own log: how often it speaks, and the time left that it tells, by a clock that the test moves."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from vlmkd.config import EvaluationConfig, LogConfig, RunConfig
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Result
from vlmkd.train import trainer
from vlmkd.train.task import StepOutput, Task
from vlmkd.train.timing import Stopwatch

_UNITS = {"h": 3600, "m": 60, "s": 1}


class Clock:
    """Seconds that pass only when something is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Engine:
    """Does nothing."""

    device = torch.device("cpu")

    def set_lr(self, factor: float) -> float:
        return factor

    def backward(self, loss: torch.Tensor) -> None: ...

    def update(self) -> None: ...

    def grad_norm(self) -> float:
        return 1.0

    module = torch.nn.Linear(1, 1)

    def whole_weights(self, modules: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Lines:
    """The metrics that were written."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.train: dict[int, dict[str, Any]] = {}
        self.at: dict[int, float] = {}
        """When a step's line was written."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "train":
            self.train[step], self.at[step] = values, self._clock.now

    def write_results(self, results: list[Result], model: str, step: int) -> None:
        """Evaluations are looked at elsewhere."""


class Evaluator:
    """Takes 30 seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def run(self, predictor: Any, context: Any) -> list[Result]:
        self._clock.now += 30.0
        return [Result("slow", "set", {"top1": 0.5}, 1)]


class Loader:
    """The same batch for ever."""

    skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {"keys": ["a", "b"]}

    def check_bad_share(self) -> None: ...


def fit(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, step_seconds: dict[int, float], tmp_path: Path
) -> tuple[Clock, Lines]:
    """A run whose steps take a second, and from a step of `step_seconds` on that many."""
    clock = Clock()
    lines = Lines(clock)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=clock.monotonic, time=time.time))
    monkeypatch.setattr(trainer, "save_state", lambda *arguments: None)
    seconds = 1.0

    class Slow(Task):
        watch = Stopwatch()

        def step(self, batch: Any, step: int) -> StepOutput:
            nonlocal seconds
            seconds = step_seconds.get(step, seconds)
            clock.now += seconds
            loss = torch.tensor(float(step))
            return StepOutput(loss, {"part": loss})

        def predictor(self) -> None:
            return None

    job: Any = SimpleNamespace(cfg=cfg, task=Slow(), loader=Loader(), evaluators=[Evaluator(clock)])
    engine: Any = Engine()
    metrics: Any = lines
    trainer.fit(job, engine, metrics, tmp_path / "state", start=0)
    return clock, lines


def told(caplog: pytest.LogCaptureFixture) -> dict[int, float]:
    """Step -> seconds of the ETA in its line."""
    found = {}
    for record in caplog.records:
        line = re.match(r"step (\d+)/.* ETA (\S+)$", record.getMessage())
        if line:
            parts = re.findall(r"(\d+)([hms])", line[2])
            found[int(line[1])] = float(sum(int(number) * _UNITS[unit] for number, unit in parts))
    return found


def config(tmp_path: Path, **fields: Any) -> RunConfig:
    return RunConfig(run_dir=str(tmp_path), batch_size=2, **fields)


def test_time_left_counts_steps_at_their_present_rate_and_the_evaluations_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlmkd")
    cfg = config(
        tmp_path, steps=400, log=LogConfig(every_steps=20), evaluation=EvaluationConfig(every_steps=13)
    )
    clock, lines = fit(cfg, monkeypatch, {0: 5.0, 10: 1.0, 200: 3.0}, tmp_path)
    end = clock.now + 30.0  # the closing evaluation
    left, truth = told(caplog), {done: end - now for done, now in lines.at.items()}
    assert len(left) == 20 and left[400] == 30
    for done in range(20, 401, 20):
        if (
            120 <= done <= 200
        ):  # the slow start is forgotten, and that steps become slower later cannot be known
            assert left[done] == truth[done] - 2.0 * 200
        elif done >= 300:
            assert left[done] == truth[done]


def test_evaluations_neither_count_as_training_time_nor_hide_the_steps_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(
        tmp_path, steps=100, log=LogConfig(every_steps=10), evaluation=EvaluationConfig(every_steps=3)
    )
    _, lines = fit(cfg, monkeypatch, {}, tmp_path)
    assert [line["step_s"] for line in lines.train.values()] == [1.0] * 10
    assert [line["samples_per_s"] for line in lines.train.values()] == [2.0] * 10
    assert lines.train[10]["loss"] == sum(range(10)) / 10


@pytest.mark.parametrize(
    ("steps", "lines"), [(3, [1, 2, 3]), (25, [*range(2, 25, 2), 25]), (500, [*range(20, 501, 20)])]
)
def test_a_run_logs_at_least_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, lines: list[int]
) -> None:
    assert list(fit(config(tmp_path, steps=steps), monkeypatch, {}, tmp_path)[1].train) == lines


@pytest.mark.parametrize(("taken", "warned"), [(7.9, False), (8.2, True)])
def test_a_first_step_that_comes_near_the_memory_there_is_warns_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    taken: float,
    warned: bool,
) -> None:
    for name, value in (("peak", taken), ("held", 7.0), ("available", 3.0)):
        monkeypatch.setattr(trainer.memory, name, lambda value=value: int(value * 1e9))
    fit(config(tmp_path, steps=5), monkeypatch, {}, tmp_path)
    (message,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING] or [""]
    assert message.startswith("the first step took 8.2 of the 10.0 GB" if warned else "")
    assert bool(message) == warned and ("micro_batch_size=1 (now 2)" in message) == warned


def test_a_short_run_is_judged_by_its_bad_samples_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(loader: Loader) -> None:
        raise UserError("84 of 180 samples were bad")

    monkeypatch.setattr(Loader, "check_bad_share", refuse)
    with pytest.raises(UserError, match="84 of 180"):
        fit(config(tmp_path, steps=3), monkeypatch, {}, tmp_path)


class Pair(NamedTuple):
    first: torch.Tensor
    second: str


def test_tensors_at_any_depth_reach_the_device() -> None:
    tensor = torch.zeros(1)
    batch = {"keys": ["a"], "turns": [{"tokens": tensor, "spans": (tensor, 3)}], "pair": Pair(tensor, "x")}
    moved = trainer.to_device(batch, torch.device("meta"))
    found = [moved["turns"][0]["tokens"], moved["turns"][0]["spans"][0], moved["pair"].first]
    assert [part.device.type for part in found] == ["meta"] * 3
    assert moved["keys"] == ["a"] and moved["turns"][0]["spans"][1] == 3 and moved["pair"].second == "x"


def test_a_micro_batch_counts_by_its_weight_and_equal_ones_by_exactly_one() -> None:
    cpu = torch.device("cpu")
    assert trainer.loss_factors([3, 3, 3], cpu) == [1.0, 1.0, 1.0]
    assert [float(factor) for factor in trainer.loss_factors([1, 0, 7], cpu)] == [3 / 8, 0, 21 / 8]


def test_a_step_that_trains_on_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "weight", lambda task, batch: 0)
    with pytest.raises(UserError, match="nothing in the batch of step 0 is trained on; its samples are in"):
        fit(config(tmp_path, steps=3), monkeypatch, {}, tmp_path)


def test_the_log_tells_each_kind_of_item_and_the_use_of_a_known_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlmkd")
    monkeypatch.setattr(Task, "items", lambda task, batch: {"samples": 2, "tokens": 30})
    monkeypatch.setattr(Task, "flops", lambda task, batch: 2e12)
    monkeypatch.setattr(trainer, "peak_tflops", lambda: 4.0)
    _, lines = fit(config(tmp_path, steps=3), monkeypatch, {}, tmp_path)
    told = {name: lines.train[3][name] for name in ("samples_per_s", "tokens_per_s", "tflops", "mfu")}
    assert told == {"samples_per_s": 2.0, "tokens_per_s": 30.0, "tflops": 2.0, "mfu": 0.5}
    assert "2 samples/s  30 tokens/s" in caplog.text
