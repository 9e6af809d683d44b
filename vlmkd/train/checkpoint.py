"""The resumable state of a run: written under a temporary name, then renamed; torn ones are skipped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmkd import distributed
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_object
from vlmkd.tensor_files import read_torch
from vlmkd.train.engine import Engine
from vlmkd.zoo import sha256_of

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_SHARED = "shared.pt"
_FORMAT = 2  # raised when what is in a checkpoint changes
_NAME = re.compile(r"step_(\d{6,})$")


def save(
    state_dir: Path, step: int, engine: Engine, *, shared: dict[str, Any], per_rank: dict[str, Any], keep: int
) -> None:
    """Write `state_dir/step_NNNNNN`, then drop all but the newest `keep` checkpoints; a collective.

    `shared` comes from rank 0, `per_rank` from each; both hold tensors and plain data only.
    """
    final = state_dir / f"step_{step:06d}"
    partial = state_dir / f".partial_{final.name}"
    with _together(final, partial):
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with _together(final, partial):
        engine.save(partial)
        torch.save(per_rank, partial / f"rank_{distributed.rank()}.pt")
        if distributed.is_main():
            torch.save(shared, partial / _SHARED)
        own = [path for path in sorted(partial.rglob("*")) if path.is_file() and _is_own(path.name)]
        for path in own:
            _sync(path)
        digests = {path.relative_to(partial).as_posix(): sha256_of(path) for path in own}
    files = {name: digest for part in distributed.gather_objects(digests) for name, digest in part.items()}
    with _together(final, partial):
        if distributed.is_main():
            facts = {"format": _FORMAT, "step": step, **_shape(engine), "files": files}
            manifest = partial / _MANIFEST
            manifest.write_text(json.dumps(facts | {"sha256": _digest_of(facts)}, indent=1), encoding="utf-8")
            _sync(manifest)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _sync(state_dir)
            for old in _steps(state_dir)[keep:]:
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _together(final: Path, partial: Path) -> Iterator[None]:
    """When the body fails on one rank, all drop `partial` and raise the same UserError."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        problem = f"{type(error).__name__}: {one_line(error)}"
    problems = [text for text in distributed.gather_objects(problem) if text]
    if problems:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        told = "free disk space and start the same command again, to go on from the checkpoint before it"
        raise UserError(f"checkpoint {final} could not be written ({problems[0]}); {told}")


def latest(state_dir: Path) -> Path | None:
    """The newest whole checkpoint, the same on all ranks; damaged ones are renamed `damaged_step_N`."""
    found = None
    for folder in _steps(state_dir) if distributed.is_main() else ():
        if (reason := damage(folder)) is None:
            found = folder
            break
        log.warning("checkpoint %s is damaged (%s); trying the one before it", folder, reason)
        aside = folder.with_name(f"damaged_{folder.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)  # else it would count among the newest that are kept
        except OSError as error:
            told = f"cannot be renamed ({error.strerror}); move it away"
            raise UserError(f"the damaged checkpoint {folder} {told}") from None
    return distributed.broadcast_object(found)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None: every file has its recorded sha256."""
    try:
        manifest = read_object(folder / _MANIFEST, "manifest")
    except UserError as error:
        return str(error)
    if manifest.pop("sha256", None) != _digest_of(manifest):
        return f"{_MANIFEST} does not match its own sha256"
    files = manifest.get("files")
    if not isinstance(files, dict) or _SHARED not in files:
        return f"{_MANIFEST} does not list {_SHARED}"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} does not match its sha256"
    return None


def load(folder: Path, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore the engine; returns the shared state and this rank's own. Nothing that a file says is run."""
    manifest = read_object(folder / _MANIFEST, "manifest")
    if manifest.get("format") != _FORMAT:
        told = "by another version of vlmkd; end the run with that one, or choose another run_dir"
        raise UserError(f"checkpoint {folder} was written {told}")
    for name, now in _shape(engine).items():
        if (then := manifest.get(name)) != now:
            told = f"{name}={then} and this run has {now}; start it with {then} or choose another run_dir"
            raise UserError(f"checkpoint {folder} was written with {told}")
    try:
        engine.load(folder)
    except (OSError, RuntimeError, LookupError) as error:
        told = f"does not fit this run ({one_line(error)}); choose another run_dir"
        raise UserError(f"checkpoint {folder} {told}") from None
    own = f"rank_{distributed.rank()}.pt"
    shared, per_rank = (read_torch(folder / file, what="checkpoint file") for file in (_SHARED, own))
    return shared, per_rank


def _shape(engine: Engine) -> dict[str, int]:
    """What a checkpoint's files depend on."""
    return {"ranks": distributed.world_size(), "deepspeed.zero_stage": engine.zero_stage}


def _steps(state_dir: Path) -> list[Path]:
    """Newest first."""
    found = state_dir.iterdir() if state_dir.is_dir() else ()
    named = [(int(match[1]), path) for path in found if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def _is_own(name: str) -> bool:
    """Whether this rank writes a file: by `rank_R` in its name; rank 0 those without."""
    match = re.search(r"(?<!^mp_)rank_(\d+)", name)
    return int(match[1] if match else 0) == distributed.rank()


def _digest_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
