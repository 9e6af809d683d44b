"""A stage's export: the branches that the next stage starts from, or a whole model, in one folder.

model.safetensors (see `model.load_pretrained`), model.yaml (its `ModelConfig`), provenance.json; before fine-tuning also
projectors.safetensors. `python -m projects.calico.export FOLDER PROBE ...` is the process that checks a run's own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projects.calico.geometry import image_augmentation
from projects.calico.model import BevModel, LidarInput, save_branches
from projects.calico.model_config import POINT, ModelConfig
from projects.calico.networks.lss import CameraInput
from projects.calico.pretraining import PROJECTORS, WEIGHTS
from vlmkd import config
from vlmkd.errors import UserError
from vlmkd.export import folder as files
from vlmkd.tensor_files import read_safetensors

MODEL = "model.yaml"


def export(
    folder: Path,
    model: BevModel,
    weights: Mapping[str, Tensor],
    projectors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> BevModel:
    """Write `weights` of a model, complete and by its names, and return it with them on the CPU."""
    with files.replacing(folder, [MODEL, files.PROVENANCE]) as partial:
        save_branches(partial / WEIGHTS, model, weights)
        (partial / MODEL).write_text(config.to_yaml(model.cfg), encoding="utf-8")
        if projectors:
            files.write_tensors(partial / PROJECTORS, projectors)
        files.write_provenance(partial / WEIGHTS, "CALICO", weights.values(), {"calico": dict(facts)})
    return load(folder)


def load(folder: Path) -> BevModel:
    """The model of an export, on the CPU, in eval mode."""
    if not (folder / MODEL).is_file():
        raise UserError(f"{folder} is no export of CALICO: it has no {MODEL}; name RUN/export")
    cfg = config.load(ModelConfig, [str(folder / MODEL)])
    model = BevModel(replace(cfg, camera=replace(cfg.camera, pretrained=False)))
    try:
        model.load_state_dict(read_safetensors(folder / WEIGHTS, what="export"))
    except RuntimeError as error:
        raise UserError(
            f"export {folder}: its weights are of another model ({error}); export again"
        ) from None
    return model.eval()


def probe_of(model: BevModel) -> files.Probe:
    """A random sweep and picture, and what the model makes of them."""
    make, cfg = torch.Generator().manual_seed(0), model.cfg
    low, high = torch.tensor(cfg.range[:3]), torch.tensor(cfg.range[3:])
    xyz = low + torch.rand(500, 3, generator=make) * (high - low)
    points = torch.cat([xyz, torch.rand(500, POINT - 3, generator=make)], 1)
    inputs = {"points": points, "images": torch.randn(1, 1, 3, *cfg.camera.image_size, generator=make)}
    return files.Probe(inputs, outputs(copy.deepcopy(model).cpu().float(), inputs))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every map that the model gives for a sweep and the picture of a camera that looks along x."""
    points, images = inputs["points"], inputs["images"]
    rows, columns = images.shape[-2:]
    pose = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    lens = torch.tensor([[columns / 2, 0, columns / 2], [0, columns / 2, rows / 2], [0, 0, 1]]).double()
    aug, still = image_augmentation(1.0, (0, 0), (rows, columns)), torch.eye(4).double()
    seen = CameraInput(images, lens[None, None], pose[None, None], aug[None, None], still[None])
    found = model.eval()(LidarInput(points, torch.zeros(len(points), dtype=torch.int64), 1), seen)
    heat = found.detection[0] if isinstance(found.detection, list) else found.detection
    maps = {
        "lidar": found.lidar,
        "camera": found.camera,
        "map": found.map,
        "heat": getattr(heat, "heat", None),
    }
    return {name: value for name, value in maps.items() if value is not None}


def check(written: Mapping[Path, BevModel]) -> None:
    """Load the folders in a fresh process and compare outputs."""
    files.verify("projects.calico.export", {folder: probe_of(model) for folder, model in written.items()})


if __name__ == "__main__":
    sys.exit(files.check_main(lambda folder, probe: outputs(load(folder), probe.inputs), sys.argv[1:]))
