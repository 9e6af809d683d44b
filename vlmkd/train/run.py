"""The life of one run: parse, start ranks, build, fit, evaluate, export, check the export."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import random
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from PIL import Image

import vlmkd
from vlmkd import config, distributed
from vlmkd.allocator import keep_freed_memory
from vlmkd.config import CheckpointConfig, LogConfig, RunConfig, require
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, OfItems, OfQuestions, Result
from vlmkd.evaluation.retrieval import Retrieval
from vlmkd.export.folder import git
from vlmkd.files import new_folder, read_yaml
from vlmkd.page.gallery import GALLERY, MISTAKES, PICTURES, write_gallery, write_mistakes, write_pictures
from vlmkd.page.report import build_report
from vlmkd.page.runs import DETAILS, MODELS
from vlmkd.results import STUDENT, details_of
from vlmkd.train import lookup, trainer
from vlmkd.train.engine import Engine, check_machine, deepspeed_json, start_ranks
from vlmkd.train.metrics import Metrics, start_console
from vlmkd.train.selection import Weights, completed, using
from vlmkd.train.teacher_check import look_at_teachers
from vlmkd.train.trainer import Job, Stopped

log = logging.getLogger(__name__)

C = TypeVar("C", bound=RunConfig)

# What may differ when a run goes on, as no weights depend on it, except that other workers re-start the stream. Not the
# evaluations, by which weights are selected.
_CHANGEABLE = {
    "run_dir", "threads", "data.workers", "data.shard_cache", "data.max_bad_share",
    "evaluation.batch_size", "evaluation.workers", "evaluation.teacher",
    *(f"log.{item.name}" for item in dataclasses.fields(LogConfig)),
    *(f"checkpoint.{item.name}" for item in dataclasses.fields(CheckpointConfig)),
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_GALLERY_IMAGES = 24
_PACKAGES = ("torch", "open_clip_torch", "timm", "transformers", "webdataset", "deepspeed", "numpy", "pillow")


def main(config_class: type[C], build: Callable[[C], Job], argv: list[str] | None = None) -> None:
    """Entry point of every train script: `CONFIG.yaml [MORE.yaml ...] [field=value ...] [--help] [--dry-run]`.

    Exits with 0 when the run is complete, 2 and one line on a UserError, 143 after a SIGTERM and a save.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        config.print_help(config_class)
        return
    try:
        cfg = config.load(config_class, [arg for arg in argv if arg != "--dry-run"])
        check_machine(cfg)
        generated = deepspeed_json(cfg, int(distributed.environment()["WORLD_SIZE"]))
        if "--dry-run" in argv:
            lookup.check_names(asdict(cfg))
            print(config.to_yaml(cfg) + "# DeepSpeed: " + json.dumps(generated))
            return
        with _run_folder(cfg):
            _run(cfg, build, generated)
        distributed.leave()
    except UserError as error:
        _exit_with(str(error))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        file = error.filename or f"a file of {cfg.run_dir}"
        mend = "allow it" if error.errno == errno.EACCES else "free disk space"
        told = f"{file} could not be written ({error.strerror}); {mend} and start the same command again"
        _exit_with(f"{told}, to go on from the newest checkpoint")
    except RuntimeError:
        if not distributed.mistake_told():
            raise
        sys.exit(2)  # another rank has said it; what broke here was the connection to it
    except Stopped as stopped:
        print(stopped, flush=True)
        distributed.leave()
        sys.exit(128 + 15)
    finally:
        distributed.leave(together=False)


def _exit_with(mistake: str) -> NoReturn:
    rank = distributed.environment()["RANK"]
    who = "error" if rank == "0" else f"error (rank {rank})"
    print(f"{who}: {mistake}", file=sys.stderr, flush=True)
    distributed.tell_mistake()
    sys.exit(2)


