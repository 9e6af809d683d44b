"""Run by test_runs.py under one or several processes: a few bf16 steps under masks, saved and restored."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from projects.tinyclip.build import mask_job
from projects.tinyclip.config import MaskConfig
from projects.tinyclip.masked import MaskedCLIP
from vlmkd import config, distributed
from vlmkd.train import engine
from vlmkd.train.trainer import to_device


def masks_of(model: MaskedCLIP) -> list[torch.Tensor]:
    """The deterministic masks of both towers."""
    return [value for masks in (model.image_masks, model.text_masks) for value in masks.deterministic()]


def main(argv: list[str]) -> None:
    """The masks that an evaluation sees are those of the exported weights, trained on and restored."""
    engine.start_ranks()
    torch.manual_seed(0)
    cfg = config.load(MaskConfig, argv)
    job = mask_job(cfg)
    around = engine.Engine(job.task, cfg)
    batches = iter(job.loader)
    for step in range(12):
        around.backward(job.task.step(to_device(next(batches), around.device), step).loss)
        around.update()
    seen = masks_of(job.task.masked)
    weights = around.student_weights()
    state = Path(cfg.run_dir) / "state"
    around.save(state)
    again = mask_job(cfg)
    restored = engine.Engine(again.task, cfg)
    restored.load(state)
    assert all(map(torch.equal, seen, masks_of(again.task.masked))), "restored"
    if weights is not None:
        exported = MaskedCLIP(job.task.masked.config)
        exported.load_state_dict(job.task._encoder_weights(weights))
        assert all(map(torch.equal, seen, masks_of(exported))), "exported"
        rounded = MaskedCLIP(job.task.masked.config).bfloat16()
        rounded.load_state_dict(job.task._encoder_weights(weights))
        assert not all(map(torch.equal, seen, masks_of(rounded))), "rounding would not matter here"
        print("MASKS AGREE", flush=True)
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
