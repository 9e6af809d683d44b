"""Console lines, metrics.jsonl (always), and trackers when installed and asked for. Rank 0 writes."""

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
from vlmkd.results import FILE, Tags, lines, numbers_of, parameters

log = logging.getLogger("vlmkd")


def start_console(run_dir: Path) -> None:
    """Send vlmkd's messages to the terminal and to `run_dir/log.txt`; ranks above 0 only warn."""
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
    """A log file whose full disk is an error of the run's, not a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's own name)
        """Called while the error of `emit` is handled."""
        raise  # noqa: PLE0704


class Metrics:
    """The numbers of a run: a line a log step in metrics.jsonl, the same to every tracker asked for, and results.jsonl.

    Lines of steps at or after `resume_step` belong to work that was lost with a killed process; they are dropped.
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: LogConfig,
        config: dict[str, Any],
        *,
        resume_step: int = 0,
        tags: Tags | None = None,
    ) -> None:
        """`tags` go with every result of the run."""
        self._path, self._results, self._tags = run_dir / "metrics.jsonl", run_dir / FILE, tags or {}
        self._run = run_dir.resolve().name
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
                self._trackers.append(_WandbLike(name, project, run_dir, config))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; not-a-number becomes null. Trackers get the numbers, not what is nested."""
        if not self._active:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"step": step, "time": round(time.time(), 3), "kind": kind, **plain}) + "\n"
            )
        scalars = {f"{kind}/{k}": float(v) for k, v in plain.items() if isinstance(v, (int, float))}
        for tracker in self._trackers:
            tracker.log(scalars, step)

    def write_results(self, results: list[Result], model: str, step: int) -> None:
        """Append an evaluation of `model` to results.jsonl, and write it as `write` does."""
        if not self._active:
            return
        numbers = numbers_of(results, run=self._run, model=model, tags=self._tags, step=step)
        with self._results.open("a", encoding="utf-8") as file:
            file.write(lines(numbers))
        self.write(
            "eval", step, {"model": model} | {f"{one.dataset}/{one.metric}": one.value for one in numbers}
        )

    def write_sizes(self, counts: Mapping[str, int]) -> None:
        """Append the number of parameters of each model to results.jsonl."""
        if self._active:
            sizes = [
                parameters(n, run=self._run, model=model, tags=self._tags) for model, n in counts.items()
            ]
            with self._results.open("a", encoding="utf-8") as file:
                file.write(lines(sizes))

    def close(self) -> None:
        """Flush the trackers."""
        for tracker in self._trackers:
            tracker.close()


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "config field log.tensorboard needs the package: pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbLike:
    """wandb, and trackio, which has the same calls."""

    def __init__(self, package: str, project: str, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            module = importlib.import_module(package)
        except ImportError:
            raise UserError(f"config field log.{package} needs the package: pip install {package}") from None
        self._module = module
        module.init(project=project, name=run_dir.name, config=config)

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._module.log(scalars, step=step)

    def close(self) -> None:
        self._module.finish()


def _step_of(line: str) -> float:
    """Step of a metrics line; a line torn by a kill counts as lost."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf


def duration(seconds: float) -> str:
    """Seconds as `1h02m`, `3m04s` or `5s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