def _run(given: C, build: Callable[[C], Job], generated: dict[str, Any]) -> None:
    run_dir = Path(given.run_dir)
    if (run_dir / "done.json").is_file():
        print(f"run {run_dir} is complete; export: {run_dir / 'export'} (delete the folder to run it again)")
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    if not torch.cuda.is_available():
        keep_freed_memory(varied=given.varied)
    start_ranks()
    # What libraries draw outside our generators is the same on every rank, as initial weights must be.
    random.seed(given.seed)
    np.random.seed(given.seed % 2**32)
    torch.manual_seed(given.seed)
    start_console(run_dir)
    job = build(given)
    cfg = job.cfg
    if distributed.is_main():
        _write(run_dir / "config.yaml", config.to_yaml(given))
        _write(run_dir / "command.txt", shlex.join(sys.argv) + "\n")
        facts = {"ds_config": generated, "env": _environment(), "data": job.loader.describe()}
        for name, content in facts.items():
            _write(run_dir / f"{name}.json", content)
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in job.task.student.parameters()]
    whole, trained = (sum(column) / 1e6 for column in zip(*sizes, strict=True))
    told = "student: %.2f M parameters, %.2f M of them trained; %d teacher(s) loaded"
    log.info(told, whole, trained, len(job.task.teachers))
    engine = Engine(job.task, cfg)  # from here on `job.task.student` is its wrapper
    told = "is 3, but averages and selections need whole weights on each rank; use 1 or 2"
    require(not job.task.kept() or engine.zero_stage < 3, "deepspeed.zero_stage", told)
    for teacher in job.task.teachers:
        engine.place_teacher(teacher, shard=cfg.deepspeed.shard_teacher)
    state_dir = run_dir / "state"
    start, ended = trainer.resume(job, engine, state_dir)
    tags = {"seed": cfg.seed} | job.task.tags()
    metrics = Metrics(run_dir, cfg.log, asdict(cfg), resume_step=start + 1, tags=tags)
    if not start and cfg.evaluation.teacher:
        context = Context(engine.device, cfg.evaluation.batch_size, progress=False)
        with engine.whole_weights(job.task.teachers):
            look_at_teachers(job.task, job.evaluators, job.loader, context)
    try:
        if not ended:
            start = trainer.fit(job, engine, metrics, state_dir, start=start)
        _finish(job, engine, metrics, run_dir, start)
    finally:
        metrics.close()


def _finish(job: Job, engine: Engine, metrics: Metrics, run_dir: Path, step: int) -> None:
    """Final evaluation, export, and its check in a fresh process."""
    task, folder = job.task, run_dir / "eval"
    chosen = {STUDENT: trainer.present_weights(task)}
    results = _final_results(job, engine, metrics, step, chosen)
    exported = list(chosen)[-1]
    with engine.whole_weights([engine.module, *task.teachers]), using(engine.module, chosen[exported]):
        if distributed.is_main():
            folder.mkdir(exist_ok=True)
            metrics.write_sizes(task.parameter_counts())
            _write(folder / MODELS, {"exported": exported, "selections": list(chosen)[1:]})
            _write(folder / DETAILS, json.dumps(details_of(results)))
            _write_gallery(folder / GALLERY, job, engine.device)
    weights = engine.student_weights()
    written = {}
    with engine.whole_weights([engine.module]):  # an export may ask the student itself
        if weights is not None:
            places = {one.name: one.folder for one in task.selections if one.folder and one.name in chosen}
            for name, place in (places | {exported: "export"}).items():
                whole = completed(weights, chosen[name])
                written[run_dir / place] = task.export(run_dir / place, whole, name)
    if weights is not None:
        evaluators = (*job.evaluators, *job.final_evaluators)
        items = {one.dataset: one.items for one in evaluators if isinstance(one, OfItems)}
        write_mistakes(folder / MISTAKES, results[exported], items)
        asked = [one for one in evaluators if isinstance(one, OfQuestions)]
        owners = dict.fromkeys(line for one in asked for line in one.attributions)
        write_pictures(folder / PICTURES, {one.dataset: one.pictures() for one in asked}, owners)
        _write(run_dir / "data.json", job.loader.describe())
        task.check_exports(written)
        log.info("exported %s; reloaded in a fresh process with equal outputs", run_dir / "export")
        _write(run_dir / "done.json", {"step": step, "export": "export"})
        _draw_page(run_dir)
    distributed.barrier()


