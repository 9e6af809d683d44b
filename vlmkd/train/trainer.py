"""The only loop of runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from vlmkd import distributed, memory
from vlmkd.config import RunConfig
from vlmkd.data.loader import Loader, worker_deaths
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Evaluator, Result
from vlmkd.files import write_json
from vlmkd.train import checkpoint
from vlmkd.train.engine import Engine, batch_triple
from vlmkd.train.metrics import Metrics, duration
from vlmkd.train.selection import Weights, using
from vlmkd.train.task import Batch, StepOutput, Task
from vlmkd.train.timing import peak_tflops

log = logging.getLogger(__name__)

_FEWEST_LINES = 10  # in the log of the shortest run
_NEAR = 0.8  # share of the memory there is above which a warning is due


@dataclass
class Job:
    """What a project's `build(cfg)` returns."""

    cfg: RunConfig
    """Its durations in steps (see `vlmkd.train.durations`)."""
    task: Task
    loader: Loader
    evaluators: list[Evaluator]
    final_evaluators: list[Evaluator] = field(default_factory=list)
    """What must not be looked at before training has ended, such as a held-out domain."""


class Stopped(Exception):
    """SIGTERM came, and the state is saved."""


def fit(job: Job, engine: Engine, metrics: Metrics, state_dir: Path, *, start: int) -> int:
    """Train from optimiser step `start` on, and return the step reached.

    UserError: bad data, or a loss that is not finite, before it touches the weights. Stopped: SIGTERM, saved.
    """
    cfg = job.cfg
    _, accumulation = batch_triple(cfg, distributed.world_size())
    batches = iter(job.loader)
    window = _Window(engine, job)
    last_save, done, every = time.monotonic(), start, cfg.evaluation.every_steps
    with _sigterm() as terminated, worker_deaths():
        for step in range(start, cfg.steps):
            lr = engine.set_lr(job.task.lr_factor(step, cfg))
            torch.manual_seed(stream_seed(cfg.seed, distributed.rank(), step, "step"))
            asked = time.monotonic()
            parts = [next(batches) for _ in range(accumulation)]
            window.wait += time.monotonic() - asked
            parts = [job.task.prepare(part, step) for part in parts]
            factors = loss_factors([job.task.weight(part) for part in parts], engine.device)
            outputs = []
            for part, factor in zip(parts, factors, strict=True):
                output = job.task.step(to_device(part, engine.device), step)
                output.loss = output.loss * factor.to(output.loss.dtype)
                engine.backward(output.loss)
                outputs.append(output)
                if len(outputs) < accumulation:
                    engine.update()
            finite = torch.stack([output.loss.detach() for output in outputs]).isfinite().all()
            if distributed.any_rank(~finite):
                raise _non_finite(state_dir.parent, step, outputs, factors, parts)
            engine.update()
            for selection in job.task.kept():
                selection.after_update(engine.module, step)
            window.add(outputs, factors, parts, lr)
            done = step + 1
            if step == start:
                _warn_of_memory(cfg)
            if done % _log_every(cfg) == 0 or done == cfg.steps:
                window.write(metrics, done)
            # After the last step the closing evaluation follows.
            if every and (done - cfg.evaluation.phase) % every == 0 and done < cfg.steps:
                with window.evaluation():
                    _, ends = evaluate_student(job, engine, metrics, done)
                if ends:
                    log.info("step %d: the evaluation ends the run", done)
                    save_state(job, engine, state_dir, done, ended=True)
                    break
            # With several processes the check is a collective, so not at each step.
            check = distributed.world_size() == 1 or done % min(10, _log_every(cfg)) == 0
            stop = check and distributed.any_rank(terminated())
            hours = cfg.checkpoint.every_hours
            late = bool(hours) and distributed.broadcast_object(time.monotonic() - last_save > hours * 3600)
            regular = cfg.checkpoint.every_steps and done % cfg.checkpoint.every_steps == 0
            if stop or late or regular or done == cfg.steps:
                save_state(job, engine, state_dir, done)
                last_save = time.monotonic()
            if stop and done < cfg.steps:
                raise Stopped(f"stopped by SIGTERM after step {done}; start the same command again to go on")
    job.loader.check_bad_share()
    return done


def evaluate_student(
    job: Job, engine: Engine, metrics: Metrics, step: int, *, judge: bool = True
) -> tuple[list[Result], bool]:
    """Results of the `present_weights`, and whether they end the run; `judge`: selections see them."""
    with using(engine.module, present_weights(job.task)):
        results = evaluate(job.cfg, job.evaluators, job.task.predictor(), engine, metrics, step)
        kept = job.task.kept() if judge else []
        ends = [selection.after_evaluation(engine.module, results, step) for selection in kept]
    job.task.after_evaluation(results, step)
    return results, any(ends)


