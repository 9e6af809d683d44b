"""One step of DHO: student on labelled and unlabelled images, frozen teacher, losses; and which weights count.

Letters: B images of a batch (labelled first), C classes, D width of the teacher's embeddings.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projects.dho.config import DhoConfig
from projects.dho.gradients import Agreement, agreements
from projects.dho.mixing import Mixture
from projects.dho.objective import (
    cross_entropy,
    distillation,
    feature_distillation,
    surgery_weights,
    term_weights,
)
from projects.dho.schedules import linear, warmup_times_cosine
from projects.dho.selection import NAME as HEADS
from projects.dho.student import Student, StudentOutput
from projects.dho.teacher import Teacher
from vlmkd.config import RunConfig
from vlmkd.evaluation.base import Result
from vlmkd.export.classifier import export_classifier, verify_classifiers
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import Backbone
from vlmkd.models.classifier import ClassifierConfig
from vlmkd.models.heads import DualLogits, TextClassifier, mix_heads
from vlmkd.models.towers import ClipTeacher, compute_dtype, evaluating
from vlmkd.train.selection import Best
from vlmkd.train.task import Batch, StepOutput, Task, combine, teacher_image_embeds
from vlmkd.train.timing import Stopwatch


class DhoTask(Task):
    """DHO and its baselines; the difference is in the heads and in the weights of the terms."""

    without_teacher = "loss.method=ce"

    def __init__(
        self,
        cfg: DhoConfig,
        student: Student,
        backbone: Backbone,
        teacher: Teacher | None,
        class_names: list[str],
    ) -> None:
        """`backbone` describes the student's input; `teacher` is None for loss.method=ce."""
        self.cfg, self.core, self.backbone, self.class_names = cfg, student, backbone, class_names
        self.student = student
        self.teacher = teacher
        self.teachers: list[nn.Module] = []
        if teacher is not None and teacher.clip is not None:
            self.teachers.append(ClipTeacher(teacher.clip, backbone.image_spec))
        self.watch = Stopwatch()
        self.mixture = Mixture(cfg.mixing.alpha, cfg.mixing.beta)
        self._validated = (0, 0.0)  # step and accuracy
        if cfg.selection == "best":
            self.best = Best("best", _accuracy, tie="earlier")
            self.selections = [self.best]
        self._probe: Student | None = None
        if cfg.grad_cosine_every or cfg.loss.method == "pcgrad":
            self._probe = copy.deepcopy(student).float()
        self._weights = term_weights(cfg.loss.method, cfg.loss.ce_share, cfg.loss.balance)
        self._cosines: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------------ one step

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch: frozen teacher, student, losses."""
        labelled = int((batch["stream_ids"] == 0).sum()) if self.cfg.uses_labels else 0
        with self.watch.span("teacher"):
            embeds = valid = None
            if self.teacher is not None:
                embeds, valid = teacher_image_embeds(batch, self.teachers[0] if self.teachers else None)
                valid = None if valid is None or valid.all() else valid
        output: StudentOutput = self.student(batch["images"].to(compute_dtype(self.core.backbone)), labelled)
        with self.watch.span("loss"):
            terms = self._terms(batch, output, embeds, valid, labelled)
            metrics: dict[str, Tensor] = {}
            due = self.cfg.grad_cosine_every and step % self.cfg.grad_cosine_every == 0
            if due or self.cfg.loss.method == "pcgrad":
                found = self._agreements(batch, embeds, valid, labelled)
                if due:
                    self._cosines = {
                        f"gradient_cosine/{name}": float(part.cosine) for name, part in found.items()
                    }
                if self.cfg.loss.method == "pcgrad":
                    terms = self._surgery(terms, found)
            # The last measurement is repeated until the next one, so that the log's averages are not diluted.
            metrics |= {
                name: torch.tensor(value, device=output.ce_logits.device)
                for name, value in self._cosines.items()
            }
            combined = combine(terms, self._weights)
        combined.metrics = metrics
        return combined

    def _terms(
        self,
        batch: Batch,
        output: StudentOutput,
        embeds: Tensor | None,
        valid: Tensor | None,
        labelled: int,
    ) -> dict[str, Tensor]:
        """`valid`: the rows [B] of which the teacher (a black box) said something, where it is not all."""
        terms: dict[str, Tensor] = {}
        if "ce" in self._weights:
            terms["ce"] = cross_entropy(output.ce_logits[:labelled], batch["labels"][:labelled])
        if embeds is None:
            return terms
        assert self.teacher is not None
        rows: Any = slice(None)
        if valid is not None:
            rows, labelled = valid, int(valid[:labelled].sum())
        if "kd" in self._weights:
            teacher_logits = self.teacher.logits.to(embeds.device)(embeds[rows])
            terms["kd"] = distillation(
                output.kd_logits[rows], teacher_logits, labelled, self.cfg.loss.temperature
            )
        if "feature" in self._weights:
            assert output.embeds is not None
            terms["feature"] = feature_distillation(output.embeds[rows], embeds[rows], labelled)
        return terms

    def _agreements(
        self, batch: Batch, embeds: Tensor | None, valid: Tensor | None, labelled: int
    ) -> dict[str, Agreement]:
        """Of the cross entropy's gradient with the teacher's, weighted as in the loss, on this rank's images.

        On a copy of the student, because DeepSpeed takes every backward pass through its own modules for the step's.
        """
        assert self._probe is not None
        probe = self._probe.to(batch["images"].device)
        probe.load_state_dict(self.core.state_dict())
        probe.train(self.core.training)
        terms = self._terms(batch, probe(batch["images"], labelled), embeds, valid, labelled)
        weighted = [terms[name].float() * weight for name, weight in self._weights.items()]
        return agreements(weighted[0], weighted[1], dict(probe.parameter_groups()))

    def _surgery(self, terms: dict[str, Tensor], found: dict[str, Agreement]) -> dict[str, Tensor]:
        """Both terms with the factors that make their gradients PCGrad's sum, which counts all parameters together."""
        whole = found["backbone"] + found["heads"]
        factors = surgery_weights(whole.dot, whole.first_square, whole.second_square)
        return {name: terms[name] * factor for name, factor in zip(self._weights, factors, strict=True)}

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        """The released scripts' schedules beside the core's."""
        own = {"linear": linear, "warmup_times_cosine": warmup_times_cosine}.get(cfg.optim.schedule)
        return own(step, cfg.steps, cfg.optim.warmup_steps) if own else super().lr_factor(step, cfg)

    # ---------------------------------------------------------------------------------------- which weights are kept

    def after_evaluation(self, results: list[Result], step: int) -> None:
        """The mixture of the validation images belongs to the weights that were evaluated last."""
        for result in results:
            if result.name == HEADS:
                accuracy = result.metrics["top1"]
                self._validated = (step, accuracy)
                if result.chosen:
                    self.mixture = Mixture(result.chosen["alpha"], result.chosen["beta"], accuracy)

    def state(self) -> dict[str, Any]:
        """The mixture and the last measured cosines."""
        return {
            "validated": list(self._validated),
            "mixture": [self.mixture.alpha, self.mixture.beta, self.mixture.accuracy],
            "cosines": dict(self._cosines),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._validated = tuple(state["validated"])
        self.mixture = Mixture(*state["mixture"])
        self._cosines = dict(state["cosines"])

    # ------------------------------------------------------------------------------------------------ after training

    def predictor(self) -> DhoPredictor:
        """The student with the weights that it holds and the mixture that was found last."""
        return DhoPredictor(self)

    def teacher_predictors(self) -> dict[str, Any]:
        """The teacher as a classifier of its own pixels, where it is loaded."""
        if not self.teachers:
            return {}
        assert self.teacher is not None and self.teacher.clip is not None
        return {
            f"teacher {self.teacher.source}": TeacherPredictor(
                self.teacher, self.teachers[0], self.class_names
            )
        }

    def teacher_logits(self, embeds: Tensor) -> Tensor | None:
        """By class vectors or Tip-Adapter."""
        return None if self.teacher is None else self.teacher.logits(embeds)

    def parameter_counts(self) -> dict[str, int]:
        """Of the exported student and of a loaded teacher."""
        counts = {
            f"teacher {self.teacher.source}": sum(p.numel() for p in teacher.parameters())
            for teacher in self.teachers
            if self.teacher is not None
        }
        exported = [p for name, p in self.core.named_parameters() if self._is_exported(name)]
        return counts | {"student": sum(getattr(p, "ds_numel", p.numel()) for p in exported)}

    def _is_exported(self, name: str) -> bool:
        """Without a projector that only served the loss beside the head."""
        return not name.startswith("projector.") or isinstance(self.core.head, TextClassifier)

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> nn.Module:
        """Write the student as a classifier folder."""
        weights = {name: value for name, value in weights.items() if self._is_exported(name)}
        classifies = isinstance(self.core.head, TextClassifier)
        config = ClassifierConfig.of(
            self.backbone,
            self.core.head,
            self.core.projector if classifies else None,
            class_names=self.class_names,
            mix=(self.mixture.alpha, self.mixture.beta) if self.cfg.two_heads else None,
        )
        step, accuracy = (self.best.step, self.best.score) if self.selections else self._validated
        facts = {"method": self.cfg.loss.method, "selected_step": step, "validation_top1": accuracy}
        export_classifier(folder, config, weights, provenance={"dho": facts})
        model = config.build()
        model.load_state_dict(weights)
        return model

    def check_exports(self, written: dict[Path, Any]) -> None:
        """Compare the reloaded export with the weights that were written, in a fresh process."""
        verify_classifiers(written)


def _accuracy(results: list[Result]) -> float:
    """Right answers on the validation images."""
    (score,) = [result.metrics["top1"] for result in results if result.name == HEADS]
    return score


class DhoPredictor:
    """An ImageClassifier and, for the search, a HeadPredictor; it follows the task's weights and mixture."""

    name = "student"

    def __init__(self, task: DhoTask) -> None:
        self._task = task
        self.image_spec: ImageSpec = task.backbone.image_spec
        self.class_names = task.class_names

    def heads(self, images: Tensor) -> DualLogits:
        """Logits of both heads."""
        return self._logits(self._task.core, images)

    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, C], those of two heads mixed."""
        logits = self.heads(images)
        if not self._task.cfg.two_heads:
            return logits.ce
        return mix_heads(logits, self._task.mixture.alpha, self._task.mixture.beta)

    @staticmethod
    @torch.no_grad()
    def _logits(student: Student, images: Tensor) -> DualLogits:
        parameter = next(student.parameters())
        with evaluating(student):
            logits = student.logits(images.to(parameter.device, parameter.dtype))
        return DualLogits(logits.ce.float(), logits.kd.float())


class TeacherPredictor:
    """The teacher as an ImageClassifier."""

    def __init__(self, teacher: Teacher, tower: nn.Module, class_names: list[str]) -> None:
        assert teacher.clip is not None
        self.name, self.image_spec, self.class_names = teacher.source, teacher.clip.image_spec, class_names
        self._logits, self._tower = teacher.logits, tower

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        embeds = self._tower(images, own_statistics=True).image_embeds
        return self._logits.to(embeds.device)(embeds)

    def heads(self, images: Tensor) -> DualLogits:
        """Its one answer in the place of both heads, so that it can be put beside the student."""
        logits = self.classify(images)
        return DualLogits(logits, logits)
