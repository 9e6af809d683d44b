"""Commands without their start-up time: children forked from one fresh process that has done the imports of them all.

A run needs a process of its own, and most of a small run's time is its imports. The test process itself is not forked:
threads that a test started (an ONNX export's, for one) do not live on in a child, which then waits for them for ever.

`python tests/projects/zygote.py` is the process that forks; it takes one JSON request a line and answers each with a number.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "torch._inductor.compile_fx",  # by DeepSpeed's optimisers, when an engine is made
    "torchvision", "open_clip", "timm", "deepspeed", "vlmkd.train.run", "projects.dho.build", "projects.promptkd.build",
    "projects.vl2v_adip.build", "jinja2", "matplotlib.figure", "matplotlib.backends.backend_svg",
)  # fmt: skip
_LIMIT_S = 300.0


class Zygote:
    """The test's side: starts the process, asks it for children, and ends it."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, module: str, argv: Sequence[str], output: Path, *, without: Sequence[str] = (), ranks: int = 1
    ) -> tuple[int, str]:
        """`python -m MODULE ARGV`: exit code (of several ranks: the first that is not 0) and what was written.

        `module` may be the path of a file. `without` names functions (`package.module:name`) that do nothing in the child.
        """
        outputs = [
            output.with_name(f"{output.name}.{rank}" if rank else output.name) for rank in range(ranks)
        ]
        environments = [{}] if ranks == 1 else _environments(ranks)
        pids = [
            self._start(module, argv, path, without, values)
            for path, values in zip(outputs, environments, strict=True)
        ]
        codes = [self._ask(wait=pid) for pid in pids]
        return next((code for code in codes if code), 0), "".join(path.read_text() for path in outputs)

    def kill(self, module: str, argv: Sequence[str], output: Path, when: Callable[[], bool]) -> None:
        """Start a command and kill it once `when` holds, which must be before it ends."""
        pid = self._start(module, argv, output, (), {})
        deadline = time.monotonic() + _LIMIT_S
        while not when() and self._ask(alive=pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        assert self._ask(wait=pid) == -signal.SIGKILL, output.read_text()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _start(
        self,
        module: str,
        argv: Sequence[str],
        output: Path,
        without: Sequence[str],
        environment: dict[str, str],
    ) -> int:
        request = {
            "argv": list(argv),
            "output": str(output),
            "without": list(without),
            "environment": environment,
        }
        return self._ask(start=module, **request)

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


# ------------------------------------------------------------------------------------------- the process that forks


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    del sys.path[0]  # this file's folder
    tests: Any = types.ModuleType("tests")  # which an installed package may have too
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # as vlmkd.train.engine does before it imports deepspeed
    for name in PRELOADED:
        importlib.import_module(name)
    assert importlib.import_module(
        "deepspeed.ops"
    ).__compatible_ops__  # asking makes DeepSpeed probe them, once
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if not answer:
                _child(request)
        elif "alive" in request:
            answer = int(os.waitid(os.P_PID, request["alive"], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None)
        else:
            answer = _wait(request["wait"])
        print(answer, file=answers, flush=True)


def _wait(pid: int) -> int:
    """Exit code, or minus the signal's number; a child that takes too long is killed."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _child(request: dict[str, Any]) -> None:
    """Become the command."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.chdir(Path(request["output"]).parent)
    os.environ.update(request["environment"])
    sys.argv = [request["start"], *request["argv"]]
    code: Any = 1
    try:
        for name in request["without"]:
            module, _, function = name.partition(":")
            setattr(importlib.import_module(module), function, lambda *arguments: None)
        if request["start"].endswith(".py"):
            runpy.run_path(request["start"], run_name="__main__")
        else:
            runpy.run_module(request["start"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  (as the interpreter does at its end; the exit code stays 1)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