def present_weights(task: Task) -> Weights:
    """The student's where no selection is asked for: the average's, or (empty) its own."""
    return {} if task.average is None else task.average.weights()


def evaluate(
    cfg: RunConfig,
    evaluators: Sequence[Evaluator],
    predictor: Any,
    engine: Engine,
    metrics: Metrics,
    step: int,
    model: str = "student",
    modules: Sequence[nn.Module] | None = None,
) -> list[Result]:
    """Results of `predictor`, which holds `modules` (None: the student); they are logged."""
    if not evaluators:
        return []
    options = cfg.evaluation
    context = Context(engine.device, options.batch_size, options.workers, progress=False, embedded={})
    with engine.whole_weights([engine.module] if modules is None else modules), torch.no_grad():
        results = [result for one in evaluators for result in one.run(predictor, context)]
    metrics.write_results(results, model, step)
    for result in results:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        if result.chosen:
            shown += f"  ({'  '.join(f'{name} {value:g}' for name, value in result.chosen.items())})"
        log.info("eval step %d  %s  %s  %s", step, model, result.dataset, shown)
    return results


def save_state(job: Job, engine: Engine, state_dir: Path, step: int, *, ended: bool = False) -> None:
    """All that a resumed run needs to go on bit for bit; `ended`: by an evaluation."""
    kept = [selection.state() for selection in job.task.kept()]
    shared = {"step": step, "steps": job.cfg.steps, "ended": ended, "task": job.task.state(), "kept": kept}
    per_rank = {"loader": job.loader.state_dict()}
    checkpoint.save(state_dir, step, engine, shared=shared, per_rank=per_rank, keep=job.cfg.checkpoint.keep)
    log.info("saved %s", state_dir / f"step_{step:06d}")


def resume(job: Job, engine: Engine, state_dir: Path) -> tuple[int, bool]:
    """Restore the newest whole checkpoint, if any; returns the step to go on from, and whether the run ended."""
    folder = checkpoint.latest(state_dir)
    if folder is None:
        return 0, False
    shared, own = checkpoint.load(folder, engine)
    if (steps := shared["steps"]) != job.cfg.steps:
        told = "its data have changed; give it the same data, or choose another run_dir"
        raise UserError(f"the run of {folder} was {steps} steps long and is now {job.cfg.steps}: {told}")
    job.task.load_state(shared["task"])
    for selection, state in zip(job.task.kept(), shared["kept"], strict=True):
        selection.load_state(state)
    job.loader.load_state_dict(own["loader"])
    log.info("resumed from %s", folder)
    return int(shared["step"]), bool(shared.get("ended"))


