"""Whole runs in forked children: a run needs a process of its own, but no imports of its own, which take most of its time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch


def start(
    work: Callable[[], object], output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """`work` in a child that writes what it says into `output`; its exit code is that of a command."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as vlmkd.engine does before its import
    import deepspeed  # noqa: F401  (once here instead of in every child)

    child = multiprocessing.get_context("fork").Process(target=_child, args=(work, output, environment or {}))
    child.start()
    return child


def finish(work: Callable[[], object], output: Path, *, ranks: int = 1) -> tuple[int, str]:
    """Exit code (of several ranks: the first that is not 0) and output of a whole run."""
    outputs = [output.with_name(f"{output.name}.{rank}" if rank else output.name) for rank in range(ranks)]
    environments = [{}] if ranks == 1 else _environments(ranks)
    children = [start(work, path, values) for path, values in zip(outputs, environments, strict=True)]
    for child in children:
        child.join(300)
        if child.is_alive():
            child.kill()
            child.join()
    codes = [child.exitcode or 0 for child in children]
    return next((code for code in codes if code), 0), "".join(path.read_text() for path in outputs)


def kill(work: Callable[[], object], output: Path, when: Callable[[], bool]) -> None:
    """Start `work` and kill it once `when` holds, which must be before it ends."""
    child = start(work, output)
    deadline = time.monotonic() + 300
    while not when() and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, output.read_text()


def _environments(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _child(work: Callable[[], object], output: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    work()
