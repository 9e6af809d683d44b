"""Tiny TinyCLIP runs on synthetic data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.projects.zygote import Zygote

ROOT = Path(__file__).parents[3]


def model_config(width: int, layers: int, head_width: int = 16) -> dict:
    """An open_clip config small enough for a test, with open_clip's own tokenizer."""
    return {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": layers,
            "width": width,
            "head_width": head_width,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": width,
            "heads": width // head_width,
            "layers": layers,
        },
    }


class Runs:
    """Starts a train script in a fresh process, with a config in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, width, layers in (("teacher", 48, 4), ("student", 32, 2)):
            (folder / f"{name}.json").write_text(json.dumps(model_config(width, layers)))

    def config(self, name: str, **fields: object) -> Path:
        """A YAML file of a short run; `fields` replace top-level ones."""
        values = {
            "steps": 8,
            "batch_size": 8,
            "threads": 1,
            "student": {"model": str(self.folder / "student.json")},
            "teachers": [{"model": str(self.folder / "teacher.json")}],
            "data": {"kind": "synthetic", "workers": 0, "synthetic_samples": 64},
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "log": {"every_steps": 1},
            "checkpoint": {"every_steps": 2},
            **fields,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def start(self, script: str, *arguments: object) -> subprocess.Popen[str]:
        """The run as a child process."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", f"projects.tinyclip.{script}", *map(str, arguments)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.folder,
        )

    def finish(self, script: str, *arguments: object) -> tuple[int, str]:
        """Exit code and output of a whole run."""
        process = self.start(script, *arguments)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def launch(self, ranks: int, script: str, *arguments: object) -> tuple[int, str]:
        """Exit code and output of a run of several processes, through scripts/launch.sh."""
        environment = {**os.environ, "NPROC": str(ranks), "OMP_NUM_THREADS": "1", "VLMKD_NO_VENV": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        command = [
            "bash",
            ROOT / "scripts" / "launch.sh",
            f"projects/tinyclip/{script}.py",
            *map(str, arguments),
        ]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            timeout=900,
            cwd=self.folder,
        )
        return done.returncode, done.stdout

    def interrupt(
        self, number: signal.Signals, when: Callable[[], bool], script: str, *arguments: object
    ) -> tuple[int, str]:
        """Start a run and send it a signal once `when` holds."""
        process = self.start(script, *arguments)
        deadline = time.monotonic() + 900
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0][-3000:]
        process.send_signal(number)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output


class ForkedRuns(Runs):
    """The same, as children of the zygote."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        super().__init__(folder)
        self._zygote, self._output = zygote, folder / "output.txt"

    def finish(self, script: str, *arguments: object) -> tuple[int, str]:
        return self.fork(1, script, *arguments)

    def fork(self, ranks: int, script: str, *arguments: object) -> tuple[int, str]:
        """Exit code and output of a run of several processes, without a launcher."""
        module, argv = f"projects.tinyclip.{script}", list(map(str, arguments))
        return self._zygote.run(module, argv, self._output, ranks=ranks)

    def interrupt(
        self, number: signal.Signals, when: Callable[[], bool], script: str, *arguments: object
    ) -> tuple[int, str]:
        module, argv = f"projects.tinyclip.{script}", list(map(str, arguments))
        return self._zygote.interrupt(number, module, argv, self._output, when)
