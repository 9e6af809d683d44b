"""The two training runs: prompts of the teacher by PromptSRC, and the student by PromptKD.

Letters: B images, C classes, D width of the teacher's embeddings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.promptkd.config import PromptKDConfig, StudentConfig, TeacherConfig
from projects.promptkd.gaussian import GaussianAverage
from projects.promptkd.objective import cosine_logits, epoch_cosine, promptsrc_terms
from projects.promptkd.precision import encode
from projects.promptkd.prompts import PromptedCLIP
from projects.promptkd.protocols import Protocol
from projects.promptkd.student import PromptedStudent, StudentLogits, as_classifier, student_classifier
from projects.promptkd.teacher import ImageTeacher, Teacher, export_teacher
from vlmkd.config import RunConfig
from vlmkd.data.labelled import LabelledSet
from vlmkd.evaluation.base import Result
from vlmkd.evaluation.classify import ZeroShotClassifier
from vlmkd.export.classifier import export_classifier, verify_classifiers
from vlmkd.export.folder import Probe, verify
from vlmkd.losses.logits import kl_divergence
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import ClipModel
from vlmkd.predictors import ImageClassifier
from vlmkd.train.selection import Best, using
from vlmkd.train.task import Batch, StepOutput, Task, combine, teacher_image_embeds
from vlmkd.train.timing import Stopwatch


class PromptTask(Task):
    """What both runs share."""

    cfg: PromptKDConfig
    core: nn.Module
    """The student without the engine's wrapper."""

    def __init__(self, cfg: PromptKDConfig, core: nn.Module, protocol: Protocol, epoch: int) -> None:
        """`epoch` is its number of steps."""
        self.cfg, self.core, self.protocol, self.epoch = cfg, core, protocol, epoch
        self.student = core
        self.teachers = []
        self.watch = Stopwatch()
        if cfg.select != "last":
            judged = protocol.test if cfg.select == "upstream" else protocol.validation
            assert judged is not None
            dataset, metric = judged.dataset, "top1" if cfg.select == "val" else protocol.selection_metric

            def score(results: list[Result]) -> float:
                (found,) = [result.metrics[metric] for result in results if result.dataset == dataset]
                return found

            self.selections = [Best("selected", score, tie="earlier")]

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        if self.cfg.optim.schedule != "epoch_cosine":
            return super().lr_factor(step, cfg)
        return epoch_cosine(step // self.epoch, math.ceil(cfg.steps / self.epoch), self.cfg.optim)

    def parameter_counts(self) -> dict[str, int]:
        counted = {"student": self.core} | {str(teacher.name): teacher for teacher in self.teachers}
        return {name: sum(p.numel() for p in module.parameters()) for name, module in counted.items()}


class TeacherNet(nn.Module):
    """A prompted CLIP with the training classes; one call does all."""

    tokens: Tensor
    frozen_vectors: Tensor

    def __init__(
        self, prompted: PromptedCLIP, tokens: Tensor, frozen_vectors: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        """`tokens` int64 [C,T] and `frozen_vectors` [C,D] are of the training classes."""
        super().__init__()
        self.prompted = prompted
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("frozen_vectors", frozen_vectors, persistent=False)
        self._dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B,3,H,W] -> unit vectors, fp32: images [B,D], classes [C,D], images by the frozen tower [B,D]."""
        image = encode(self.prompted.image, images, self._dtype)
        text = encode(self.prompted.text, self.tokens, self._dtype)
        with torch.no_grad():
            frozen_image = encode(self.prompted.image.tower, images, self._dtype)
        image, text, frozen_image = (F.normalize(x.float(), dim=-1) for x in (image, text, frozen_image))
        return image, text, frozen_image


class TeacherTask(PromptTask):
    """Stage 1: PromptSRC."""

    cfg: TeacherConfig
    core: TeacherNet

    def __init__(
        self,
        cfg: TeacherConfig,
        net: TeacherNet,
        clip: ClipModel,
        dataset: LabelledSet,
        protocol: Protocol,
        template: str,
        epoch: int,
    ) -> None:
        """`template` has room for the learned vectors."""
        super().__init__(cfg, net, protocol, epoch)
        self.clip, self.dataset, self.template = clip, dataset, template
        if cfg.average.std:
            self.average = GaussianAverage(cfg.steps // epoch, cfg.average.mean, cfg.average.std, epoch)

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch of labelled images."""
        image, text, frozen_image = self.student(batch["images"])
        labels, net = batch["labels"], self.core
        with self.watch.span("loss"):
            terms = promptsrc_terms(image, text, frozen_image, net.frozen_vectors, labels, net.prompted.scale)
            weights = {name: getattr(self.cfg.loss, name) for name in terms}
            used = {name: weight for name, weight in weights.items() if weight}
            output = combine({name: terms[name] for name in used}, used)
        output.metrics["accuracy"] = ((image @ text.T).argmax(dim=1) == labels).float().mean().detach()
        return output

    def _taught(self) -> Teacher:
        """The teacher with the prompts that it holds."""
        return Teacher(self.clip, self.core.prompted, self.template, "in training", "student")

    def predictor(self) -> ImageClassifier:
        return self._taught().classifier(self.dataset)

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> Probe:
        """Write the prompts and the name of the CLIP under them."""
        class_names = [self.dataset.class_names[index] for index in self.protocol.classes]
        with using(self.core, weights):
            return export_teacher(folder, self._taught(), self.cfg.clip, class_names)

    def check_exports(self, written: dict[Path, Probe]) -> None:
        verify("projects.promptkd.teacher", written)


class StudentTask(PromptTask):
    """Stage 2: PromptKD."""

    cfg: StudentConfig
    core: PromptedStudent

    def __init__(
        self,
        cfg: StudentConfig,
        student: PromptedStudent,
        clip: ClipModel,
        vectors: ClassVectors,
        protocol: Protocol,
        epoch: int,
        teacher: ImageTeacher | None,
        text: Callable[[], Tensor] | None = None,
    ) -> None:
        """`teacher`: None where its embeddings are stored; `text` computes the class vectors anew each step."""
        super().__init__(cfg, student, protocol, epoch)
        self.clip, self.vectors = clip, vectors
        self.teachers = [] if teacher is None else [teacher]
        self._rows, self._text = vectors.vectors, text

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch; labels are not read."""
        with self.watch.span("teacher"), torch.no_grad():
            if self._text is not None:
                self._rows = self._text()
            self._rows = self._rows.to(batch["images"].device)
            teacher_embeds, answered = teacher_image_embeds(
                batch, self.teachers[0] if self.teachers else None
            )
            teacher_logits = cosine_logits(teacher_embeds, self._rows, self.vectors.logit_scale)
        embeds = self.student(batch["images"])
        with self.watch.span("loss"):
            logits = cosine_logits(embeds, self._rows, self.core.scale)
            loss = self.cfg.loss
            # eq. 13 and 14 of docs/papers/promptkd.md
            kl = kl_divergence(
                logits, teacher_logits, loss.temperature, reduction=loss.reduction, mask=answered
            )
            output = combine({"kl": kl}, {"kl": loss.weight})
        agree = logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
        output.metrics["agreement"] = agree.float().mean().detach()
        return output

    def predictor(self) -> ImageClassifier:
        return student_classifier("student", self.core, self.vectors, self.clip.image_spec)

    def teacher_predictors(self) -> dict[str, Any]:
        return {teacher.name: ZeroShotClassifier(teacher, self.vectors) for teacher in self.teachers}

    def teacher_logits(self, embeds: Tensor) -> Tensor:
        return self.vectors.logits(embeds)

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> nn.Module:
        """Write the student with its class vectors as a classifier folder."""
        config, state = as_classifier(self.core, weights, self.clip, self.vectors)
        facts = {
            "teacher": self.vectors.teacher,
            "teacher_digest": self.vectors.teacher_digest,
            "class_vectors_digest": self.vectors.digest,
        }
        export_classifier(folder, config, state, provenance={"promptkd": facts})
        with using(self.core, weights):
            chosen = copy.deepcopy(self.core)
        chosen.autocast_dtype = None
        return StudentLogits(chosen, self.vectors)

    def check_exports(self, written: dict[Path, nn.Module]) -> None:
        verify_classifiers(written)