def _final_results(
    job: Job, engine: Engine, metrics: Metrics, step: int, chosen: dict[str, Weights]
) -> dict[str, list[Result]]:
    """Results by model: the student, its selections, whose weights are added to `chosen`, and the teachers.

    Final evaluators look at the selections, or else the student.
    """
    cfg, task = job.cfg, job.task
    # Where an evaluation ended the run, the selections have seen these weights.
    found, _ = trainer.evaluate_student(job, engine, metrics, step, judge=step == cfg.steps)
    results = {STUDENT: found}
    chosen |= {kept.name: kept.weights() for kept in task.selections if kept.weights()}
    evaluate = partial(trainer.evaluate, cfg, engine=engine, metrics=metrics, step=step)
    for name, weights in chosen.items():
        with using(engine.module, weights):
            if name != STUDENT:
                results[name] = evaluate(job.evaluators, task.predictor(), model=name)
                task.after_evaluation(results[name], step)
            if name != STUDENT or len(chosen) == 1:
                results[name] += evaluate(job.final_evaluators, task.predictor(), model=name)
    everything = [*job.evaluators, *job.final_evaluators]
    for name, predictor in task.teacher_predictors().items() if cfg.evaluation.teacher else ():
        results[name] = evaluate(everything, predictor, model=name, modules=task.teachers)
    return results


def _draw_page(run_dir: Path) -> None:
    """A page that cannot be drawn costs a finished run but a line."""
    try:
        build_report([run_dir], run_dir / "report.html", title=f"vlmkd run {run_dir.name}")
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        told = "the run is complete, but its page could not be drawn (%s: %s); to try again: python scripts/report.py %s"
        log.warning(told, type(error).__name__, error, run_dir)


def _write_gallery(path: Path, job: Job, device: torch.device) -> None:
    dataset = next((one.dataset for one in job.evaluators if isinstance(one, Retrieval)), None)
    if dataset is None:
        return
    spread = range(0, len(dataset.images), max(1, len(dataset.images) // _GALLERY_IMAGES))
    rows = {dataset.texts_of_image[index][0]: index for index in spread}  # one image a text
    shown = list(rows.items())[:_GALLERY_IMAGES]
    images = [Image.open(io.BytesIO(dataset.images[index].read())) for _, index in shown]
    predictors = {**job.task.teacher_predictors(), STUDENT: job.task.predictor()}
    write_gallery(path, predictors, images, [dataset.texts[text] for text, _ in shown], device)


@contextmanager
def _run_folder(cfg: RunConfig) -> Iterator[None]:
    """Made or opened again, and locked, by rank 0; another run's is refused."""
    if distributed.environment()["RANK"] != "0":
        yield
        return
    field = "config field run_dir:"
    run_dir = new_folder(cfg.run_dir, field)
    config_file = run_dir / "config.yaml"
    if config_file.is_file():
        _check_same_run(config_file, cfg)
    # A run may have been stopped before it had written its config.
    elif {one.name for one in run_dir.glob("*") if one.suffix != ".partial"} - {".lock", "log.txt"}:
        raise UserError(f"{field} {run_dir} holds files of something else; choose an empty or new folder")
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            told = "is in use by another process; wait for it or choose another run_dir"
            raise UserError(f"run folder {run_dir} {told}") from None
        yield


def _check_same_run(path: Path, cfg: RunConfig) -> None:
    """Refuse a folder whose config is damaged, or differs in what the weights depend on."""
    folder, mend = f"run folder {path.parent}", "delete the folder or choose another run_dir"
    loaded = read_yaml(path, f"{folder}:", mend)
    whole = {item.name for item in dataclasses.fields(RunConfig)}
    if not isinstance(loaded, dict) or not whole <= loaded.keys():
        raise UserError(f"config.yaml of {folder} is no whole config of a run; {mend}")
    # A field that did not exist when the run was started had its default.
    then, new = lookup.leaves(loaded), lookup.leaves(config.plain(cfg))
    old = lookup.leaves(config.plain(type(cfg))) | then
    changed = {name for name in then | new if old.get(name) != new.get(name)} - _CHANGEABLE
    if changed:
        first, more = min(changed), f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        told = f"{first}={old.get(first)!r}, now {new.get(first)!r}{more}"
        mend = "choose another run_dir or give the same config to go on"
        raise UserError(f"{folder} belongs to a run with {told}; {mend}")


def _environment() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    changes = git("diff", "HEAD")
    return {
        "vlmkd": vlmkd.__version__,
        "packages": versions,
        "python": sys.version.split()[0],
        "git_commit": git("rev-parse", "HEAD") or None,
        "git_changes_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
    }


def _write(path: Path, content: Any) -> None:
    """A text, or plain data as JSON; `main` tells what the disk refuses."""
    partial_path = path.with_name(path.name + ".partial")
    text = content if isinstance(content, str) else json.dumps(content, indent=1)
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)
