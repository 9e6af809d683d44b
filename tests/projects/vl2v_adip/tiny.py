"""A tiny domain tree, teacher and configs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from vlmkd.export.clip import export_clip
from vlmkd.models.clip import load_clip

DOMAINS, CLASSES = ("ink", "oil", "photo"), ("cat", "dog", "red_fox")
TEACHER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def domain_tree(folder: Path, per_class: int = 7) -> Path:
    """Images whose colour says the class and whose noise says the domain."""
    rng = np.random.default_rng(0)
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate(CLASSES):
            (folder / domain / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.normal(128, 20 * (d + 1), (40, 32, 3))
                pixels[..., c] += 80
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(
                    folder / domain / name / f"{index}.png"
                )
    return folder


def export_teacher(folder: Path) -> None:
    """A random CLIP with weights on disk, so that every process has the same one."""
    (folder / "teacher.json").write_text(json.dumps(TEACHER))
    export_clip(folder / "teacher", load_clip(str(folder / "teacher.json"), seed=0))


def config(folder: Path, name: str = "base", **fields: object) -> Path:
    """A YAML file of a short run; `fields` replace top-level ones."""
    values = {
        "seed": 0,
        "threads": 1,
        "steps": 9,
        "batch_size": 6,
        "select_from_step": 1,
        "runs": str(folder / "runs"),
        "data": {
            "set": f"domains:{folder / 'tree'}",
            "workers": 0,
            "crop_scale": [0.7, 1.0],
            "color_jitter": 0.3,
        },
        "fold": {"test_domain": "oil"},
        "student": {"backbone": "timm:test_resnet", "pretrained": False, "image_size": 32},
        "teacher": {"model": f"local-dir:{folder / 'teacher'}"},
        "optim": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0},
        "evaluation": {"every_steps": 2, "phase": 1, "batch_size": 16},
        "log": {"every_steps": 1},
        "checkpoint": {"every_steps": 3},
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
