"""A few scenes of the toy world, and configs of runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from projects.calico.config import CalicoConfig
from projects.calico.synthdrive import write
from vlmkd import config

ROOT = Path(__file__).parents[3]
TOY = ROOT / "projects/calico/configs/toy"


def scenes(folder: Path, count: int = 6) -> Path:
    """A data set of so many scenes."""
    write(folder, count)
    return folder


def arguments(data: Path, *parts: str, **fields: Any) -> list[str]:
    """What a command of train_stage.py is given: the toy configs and small numbers; fields with __ for dots."""
    files = [str(TOY / f"{part}.yaml") for part in ("base", *parts)]
    small = {
        "data.info": data,
        "batch_size": 2,
        "steps": 2,
        "prc.n_rich": 48,
        "prc.n_less": 48,
        "run_dir": "r",
    }
    if "finetune" in parts:
        small |= {"data.fraction": 50, "evaluation.info": ""}
    small |= {name.replace("__", "."): value for name, value in fields.items()}
    return [*files, *(f"{name}={value}" for name, value in small.items())]


def load(data: Path, *parts: str, **fields: Any) -> CalicoConfig:
    """The config of such a command."""
    return config.load(CalicoConfig, arguments(data, *parts, **fields))


TOY_MODEL = load(ROOT, "prc").model
