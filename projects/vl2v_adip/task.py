"""One step of VL2V-ADiP or a baseline, the two selections of weights, and their exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projects.vl2v_adip.config import Vl2vConfig
from projects.vl2v_adip.folds import FACTS
from projects.vl2v_adip.miro import VARIANCES, MiroStudent, regulariser
from projects.vl2v_adip.objective import Targets, needs_images, objective
from projects.vl2v_adip.student import Student
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
"""Folder of the best weights, where SWAD's lie in `export`."""


class Vl2vTask(Task):
    """All stages and baselines; what is trained and the objective differ."""

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
        """`validation` names the source domains' out parts; `judged` loads the teacher to be evaluated."""
        self.cfg, self.core, self.exported, self.facts = cfg, student, exported, dict(facts)
        self.student: nn.Module = student
        self.teachers: list[nn.Module] = [] if teacher is None else [teacher]
        self.watch = Stopwatch()
        self._vectors, self._load_judged, names = vectors, judged, set(validation)

        def mean(metric: str, results: list[Result]) -> float:
            own = [result.metrics[metric] for result in results if result.dataset in names]
            assert len(own) == len(names), "every source domain is evaluated"
            return sum(own) / len(own)

        self.best = Best(BEST, partial(mean, "top1"), tie="later", after_step=cfg.select_from_step)
        self.valley: LossValley | None = None
        self.selections: list[Selection] = [self.best]
        if cfg.swad.enabled:
            self.valley = LossValley(cfg.swad, partial(mean, "loss"), buffers=not cfg.student.freeze_bn)
            self.best.folder = BEST_EXPORT
            self.selections.append(self.valley)

    def step(self, batch: Batch, step: int) -> StepOutput:
        images, miro = batch["images"], None
        variances = list(self.core.variances) if isinstance(self.core, MiroStudent) else []
        with self.watch.span("teacher"):
            targets = self._targets(batch)
            before = self.teachers[0](images) if variances else []
        embeds, logits, layers = self.student(images)
        with self.watch.span("loss"):
            if variances:
                miro = regulariser(layers, before, variances)
            found = combine(*objective(self.cfg.method, embeds, logits, targets, self.cfg.loss, miro))
        right = logits.detach().argmax(1) == targets.labels
        found.metrics = {"train_top1": right.float().mean()}
        return found

    @torch.no_grad()
    def _targets(self, batch: Batch) -> Targets:
        labels, known = batch["labels"], self._vectors
        if known is None:
            return Targets(labels)
        embeds: tuple[Tensor | None, Tensor | None] = (None, None)
        if needs_images(self.cfg.method, self.cfg.loss):
            embeds = teacher_image_embeds(batch, self.teachers[0] if self.teachers else None)
        return Targets(labels, known.vectors.to(labels.device), *embeds, logit_scale=known.logit_scale)

    def param_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """MIRO's variances learn ten times as fast, without decay."""
        if isinstance(self.core, MiroStudent):
            variances = ParamGroupConfig(match=f"^{VARIANCES}", lr=10 * optim.lr, weight_decay=0.0)
            optim = replace(optim, groups=[variances, *optim.groups])
        return super().param_groups(optim)

    def predictor(self) -> ClassifierPredictor:
        return ClassifierPredictor.of("student", self.core, self.exported)

    @cached_property
    def _judged(self) -> ClipModel | None:
        """The teacher to be evaluated, after training."""
        if self._load_judged is None:
            return None
        clip = self._load_judged()
        clip.module.to(next(self.core.parameters()).device)
        return clip

    def teacher_predictors(self) -> dict[str, Any]:
        if self._vectors is None or self._judged is None:
            return {}
        predictor = ClipPredictor.of(self._judged)
        return {f"teacher {self._judged.source}": ZeroShotClassifier(predictor, self._vectors)}

    def teacher_logits(self, embeds: Tensor) -> Tensor | None:
        return None if self._vectors is None else self._vectors.logits(embeds)

    def tags(self) -> dict[str, str | int | float]:
        return {name: self.facts[name] for name in ("set", "student", "method", "test_domain", "trial_seed")}

    def parameter_counts(self) -> dict[str, int]:
        models: dict[str, nn.Module] = {"student": self.exported.build()}
        if self._judged is not None:
            models[f"teacher {self._judged.source}"] = self._judged.module
        return {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> Classifier:
        state = {key: value for key, value in weights.items() if not key.startswith(VARIANCES)}
        best, valley = self.best, self.valley
        facts = self.facts | {"selection": name if best.weights() else "last step"}
        facts |= {"source_validation_top1": best.score, "best_step": best.step - 1}
        if valley is not None:
            facts |= {"converge_step": valley.converge_step, "dead_step": valley.dead_step}
        export_classifier(folder, self.exported, state, provenance={"vl2v_adip": facts})
        write_json(folder / FACTS, self.facts)
        model = self.exported.build()
        model.load_state_dict(state)
        return model

    def check_exports(self, written: dict[Path, Classifier]) -> None:
        verify_classifiers(written)