def stream_seed(*parts: int | str) -> int:
    """63 bits from what names a random stream, e.g. (run seed, rank, step, purpose)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def loss_factors(weights: list[float], device: torch.device) -> list[torch.Tensor]:
    """Factors of micro-batches' mean losses with which a step trains on the mean over all they weigh; a collective.

    The engine divides by micro-batches and ranks.
    """
    total = distributed.total(torch.tensor(sum(weights), dtype=torch.float64, device=device))
    return [weight * len(weights) * distributed.world_size() / total for weight in weights]


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with the tensors in it, at any depth, on `device`."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


class _Window:
    def __init__(self, engine: Engine, job: Job) -> None:
        self._cfg, self._engine, self._job = job.cfg, engine, job
        self._recent: deque[tuple[float, int]] = deque(maxlen=5)  # seconds and steps of the last lines
        self._evaluation_s = 0.0
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Any] = defaultdict(int)
        self._steps: Counter[str] = Counter()  # that have the value
        self._items: Counter[str] = Counter()
        self._count, self._flops, self.wait, self._lr = 0, 0.0, 0.0, 0.0  # wait: seconds, for data
        self._start = time.monotonic()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Leave the body out of the training time; `_left` counts it for each evaluation to come."""
        start = time.monotonic()
        yield
        self._evaluation_s = time.monotonic() - start
        self._start += self._evaluation_s

    def add(
        self, outputs: list[StepOutput], factors: list[torch.Tensor], parts: list[Batch], lr: float
    ) -> None:
        """Count one optimiser step; values stay on the device until the line is written."""
        step: dict[str, Any] = defaultdict(int)
        for output, factor in zip(outputs, factors, strict=True):
            step["loss"] += output.loss.detach().float() / len(outputs)
            named = {f"loss/{name}": value for name, value in output.terms.items()} | output.metrics
            for name, value in named.items():
                step[name] += value.detach().float() * factor.float() / len(outputs)
        for name, value in step.items():
            self._sums[name] += value
        self._steps.update(step.keys())
        for part in parts:
            self._flops += self._job.task.flops(part)
            self._items.update(self._job.task.items(part))
        self._count, self._lr = self._count + 1, lr

    def write(self, metrics: Metrics, done: int) -> None:
        """A console line and a metrics line, averaged over the window and the ranks."""
        elapsed, count = max(time.monotonic() - self._start, 1e-9), self._count
        values = {name: float(total) / self._steps[name] for name, total in self._sums.items()}
        values |= {f"{name}_s": spent / count for name, spent in self._job.task.watch.read().items()}
        tflops = self._flops / elapsed / 1e12
        values |= {"data_wait_s": self.wait / count, "step_s": elapsed / count, "tflops": tflops}
        rates = {f"{kind}_per_s": items / elapsed for kind, items in self._items.items()}
        values = distributed.mean(values | rates)
        values |= {name: values[name] * distributed.world_size() for name in rates}
        if not values["tflops"]:
            del values["tflops"]
        elif peak := peak_tflops():
            values["mfu"] = values["tflops"] / peak
        norm, peak_mb = self._engine.grad_norm(), memory.peak() / 1e6
        values |= {"lr": self._lr, "grad_norm": norm, "peak_memory_mb": peak_mb}
        counts = distributed.gather_objects(Counter(self._job.loader.skipped))
        skipped = sum(counts, Counter[str]())
        values |= {f"skipped/{reason}": float(number) for reason, number in skipped.items()}
        metrics.write("train", done, values)
        self._recent.append((elapsed, count))
        terms = (name for name in values if name.startswith("loss/"))
        log.info(
            "step %d/%d  loss %.4f  %s  lr %.2e  grad %.2f  %s  data wait %.0f%%  %.0f MB  skipped %d  ETA %s",
            done, self._cfg.steps, values["loss"],
            "  ".join(f"{name.removeprefix('loss/')} {values[name]:.4f}" for name in terms),
            self._lr, norm,
            "  ".join(f"{values[name]:.0f} {name.removesuffix('_per_s')}/s" for name in rates),
            100 * self.wait / elapsed, peak_mb, skipped.total(), duration(self._left(done)),
        )  # fmt: skip
        self._restart()

    def _left(self, done: int) -> float:
        """Seconds to the end: of steps at the last lines' rate, and of evaluations, the closing one too."""
        seconds, steps = (sum(column) for column in zip(*self._recent, strict=True))
        every, phase = self._cfg.evaluation.every_steps, self._cfg.evaluation.phase
        evaluations = (self._cfg.steps - 1 - phase) // every - (done - 1 - phase) // every if every else 0
        return (self._cfg.steps - done) * seconds / steps + (evaluations + 1) * self._evaluation_s


def _warn_of_memory(cfg: RunConfig) -> None:
    """Where the first step came near the memory there is, of which evaluations want some too."""
    taken, there = memory.peak(), memory.held() + memory.available()
    if taken > _NEAR * there:
        micro, _ = batch_triple(cfg, distributed.world_size())
        log.warning(
            "the first step took %.1f of the %.1f GB that this process can have; micro_batch_size=%d (now %d) in another "
            "run_dir takes less",
            taken / 1e9, there / 1e9, max(1, micro // 2), micro,
        )  # fmt: skip


def _log_every(cfg: RunConfig) -> int:
    return max(1, min(cfg.log.every_steps, cfg.steps // _FEWEST_LINES))


def _non_finite(
    run_dir: Path, step: int, outputs: list[StepOutput], factors: list[torch.Tensor], parts: list[Batch]
) -> UserError:
    """What was not finite; this rank's samples are written down."""
    path = run_dir / f"nonfinite_step_{step:06d}_rank_{distributed.rank()}.json"
    keys = [key for part in parts for key in part["keys"]]
    terms = [{name: float(value) for name, value in output.terms.items()} for output in outputs]
    bad = sorted({name for part in terms for name, value in part.items() if not math.isfinite(value)})
    finite = all(bool(output.loss.isfinite()) for output in outputs)
    write_json(path, {"step": step, "finite_here": finite, "terms": repr(terms), "keys": keys})
    if factors[0].isnan():
        told = f"nothing in the batch of step {step} is trained on; its samples are in {path}; mend the data"
        return UserError(told)
    where = f"terms {', '.join(bad)}" if bad else "on another rank"
    return UserError(
        f"the loss is not finite at step {step} ({where}), and the weights were not touched; the batch's samples are in "
        f"{path} (first: {', '.join(keys[:3])}); lower optim.lr or remove them, then start the same command again"
    )


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM, which no longer kills, has come."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
