"""One step of each stage: contrast and distillation without labels, and fine-tuning with them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from projects.calico import export as exports
from projects.calico.config import CalicoConfig
from projects.calico.model import BevModel
from projects.calico.networks.boxes import Detections
from projects.calico.pretraining import PretrainStudent, Teacher, pretrain_losses
from vlmkd.config import RunConfig
from vlmkd.train.optim import half_cosine
from vlmkd.train.task import Batch, StepOutput, Task, combine
from vlmkd.train.timing import Stopwatch

_START, _LOWEST = 0.1, 1e-4
"""Shares of the peak rate at the start and at the end of one cycle (mmdetection3d's cyclic schedule)."""


class CalicoTask(Task):
    """What the stages share."""

    def __init__(
        self, cfg: CalicoConfig, student: PretrainStudent | BevModel, teacher: Teacher | None = None
    ) -> None:
        self.cfg, self.student, self.watch = cfg, student, Stopwatch()
        self.teachers: list[nn.Module] = [] if teacher is None else [teacher]
        self.model = student.model if isinstance(student, PretrainStudent) else student
        """What is exported."""

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        """One cycle where it is asked for: up to the peak along half a cosine, then down along another."""
        if not self.cfg.cycle:
            return super().lr_factor(step, cfg)
        top = max(1, round(self.cfg.cycle * cfg.steps))
        if step < top:
            return 1 + (_START - 1) * half_cosine(step / top)
        return _LOWEST + (1 - _LOWEST) * half_cosine((step - top) / max(1, cfg.steps - top))

    def items(self, batch: Batch) -> dict[str, float]:
        """Frames, and points of all views."""
        points = float(sum(len(view.points) for view in batch["lidar"]))
        return {"frames": len(batch["keys"]), "points": points}

    def tags(self) -> dict[str, str | int | float]:
        cfg, branches = self.cfg, ("lidar", "camera")
        return {
            "stage": cfg.stage,
            "modality": "+".join(name for name in branches if getattr(cfg.model, name).encoder != "none"),
            "start": "+".join(name for name in branches if getattr(cfg.init, name)) or "random",
            "fraction": cfg.data.fraction,
            "labels": "read" if cfg.reads_labels else "none",
        }

    def parameter_counts(self) -> dict[str, int]:
        return {"student": sum(p.numel() for p in self.model.parameters())}

    def predictor(self) -> BevPredictor:
        return BevPredictor(self.model)

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> BevModel:
        cfg, projectors = self.cfg, {}
        if cfg.stage != "finetune":
            weights, projectors = (
                {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
                for part in ("model.", "projectors.")
            )
        facts = self.tags() | {"arm": cfg.rad.arm if cfg.stage == "rad" else cfg.prc.arm}
        facts["teacher"] = cfg.rad.teacher_ckpt
        return exports.export(folder, self.model, weights, projectors, facts)

    def check_exports(self, written: dict[Path, BevModel]) -> None:
        exports.check(written)


class PretrainTask(CalicoTask):
    """PRC, RAD, or both at once. Labels are never read, but for the arm of RAD that is weighted by them."""

    def step(self, batch: Batch, step: int) -> StepOutput:
        """docs/papers/calico.md, eq. 1-6."""
        taught = None
        if self.teachers:
            with self.watch.span("teacher"):
                taught = self.teachers[0](batch)
        found = self.student(batch, taught)
        with self.watch.span("loss"):
            terms, metrics = pretrain_losses(self.cfg, found, batch)
            output = combine(terms, dict.fromkeys(terms, 1.0))
        output.metrics = metrics | {"dropped_points": batch["dropped_points"]}
        return output


class FinetuneTask(CalicoTask):
    """Boxes and maps from labels."""

    def step(self, batch: Batch, step: int) -> StepOutput:
        """The losses of the heads (docs/papers/calico.md#heads)."""
        found = self.student(batch["lidar"][0], batch.get("cameras"))
        model, terms = self.model, {}
        with self.watch.span("loss"):
            if model.detection is not None:
                terms |= model.detection.loss(found.detection, batch["boxes"], batch["labels"])
            if model.map is not None:
                terms |= model.map.loss(found.map, batch["masks"])
            output = combine(terms, dict.fromkeys(terms, 1.0))
        output.metrics = {"dropped_points": batch["dropped_points"]}
        return output


class BevPredictor:
    """A model that finds boxes and maps."""

    def __init__(self, model: BevModel) -> None:
        self.model = model

    @torch.no_grad()
    def predict(self, batch: Batch) -> tuple[list[Detections] | None, Tensor | None]:
        """Boxes of each frame, and probabilities [B, M, X, Y]; None for what the model has no head for."""
        model, before = self.model, self.model.training
        found = model.eval()(batch["lidar"][0], batch.get("cameras"))
        boxes = None if model.detection is None else model.detection.decode(found.detection)
        drawn = None if model.map is None else model.map.decode(found.map)
        model.train(before)
        return boxes, drawn
