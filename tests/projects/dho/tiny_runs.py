"""Tiny DHO runs on a tree of class folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[3]
CLASSES = {"red square": (220, 30, 30), "green disc": (30, 200, 40), "blue bar": (30, 40, 220)}


def clip_config(width: int, layers: int) -> dict:
    """An open_clip config small enough for a test, with open_clip's own tokenizer."""
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": layers, "width": width, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }


def write_images(folder: Path, *, train: int = 10, held_out: int = 4) -> None:
    """`<split>/<class>/*.png`: coloured noise whose mean tells the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", held_out), ("test", held_out)):
        for name, colour in CLASSES.items():
            place = folder / split / name.replace(" ", "_")
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(colour, 60, (40, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


class Runs:
    """Starts training in a fresh process, with a config in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_images(folder / "images")
        for name, width, layers in (("teacher", 32, 2), ("student", 16, 1)):
            (folder / f"{name}.json").write_text(json.dumps(clip_config(width, layers)))

    def values(self, **fields: object) -> dict:
        """The fields of a short run; `fields` replace top-level ones."""
        return {
            "steps": 6,
            "batch_size": 8,
            "threads": 1,
            "data": {"set": f"folder:{self.folder / 'images'}", "workers": 0, "crop_scale": [0.5, 1.0]},
            "split": {"shots": 2, "validation": "val"},
            "teacher": {"model": str(self.folder / "teacher.json")},
            "student": {"backbone": f"clip:{self.folder / 'student.json'}", "pretrained": False},
            "optim": {"lr": 1e-3, "warmup_steps": 2, "decay_all": True},
            "evaluation": {"every_steps": 2, "batch_size": 16},
            "log": {"every_steps": 1},
            "checkpoint": {"every_steps": 2},
            **fields,
        }

    def config(self, name: str, **fields: object) -> Path:
        """A YAML file of a short run."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.values(**fields)))
        return path

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """The run as a child process."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "projects.dho.train_student", *map(str, arguments)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.folder,
        )

    def finish(self, *arguments: object) -> tuple[int, str]:
        """Exit code and output of a whole run."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    def kill(self, when: Callable[[], bool], *arguments: object) -> None:
        """Start a run and kill it once `when` holds."""
        process = self.start(*arguments)
        deadline = time.monotonic() + 300
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0][-3000:]
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
