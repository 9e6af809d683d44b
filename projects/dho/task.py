"""One step of DHO: student on labelled and unlabelled images, frozen teacher, losses; and which weights count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projects.dho.config import DhoConfig
from projects.dho.gradients import Probe
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
from projects.dho.selection import HeadClassifier
from projects.dho.student import Student, StudentOutput
from projects.dho.teacher import Teacher
from vlmkd.config import RunConfig
from vlmkd.evaluation.base import Result
from vlmkd.export.classifier import export_classifier, verify_classifiers
from vlmkd.models.backbones import Backbone
from vlmkd.models.classifier import ClassifierConfig
from vlmkd.models.heads import DualLogits, TextClassifier, mix_heads
from vlmkd.models.towers import ClipTeacher, compute_dtype
from vlmkd.train.selection import Best
from vlmkd.train.task import Batch, StepOutput, Task, combine, teacher_image_embeds
from vlmkd.train.timing import Stopwatch

SCHEDULES = {"linear": linear, "warmup_times_cosine": warmup_times_cosine}


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
        self.student: nn.Module = student
        self.teacher = teacher
        self.teachers: list[nn.Module] = []
        if teacher is not None and teacher.clip is not None:
            self.teachers.append(ClipTeacher(teacher.clip, backbone.image_spec))
        self.watch = Stopwatch()
        self.mixture = Mixture(cfg.mixing.alpha, cfg.mixing.beta)
        if cfg.selection == "best":
            self.selections = [Best("best", _accuracy, tie="earlier")]
        self._surgery = cfg.loss.method == "pcgrad"
        self._probe = Probe(student) if cfg.grad_cosine_every or self._surgery else None
        self._weights = term_weights(cfg.loss.method, cfg.loss.ce_share, cfg.loss.balance)
        self._cosines: dict[str, float] = {}

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch: frozen teacher, student, losses."""
        labelled = int((batch["stream_ids"] == 0).sum()) if self.cfg.uses_labels else 0
        with self.watch.span("teacher"):
            embeds = valid = None
            if self.teacher is not None:
                embeds, valid = teacher_image_embeds(batch, self.teachers[0] if self.teachers else None)
        images = batch["images"].to(compute_dtype(self.core.backbone))
        output: StudentOutput = self.student(images, labelled)
        with self.watch.span("loss"):
            losses = partial(self._terms, batch["labels"], embeds, valid, labelled)
            terms = losses(output)
            due = self.cfg.grad_cosine_every and step % self.cfg.grad_cosine_every == 0
            if self._probe is not None and (due or self._surgery):
                factors = self._compare(lambda student: losses(student(batch["images"], labelled)))
                if self._surgery:
                    terms = {name: terms[name] * factors[name] for name in terms}
            combined = combine(terms, self._weights)
        # The last measurement is repeated until the next one, so that the log's averages are not diluted.
        combined.metrics = {name: combined.loss.new_tensor(value) for name, value in self._cosines.items()}
        return combined

    def _terms(
        self,
        labels: Tensor,
        teacher_embeds: Tensor | None,
        valid: Tensor | None,
        labelled: int,
        output: StudentOutput,
    ) -> dict[str, Tensor]:
        """`valid`: the rows [B] of which the teacher (a black box) said something; None: all."""
        terms: dict[str, Tensor] = {}
        if "ce" in self._weights:
            terms["ce"] = cross_entropy(output.ce_logits[:labelled], labels[:labelled])
        if self.teacher is None or teacher_embeds is None:
            return terms
        rows: Any = slice(None)
        if valid is not None and not valid.all():
            rows, labelled = valid, int(valid[:labelled].sum())
        target = teacher_embeds[rows]
        if "kd" in self._weights:
            logits = self.teacher.logits.to(target.device)(target)
            terms["kd"] = distillation(output.kd_logits[rows], logits, labelled, self.cfg.loss.temperature)
        if "feature" in self._weights:
            assert output.embeds is not None
            terms["feature"] = feature_distillation(output.embeds[rows], target, labelled)
        return terms

    def _compare(self, losses: Callable[[Student], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Measure how the two terms' gradients, weighted as in the loss, agree; returns PCGrad's factor of each term."""
        assert self._probe is not None

        def weighted(student: Student) -> list[Tensor]:
            terms = losses(student)
            return [terms[name] * weight for name, weight in self._weights.items()]

        found = self._probe(self.core, weighted)
        self._cosines = {f"gradient_cosine/{name}": float(part.cosine) for name, part in found.items()}
        factors = surgery_weights(*(found["backbone"] + found["heads"]))  # of all parameters together
        return dict(zip(self._weights, factors, strict=True))

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        own = SCHEDULES.get(cfg.optim.schedule)
        return own(step, cfg.steps, cfg.optim.warmup_steps) if own else super().lr_factor(step, cfg)

    def after_evaluation(self, results: list[Result], step: int) -> None:
        """The mixture of the validation images belongs to the weights that were evaluated last."""
        for result in results:
            if result.name == HEADS:
                self.mixture = replace(self.mixture, accuracy=result.metrics["top1"], **result.chosen)

    def state(self) -> dict[str, Any]:
        return {"mixture": list(astuple(self.mixture)), "cosines": dict(self._cosines)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.mixture = Mixture(*state["mixture"])
        self._cosines = dict(state["cosines"])

    def predictor(self) -> HeadClassifier:
        def answer(logits: DualLogits) -> Tensor:
            if not self.cfg.two_heads:
                return logits.ce
            return mix_heads(logits, self.mixture.alpha, self.mixture.beta)

        return HeadClassifier("student", self.backbone.image_spec, self.class_names, self.core.heads, answer)

    def teacher_predictors(self) -> dict[str, Any]:
        """A loaded teacher, whose one answer stands for both heads, so that it can be put beside the student."""
        teacher = self.teacher
        if teacher is None or teacher.clip is None:
            return {}

        @torch.no_grad()
        def heads(images: Tensor) -> DualLogits:
            embeds = self.teachers[0](images, own_statistics=True).image_embeds
            logits = teacher.logits.to(embeds.device)(embeds)
            return DualLogits(logits, logits)

        name, spec = f"teacher {teacher.source}", teacher.clip.image_spec
        return {name: HeadClassifier(name, spec, self.class_names, heads, lambda logits: logits.ce)}

    def teacher_logits(self, embeds: Tensor) -> Tensor | None:
        return None if self.teacher is None else self.teacher.logits(embeds)

    def parameter_counts(self) -> dict[str, int]:
        exported = self._exported(dict(self.core.named_parameters()))
        counts = {"student": sum(getattr(p, "ds_numel", p.numel()) for p in exported.values())}
        for name in self.teacher_predictors():
            counts[name] = sum(p.numel() for p in self.teachers[0].parameters())
        return counts

    def _exported(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Without a projector that only served the loss beside the head."""
        whole = isinstance(self.core.head, TextClassifier)
        return {name: value for name, value in weights.items() if whole or not name.startswith("projector.")}

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> nn.Module:
        """Write the student as a classifier folder."""
        weights = self._exported(weights)
        mixture = self.mixture
        head = self.core.head
        projector = self.core.projector if isinstance(head, TextClassifier) else None
        mix = (mixture.alpha, mixture.beta) if self.cfg.two_heads else None
        config = ClassifierConfig.of(self.backbone, head, projector, class_names=self.class_names, mix=mix)
        facts = {
            "method": self.cfg.loss.method,
            "validation_top1": mixture.accuracy,
            "selected_step": self.cfg.steps,
        }
        for best in self.selections:
            assert isinstance(best, Best)
            facts |= {"selected_step": best.step, "validation_top1": best.score}
        export_classifier(folder, config, weights, provenance={"dho": facts})
        model = config.build()
        model.load_state_dict(weights)
        return model

    def check_exports(self, written: dict[Path, Any]) -> None:
        verify_classifiers(written)


def _accuracy(results: list[Result]) -> float:
    (score,) = [result.metrics["top1"] for result in results if result.name == HEADS]
    return score
