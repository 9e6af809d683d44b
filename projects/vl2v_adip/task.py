"""One step of VL2V-ADiP or a baseline, the two selections of weights, and their exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projects.vl2v_adip.config import Vl2vConfig
from projects.vl2v_adip.folds import FACTS, tags_of
from projects.vl2v_adip.miro import VARIANCES, MiroStudent, regulariser
from projects.vl2v_adip.objective import Targets, needs_images, objective
from projects.vl2v_adip.student import Student, StudentOutput
from projects.vl2v_adip.valley import LossValley
from vlmkd.config import OptimConfig, ParamGroupConfig
from vlmkd.evaluation.base import Result
from vlmkd.evaluation.classify import ZeroShotClassifier
from vlmkd.export.classifier import export_classifier, verify_classifiers
from vlmkd.files import write_json
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.classifier import Classifier, ClassifierConfig, ClassifierPredictor
from vlmkd.models.clip import ClipModel
from vlmkd.models.towers import ClipPredictor
from vlmkd.train.selection import Best, Selection
from vlmkd.train.task import Batch, StepOutput, Task, combine, teacher_image_embeds
from vlmkd.train.timing import Stopwatch

BEST, SWAD = "best by source validation", "SWAD"
BEST_EXPORT = "export_iid"
"""Folder beside `export` with the best weights by source validation, where SWAD's lie in `export`."""


class Vl2vTask(Task):
    """All stages and baselines; they differ in what is trained and in the objective."""

    def __init__(
        self,
        cfg: Vl2vConfig,
        student: Student,
        exported: ClassifierConfig,
        facts: Mapping[str, Any],
        *,
        validation: list[str],
        teacher: nn.Module | None = None,
        vectors: ClassVectors | None = None,
        judged: Callable[[], ClipModel] | None = None,
    ) -> None:
        """`validation` names the source domains' out parts; `judged` gives the teacher to be evaluated."""
        self.cfg, self.core, self.exported, self.facts = cfg, student, exported, dict(facts)
        self.student: nn.Module = student
        self.teachers: list[nn.Module] = [] if teacher is None else [teacher]
        self.watch = Stopwatch()
        names = set(validation)
        self.best = Best(
            BEST, lambda results: _mean(results, names, "top1"), tie="later", after_step=cfg.select_from_step
        )
        self.valley: LossValley | None = None
        self.selections: list[Selection] = [self.best]
        if cfg.swad.enabled:
            self.valley = LossValley(
                cfg.swad, lambda results: _mean(results, names, "loss"), buffers=not cfg.student.freeze_bn
            )
            self.best.folder = BEST_EXPORT
            self.selections.append(self.valley)
        self._vectors, self._load_judged = vectors, judged

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch: frozen teacher, student, objective."""
        variances = list(self.core.variances) if isinstance(self.core, MiroStudent) else []
        with self.watch.span("teacher"):
            targets = self._targets(batch)
            before = self.teachers[0](batch["images"]) if variances else []
        output: StudentOutput = self.student(batch["images"])
        with self.watch.span("loss"):
            miro = regulariser(output.layers, before, variances) if variances else None
            parts = objective(self.cfg.method, output.embeds, output.logits, targets, self.cfg.loss, miro)
            combined = combine(*parts)
        right = output.logits.detach().argmax(1) == targets.labels
        combined.metrics = {"train_top1": right.float().mean()}
        return combined

    @torch.no_grad()
    def _targets(self, batch: Batch) -> Targets:
        labels = batch["labels"]
        if self._vectors is None:
            return Targets(labels)
        embeds: tuple[Tensor | None, Tensor | None] = (None, None)
        if needs_images(self.cfg.method, self.cfg.loss):
            embeds = teacher_image_embeds(batch, self.teachers[0] if self.teachers else None)
        vectors = self._vectors.vectors.to(labels.device)
        return Targets(labels, vectors, *embeds, logit_scale=self._vectors.logit_scale)

    def param_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """MIRO's variances learn ten times as fast, without decay."""
        if isinstance(self.core, MiroStudent):
            variances = ParamGroupConfig(match=f"^{VARIANCES}", lr=10 * optim.lr, weight_decay=0.0)
            optim = replace(optim, groups=[variances, *optim.groups])
        return super().param_groups(optim)

    def predictor(self) -> ClassifierPredictor:
        """The student with the weights that it holds."""
        return ClassifierPredictor.of("student", _Logits(self.core), self.exported)

    @cached_property
    def _judged(self) -> ClipModel | None:
        """The teacher as a model to be evaluated; only called after training."""
        clip = None if self._load_judged is None else self._load_judged()
        if clip is not None:
            clip.module.to(next(self.core.parameters()).device)
        return clip

    def teacher_predictors(self) -> dict[str, Any]:
        """The teacher as a zero-shot classifier."""
        if self._vectors is None or self._judged is None:
            return {}
        predictor = ClipPredictor.of(self._judged)
        return {f"teacher {self._judged.source}": ZeroShotClassifier(predictor, self._vectors)}

    def teacher_logits(self, embeds: Tensor) -> Tensor | None:
        """By the class vectors."""
        return None if self._vectors is None else self._vectors.logits(embeds)

    def tags(self) -> dict[str, str | int | float]:
        """The fold's facts."""
        return tags_of(self.facts)

    def parameter_counts(self) -> dict[str, int]:
        """Of the exported student (backbone, projector and head) and of an evaluated teacher."""
        counts = {"student": sum(p.numel() for p in self.exported.build().parameters())}
        if self._judged is not None:
            counts[f"teacher {self._judged.source}"] = sum(
                p.numel() for p in self._judged.module.parameters()
            )
        return counts

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> Classifier:
        """Write the student and the facts of its run as a classifier folder."""
        state = {key: value for key, value in weights.items() if not key.startswith(VARIANCES)}
        selection: dict[str, Any] = {"selection": name if self.best.weights() else "last step"}
        selection |= {"source_validation_top1": self.best.score, "best_step": self.best.step - 1}
        if self.valley is not None:
            selection |= {"converge_step": self.valley.converge_step, "dead_step": self.valley.dead_step}
        export_classifier(folder, self.exported, state, provenance={"vl2v_adip": {**self.facts, **selection}})
        write_json(folder / FACTS, self.facts)
        model = self.exported.build()
        model.load_state_dict(state)
        return model

    def check_exports(self, written: dict[Path, Classifier]) -> None:
        """Reload what was written in a fresh process."""
        verify_classifiers(written)


def _mean(results: list[Result], names: set[str], metric: str) -> float:
    """Mean over the source domains."""
    own = [result.metrics[metric] for result in results if result.dataset in names]
    assert len(own) == len(names), "every source domain is evaluated"
    return sum(own) / len(own)


class _Logits(nn.Module):
    """The student with a Classifier's output."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images).logits
