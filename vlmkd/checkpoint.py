"""The resumable state of a run: written under a temporary name, verified, renamed; torn ones are skipped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from vlmkd import distributed
from vlmkd.engine import Engine
from vlmkd.errors import UserError

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{6,})$")


def save(
    state_dir: Path, step: int, engine: Engine, *, shared: dict[str, Any], per_rank: dict[str, Any], keep: int
) -> None:
    """Write `state_dir/step_NNNNNN`, then drop all but the newest `keep` checkpoints.

    `shared` comes from rank 0, `per_rank` from each rank; both hold tensors and plain data only. A collective.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints stay as they were.
    """
    final = state_dir / f"step_{step:06d}"
    partial = state_dir / f".partial_{final.name}"
    problem = None
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    try:
        engine.save(partial)
        torch.save(per_rank, partial / f"rank_{distributed.rank()}.pt")
        if distributed.is_main():
            torch.save(shared, partial / "shared.pt")
        own = _digests(partial, distributed.rank())
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        problem, own = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", {}
    problems = [text for text in distributed.gather_objects(problem) if text]
    if problems:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written ({problems[0]}); free disk space and start the same command "
            f"again: the run continues from the checkpoint before it"
        )
    files = {name: digest for part in distributed.gather_objects(own) for name, digest in part.items()}
    if distributed.is_main():
        manifest = {"step": step, "world_size": distributed.world_size(), "files": files}
        _write_synced(partial / _MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(state_dir)
        for old in _steps(state_dir)[keep:]:
            shutil.rmtree(old)
    distributed.barrier()


def latest(state_dir: Path) -> Path | None:
    """The newest whole checkpoint, agreed on by all ranks; damaged ones are reported and passed over."""
    found = None
    if distributed.is_main():
        for folder in _steps(state_dir):
            reason = damage(folder)
            if reason is None:
                found = folder
                break
            log.warning("checkpoint %s is damaged (%s); trying the one before it", folder, reason)
    return distributed.broadcast_object(found)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file has the recorded size and sha256."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return f"no {_MANIFEST}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} does not match its sha256"
    return None


def load(folder: Path, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore the engine; returns the shared state and this rank's own.

    Raises:
        UserError: it was written by another number of ranks.
    """
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    saved, now = manifest["world_size"], distributed.world_size()
    if saved != now:
        raise UserError(
            f"checkpoint {folder} was written by {saved} ranks and this run has {now}; start it with {saved} ranks"
        )
    engine.load(folder)
    shared = torch.load(folder / "shared.pt", map_location="cpu", weights_only=True)
    own = torch.load(folder / f"rank_{distributed.rank()}.pt", map_location="cpu", weights_only=True)
    return shared, own


def _steps(state_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not state_dir.is_dir():
        return []
    named = [(int(match[1]), path) for path in state_dir.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def _digests(folder: Path, rank: int) -> dict[str, str]:
    """sha256 of the files that this rank wrote, flushed to disk first."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _owner(path.name) == rank:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            result[path.relative_to(folder).as_posix()] = _sha256(path)
    return result


def _owner(name: str) -> int:
    """Rank that writes a file: by `rank_R` in its name (DeepSpeed's and ours), else rank 0."""
    match = re.search(r"rank_(\d+)", name)
    return int(match[1]) if match and not name.startswith("mp_rank") else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
