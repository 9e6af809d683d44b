"""One step of each stage: contrast and distillation without labels, and fine-tuning with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from projects.calico import export as exports
from projects.calico.config import CalicoConfig, branches
from projects.calico.model import BevModel
from projects.calico.networks.boxes import Detections
from projects.calico.pretraining import PretrainStudent, Teacher, pretrain_losses
from vlmkd.config import RunConfig
from vlmkd.train.task import Batch, StepOutput, Task, combine
from vlmkd.train.timing import Stopwatch

_LOWEST, _START = 1e-4, 0.1
"""Shares of the peak rate at the end and at the start of one cycle (mmdetection3d's cyclic schedule)."""


class CalicoTask(Task):
    """What the stages share."""

    student: PretrainStudent | BevModel

    def __init__(
        self, cfg: CalicoConfig, student: PretrainStudent | BevModel, teacher: Teacher | None = None
    ) -> None:
        self.cfg, self.core, self.teacher = cfg, student, teacher
        self.student = student
        self.teachers: list[nn.Module] = [] if teacher is None else [teacher]
        self.watch = Stopwatch()

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        """One cycle where it is asked for: up to the peak along half a cosine, then down along another."""
        if not self.cfg.cycle:
            return super().lr_factor(step, cfg)
        top = max(1, round(self.cfg.cycle * cfg.steps))
        start, end, place = (_START, 1.0, step / top) if step < top else (
            1.0, _LOWEST, (step - top) / max(1, cfg.steps - top))  # fmt: skip
        return end + (start - end) * (1 + math.cos(math.pi * place)) / 2

    def items(self, batch: Batch) -> dict[str, float]:
        """Frames, and points of all views."""
        points = float(sum(len(view.points) for view in batch["lidar"]))
        return {"frames": len(batch["keys"]), "points": points}

    def tags(self) -> dict[str, str | int | float]:
        cfg = self.cfg
        names = {"lidar": cfg.model.lidar.encoder, "camera": cfg.model.camera.encoder}
        seen = "+".join(name for name, value in names.items() if value != "none")
        started = "+".join(name for name in ("lidar", "camera") if getattr(cfg.init, name)) or "random"
        own = {"stage": cfg.stage, "modality": seen, "start": started, "fraction": cfg.data.fraction}
        own["labels"] = "read" if cfg.reads_labels else "none"
        return own

    def parameter_counts(self) -> dict[str, int]:
        return {"student": sum(p.numel() for p in self.model.parameters())}

    @property
    def model(self) -> BevModel:
        """What is exported."""
        return self.core.model if isinstance(self.core, PretrainStudent) else self.core

    def predictor(self) -> BevPredictor:
        return BevPredictor("student", self.model)

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> BevModel:
        cfg, own, projectors = self.cfg, weights, {}
        model = cfg.model
        if isinstance(self.core, PretrainStudent):
            own, projectors = (
                {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
                for part in ("model.", "projectors.")
            )
            model = branches(
                model, lidar=self.core.model.lidar is not None, camera=self.core.model.camera is not None
            )
        facts = self.tags() | {"arm": cfg.rad.arm if cfg.stage == "rad" else cfg.prc.arm}
        facts["teacher"] = cfg.rad.teacher_ckpt
        return exports.export(folder, model, self.model, own, projectors, facts)

    def check_exports(self, written: dict[Path, BevModel]) -> None:
        exports.check(written)


class PretrainTask(CalicoTask):
    """PRC, RAD, or both at once. Labels are never read, but for the arm of RAD that is weighted by them."""

    def step(self, batch: Batch, step: int) -> StepOutput:
        """docs/papers/calico.md, eq. 1-6."""
        taught = None
        if self.teacher is not None:
            with self.watch.span("teacher"):
                taught = self.teacher(batch)
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
            weights = dict.fromkeys(terms, 1.0)
            if model.map is not None and (self.cfg.map_weight or not terms):
                terms |= model.map.loss(found.map, batch["masks"])
                weights["map"] = self.cfg.map_weight
            output = combine(terms, weights)
        output.metrics = {"dropped_points": batch["dropped_points"]}
        return output


class BevPredictor:
    """A model that finds boxes and maps."""

    def __init__(self, name: str, model: BevModel) -> None:
        self.name, self.model = name, model

    @torch.no_grad()
    def predict(self, batch: Batch) -> tuple[list[Detections] | None, Tensor | None]:
        """Boxes of each frame, and probabilities [B, M, X, Y]; None for what the model has no head for."""
        model = self.model
        with evaluating(model):
            found = model(batch["lidar"][0], batch.get("cameras"))
            boxes = None if model.detection is None else model.detection.decode(found.detection)
            return boxes, None if model.map is None else model.map.decode(found.map)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode inside."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)
