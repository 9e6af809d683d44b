"""Tiny DHO runs on a tree of class folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.projects.zygote import Zygote
from vlmkd.export.clip import export_clip
from vlmkd.models.clip import load_clip

SCRIPT = "projects.dho.train_student"
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
    """Trains with configs in `folder`, where data, a teacher and a student's CLIP are; random ones, but with files."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.data, self._zygote = folder, f"folder:{folder / 'images'}", zygote
        write_images(folder / "images")
        for name, width, layers in (("teacher", 32, 2), ("student", 16, 1)):
            path = folder / f"{name}.json"
            path.write_text(json.dumps(clip_config(width, layers)))
            export_clip(folder / name, load_clip(str(path), seed=width))
        self.teacher, self.student = (f"local-dir:{folder / name}" for name in ("teacher", "student"))

    def values(self, **fields: object) -> dict:
        """The fields of a short run; `fields` replace top-level ones."""
        return {
            "steps": 6,
            "batch_size": 8,
            "threads": 1,
            "data": {"set": self.data, "workers": 0, "crop_scale": [0.5, 1.0]},
            "split": {"shots": 2, "validation": "val"},
            "teacher": {"model": self.teacher},
            "student": {"backbone": f"clip:{self.student}"},
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

    def train(self, config: Path, *overrides: str, verified: bool = False) -> tuple[int, str]:
        """Exit code and output of a whole run; `verified`: its export is reloaded in a fresh process, which takes seconds."""
        without = () if verified else ("projects.dho.task:verify_classifiers",)
        output = self.folder / f"{config.stem}.txt"
        return self._zygote.run(SCRIPT, [str(config), *overrides], output, without=without)

    def kill(self, when: Callable[[], bool], config: Path, *overrides: str) -> None:
        """Start a run and kill it once `when` holds."""
        self._zygote.kill(SCRIPT, [str(config), *overrides], self.folder / "killed.txt", when)
