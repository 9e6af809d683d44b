"""Commands without their start-up time: children forked from one fresh process that has done the imports of them all.

A run needs a process of its own, and most of a small run's time is its imports. The test process itself is not forked:
threads that a test started (an ONNX export's, for one) do not live on in a child, which then waits for them for ever.
The fresh process in which a run checks its export, and a run that a command launches, are forked as well: from a copy
that was made before the command began.

`python tests/projects/zygote.py` is the process that forks; it takes one JSON request a line and answers each with a number.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "torch._inductor.compile_fx",  # by DeepSpeed's optimisers, when an engine is made
    "torchvision", "open_clip", "timm", "deepspeed", "vlmkd.train.run", "projects.dho.build", "projects.promptkd.build",
    "projects.vl2v_adip.build", "projects.tinyclip.build", "projects.llava_mod.build", "projects.matvlm.build",
    "projects.calico.build",
    "transformers.models.llama.modeling_llama", "jinja2", "matplotlib.figure", "matplotlib.backends.backend_svg",
)  # fmt: skip
_LIMIT_S = 900.0


class Forker:
    """Who asks a process that forks."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._requests, self._answers = requests, answers

    def start(
        self,
        module: str,
        argv: Sequence[str],
        output: Path,
        without: Sequence[str],
        environment: dict[str, str],
    ) -> int:
        """The number of a child that runs `python -m MODULE ARGV`."""
        request = {
            "argv": list(argv),
            "output": str(output),
            "without": list(without),
            "environment": environment,
        }
        return self.ask(start=module, **request)

    def ask(self, **request: Any) -> int:
        """The answer to a request."""
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return int(self._answers.readline())


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
        assert self._process.stdin is not None and self._process.stdout is not None
        self._forker = Forker(self._process.stdin, self._process.stdout)

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
            self._forker.start(module, argv, path, without, values)
            for path, values in zip(outputs, environments, strict=True)
        ]
        codes = [self._forker.ask(wait=pid) for pid in pids]
        return next((code for code in codes if code), 0), "".join(path.read_text() for path in outputs)

    def interrupt(
        self, number: signal.Signals, module: str, argv: Sequence[str], output: Path, when: Callable[[], bool]
    ) -> tuple[int, str]:
        """Start a command and send it a signal once `when` holds, which must be before it ends; exit code and output."""
        pid = self._forker.start(module, argv, output, (), {})
        deadline = time.monotonic() + _LIMIT_S
        while not when() and self._forker.ask(alive=pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self._forker.ask(alive=pid), output.read_text()
        os.kill(pid, number)
        return self._forker.ask(wait=pid), output.read_text()

    def kill(self, module: str, argv: Sequence[str], output: Path, when: Callable[[], bool]) -> None:
        """Start a command and kill it once `when` holds, which must be before it ends."""
        code, said = self.interrupt(signal.SIGKILL, module, argv, output, when)
        assert code == -signal.SIGKILL, said

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def free_port() -> int:
    """A port that nobody listens at; no other worker of this pytest is given it, nor any connection by the system."""
    first = 10_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = first + random.SystemRandom().randrange(1_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
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
    _answer(sys.stdin, answers)
    os._exit(0)  # without taking everything down in order, which takes seconds


def _answer(requests: Iterable[str], answers: TextIO) -> None:
    """Fork, look and wait as each line says."""
    for line in requests:
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


def _child(request: dict[str, Any]) -> NoReturn:
    """Become the command."""
    if not importlib.import_module("torch").cuda.is_available():  # of which a copy cannot hide the devices
        _fork_from_a_copy(Path(request["output"]).with_suffix(".copy"))
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


def _fork_from_a_copy(output: Path) -> None:
    """From now on checks of exports and launched runs are children of a copy of this process, which knows nothing later."""
    here, there = socket.socketpair()
    if not os.fork():
        here.close()
        _answer(there.makefile("r"), there.makefile("w"))  # until the other end is closed
        os._exit(0)
    there.close()
    copy = Forker(here.makefile("w"), here.makefile("r"))
    run, popen = subprocess.run, subprocess.Popen

    def check(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[:2] != [sys.executable, "-m"]:
            return run(command, **options)
        pid = copy.start(command[2], command[3:], output, (), options["env"])
        return subprocess.CompletedProcess(command, copy.ask(wait=pid), "", output.read_text())

    def launch(command: Any, *arguments: Any, **options: Any) -> Any:
        if command[:2] != ["bash", str(ROOT / "scripts" / "launch.sh")]:
            return popen(command, *arguments, **options)
        module = command[2].removesuffix(".py").replace("/", ".")
        return _Launched(copy, copy.start(module, command[3:], output, (), {}), output)

    importlib.import_module("vlmkd.export.folder").subprocess = types.SimpleNamespace(run=check)  # type: ignore[attr-defined]
    subprocess.Popen = launch  # type: ignore[assignment, misc]


class _Launched:
    """A launched run, as far as `subprocess.Popen` is asked about one."""

    def __init__(self, copy: Forker, pid: int, output: Path) -> None:
        self._copy, self._pid, self._output = copy, pid, output

    def wait(self) -> int:
        code = self._copy.ask(wait=self._pid)
        print(self._output.read_text(), end="", flush=True)
        return code

    def terminate(self) -> None:
        os.kill(self._pid, signal.SIGTERM)


if __name__ == "__main__":
    serve()
