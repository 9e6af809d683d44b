"""One step of VL2V-ADiP or a baseline, the two selections of weights, and their exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from vlmkd.config import OptimConfig
from vlmkd.evaluation.base import Result
from vlmkd.evaluation.classify import ZeroShotClassifier
from vlmkd.export.classifier import export_classifier, verify_classifiers
from vlmkd.files import write_json
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.classifier import Classifier, ClassifierConfig
from vlmkd.models.clip import ClipModel
from vlmkd.models.towers import ClipPredictor, evaluating
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
        load_judged: Callable[[], ClipModel] | None = None,
    ) -> None:
        """`validation` are the names of the source domains' out parts; `facts` go into the exports.

        `load_judged` loads the teacher to be evaluated after training where its stored outputs train the student.
        """
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
            swad = cfg.swad
            self.valley = LossValley(
                n_converge=swad.n_converge,
                n_tolerance=swad.n_tolerance,
                tolerance_ratio=swad.tolerance_ratio,
                semantics=swad.semantics,
                segment_reset=swad.segment_reset,
                loss=lambda results: _mean(results, names, "loss"),
                buffers=not cfg.student.freeze_bn,
            )
            self.best.folder = BEST_EXPORT
            self.selections.append(self.valley)
        self._vectors = vectors
        self._load_judged = load_judged

    # ------------------------------------------------------------------------------------------------------ one step

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch: frozen teacher, student, objective."""
        with self.watch.span("teacher"):
            targets = self._targets(batch)
            before: list[Tensor] = []
            if isinstance(self.core, MiroStudent):
                before = self.teachers[0](batch["images"])
        output: StudentOutput = self.student(batch["images"])
        loss = self.cfg.loss
        with self.watch.span("loss"):
            miro = None
            if isinstance(self.core, MiroStudent):
                miro = regulariser(output.layers, before, list(self.core.variances))
            terms, weights = objective(
                self.cfg.method,
                output.embeds,
                output.logits,
                targets,
                image_weight=loss.image_weight,
                kd_weight=loss.kd_weight,
                temperature=loss.temperature,
                legacy_kl=loss.legacy_kl,
                miro=miro,
                miro_weight=loss.miro_weight,
            )
            combined = combine(terms, weights)
        right = output.logits.detach().argmax(1) == targets.labels
        combined.metrics = {"train_top1": right.float().mean()}
        return combined

    @torch.no_grad()
    def _targets(self, batch: Batch) -> Targets:
        labels = batch["labels"]
        if self._vectors is None:
            return Targets(labels)
        targets = Targets(
            labels, self._vectors.vectors.to(labels.device), logit_scale=self._vectors.logit_scale
        )
        if not needs_images(self.cfg.method, self.cfg.loss.image_weight):
            return targets
        teacher = self.teachers[0] if self.teachers else None
        targets.image_embeds, targets.valid = teacher_image_embeds(batch, teacher)
        return targets

    # --------------------------------------------------------------------------------------------- selecting weights

    def param_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """MIRO's variances learn ten times as fast, without decay."""
        groups = super().param_groups(optim)
        if isinstance(self.core, MiroStudent):
            own = list(self.core.variances)
            kept = [{**g, "params": [p for p in g["params"] if all(p is not v for v in own)]} for g in groups]
            variances = {"name": "variances", "params": own, "lr": 10 * optim.lr, "weight_decay": 0.0}
            groups = [*(group for group in kept if group["params"]), variances]
        return groups

    # ------------------------------------------------------------------------------------------------ after training

    def predictor(self) -> StudentPredictor:
        """The student with the weights that it holds."""
        return StudentPredictor("student", self.core, self.exported)

    @cached_property
    def _judged(self) -> ClipModel | None:
        """The teacher as a model to be evaluated; only called after training."""
        if self.teachers:
            teacher: Any = self.teachers[0].clip
            return teacher
        if self._load_judged is None:
            return None
        clip = self._load_judged()
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
        for name in self.teacher_predictors():
            assert self._judged is not None
            counts[name] = sum(parameter.numel() for parameter in self._judged.module.parameters())
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


class StudentPredictor:
    """The student as an ImageClassifier."""

    def __init__(self, name: str, core: Student, config: ClassifierConfig) -> None:
        self.name, self.image_spec, self.class_names = name, config.image_spec, config.class_names
        self._core = core

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """images [B, 3, h, w] in `image_spec`'s statistics -> logits [B, C], fp32."""
        with evaluating(self._core):
            return self._core(images.to(next(self._core.parameters()).device)).logits.float()
