"""Console, metrics.jsonl, results.jsonl, and the trackers that are asked for; rank 0 writes."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmkd import distributed
from vlmkd.config import LogConfig
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Result
from vlmkd.files import write_text
from vlmkd.results import FILE, Number, Tags, lines, numbers_of, parameters


def start_console(run_dir: Path) -> None:
    """vlmkd's messages go to the terminal and to `run_dir/log.txt`; ranks above 0 only warn."""
    root = logging.getLogger("vlmkd")
    root.handlers.clear()
    root.propagate = False
    rank = distributed.rank()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    prefix = "" if distributed.world_size() == 1 else f"[rank {rank}] "
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if rank == 0:
        handlers.append(_RunLog(run_dir / "log.txt"))
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)


class _RunLog(logging.FileHandler):
    """A full disk is an error of the run's, not a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's own name)
        raise  # noqa: PLE0704


class Metrics:
    """`tags` go with every result; lines from `resume_step` on, lost with a killed process, are dropped."""

    def __init__(
        self,
        run_dir: Path,
        cfg: LogConfig,
        config: dict[str, Any],
        *,
        resume_step: int = 0,
        tags: Tags | None = None,
    ) -> None:
        self._path, self._results = run_dir / "metrics.jsonl", run_dir / FILE
        self._run, self._tags = run_dir.resolve().name, tags or {}
        self._trackers: list[Any] = []
        self._active = distributed.is_main()
        if not self._active:
            return
        for path in (self._path, self._results):
            if path.is_file():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) < resume_step]
                write_text(path, "".join(line + "\n" for line in kept))
        if cfg.tensorboard:
            self._trackers.append(_TensorBoard(run_dir))
        for name, project in (("wandb", cfg.wandb), ("trackio", cfg.trackio)):
            if project:
                tracker = _package(name)
                tracker.init(project=project, name=run_dir.name, config=config)
                self._trackers.append(tracker)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a line, with null for what is not finite; trackers get its numbers."""
        if not self._active:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"step": step, "time": round(time.time(), 3), "kind": kind, **plain}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        scalars = {f"{kind}/{k}": float(v) for k, v in plain.items() if isinstance(v, (int, float))}
        for tracker in self._trackers:
            tracker.log(scalars, step=step)

    def write_results(self, results: list[Result], model: str, step: int) -> None:
        """Append an evaluation of `model` to results.jsonl, and `write` it."""
        numbers = numbers_of(results, run=self._run, model=model, tags=self._tags, step=step)
        self._append(numbers)
        values = {f"{one.dataset}/{one.metric}": one.value for one in numbers}
        self.write("eval", step, {"model": model} | values)

    def write_sizes(self, counts: Mapping[str, int]) -> None:
        run, tags = self._run, self._tags
        self._append([parameters(counts[name], run=run, model=name, tags=tags) for name in counts])

    def _append(self, numbers: list[Number]) -> None:
        if self._active:
            with self._results.open("a", encoding="utf-8") as file:
                file.write(lines(numbers))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


class _TensorBoard:
    """With the calls of wandb, which trackio has too."""

    def __init__(self, run_dir: Path) -> None:
        _package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        self.finish = self._writer.close

    def log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"config field log.{name} needs the package: pip install {name}") from None


def _step_of(line: str) -> float:
    """A line torn by a kill counts as lost."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf


def duration(seconds: float) -> str:
    """Seconds as `1h02m`, `3m04s` or `5s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
