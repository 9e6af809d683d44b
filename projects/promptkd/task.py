"""The two training runs: prompts of the teacher by PromptSRC, and the student by PromptKD.

Letters: B images, C classes, D width of the teacher's embeddings.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.promptkd.config import PromptKDConfig, StudentConfig, TeacherConfig
from projects.promptkd.exports import (
    TeacherFacts,
    clip_digest,
    probe_text,
    teacher_digest,
    verify,
    write_teacher,
)
from projects.promptkd.gaussian import GaussianAverage
from projects.promptkd.objective import cosine_logits, epoch_cosine, promptkd_loss, promptsrc_terms
from projects.promptkd.precision import encode
from projects.promptkd.prompts import PromptedCLIP, PromptedEncoder
from projects.promptkd.protocols import Protocol
from projects.promptkd.student import PromptedStudent, StudentClassifier, as_classifier
from projects.promptkd.teacher import ImageTeacher, Teacher
from vlmkd.config import RunConfig
from vlmkd.data.labelled import LabelledSet
from vlmkd.evaluation.base import Result
from vlmkd.evaluation.classify import ZeroShotClassifier
from vlmkd.export.classifier import export_classifier, verify_classifiers
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.models.clip import ClipModel
from vlmkd.predictors import ImageClassifier
from vlmkd.train.selection import Best, using
from vlmkd.train.task import Batch, StepOutput, Task, combine, teacher_image_embeds
from vlmkd.train.timing import Stopwatch

_PROBES = 2  # images by which an export is checked


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
            metric = protocol.selection_metric if cfg.select == "upstream" else "top1"
            score = functools.partial(_score, dataset=judged.dataset, metric=metric)
            self.selections = [Best("selected", score, tie="earlier")]

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        """By epochs, where the config asks for that."""
        if self.cfg.optim.schedule != "epoch_cosine":
            return super().lr_factor(step, cfg)
        return epoch_cosine(step // self.epoch, math.ceil(cfg.steps / self.epoch), self.cfg.optim)

    def _classifier(self, name: str) -> ImageClassifier:
        """The trained model with the weights that it holds now."""
        raise AssertionError(f"{type(self).__name__} does not define _classifier()")

    def predictor(self) -> ImageClassifier:
        """The model with the weights that it holds now."""
        return self._classifier("student")


# ---------------------------------------------------------------------------------------------------------- teacher


class TeacherNet(nn.Module):
    """A prompted CLIP with the training classes' prompts and their frozen class vectors: one call does all."""

    tokens: Tensor
    frozen_vectors: Tensor

    def __init__(
        self, prompted: PromptedCLIP, tokens: Tensor, frozen_vectors: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        """`tokens` int64 [C,T] and `frozen_vectors` [C,D] are of the training classes; `dtype` for the towers."""
        super().__init__()
        self.prompted = prompted
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("frozen_vectors", frozen_vectors, persistent=False)
        self._dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B,3,H,W] -> unit vectors, fp32: images [B,D], classes [C,D], images by the frozen tower [B,D]."""
        image, text = (
            F.normalize(encode(tower, inputs, self._dtype).float(), dim=-1)
            for tower, inputs in ((self.prompted.image, images), (self.prompted.text, self.tokens))
        )
        with torch.no_grad():
            frozen_image = encode(self.prompted.image.tower, images, self._dtype)
        return image, text, F.normalize(frozen_image.float(), dim=-1)


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
        """`template` is the prompt with room for the learned vectors."""
        super().__init__(cfg, net, protocol, epoch)
        self.clip, self.dataset, self.template = clip, dataset, template
        if cfg.average.std:
            self.average = GaussianAverage(cfg.steps // epoch, cfg.average.mean, cfg.average.std, epoch)

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch of labelled images."""
        image, text, frozen_image = self.student(batch["images"])
        with self.watch.span("loss"):
            scale = self.core.prompted.scale
            every = promptsrc_terms(
                image, text, frozen_image, self.core.frozen_vectors, batch["labels"], scale
            )
            terms = {name: term for name, term in every.items() if getattr(self.cfg.loss, name)}
            output = combine(terms, {name: getattr(self.cfg.loss, name) for name in terms})
            right = (image @ text.T).argmax(dim=1) == batch["labels"]
        output.metrics["accuracy"] = right.float().mean().detach()
        return output

    def _classifier(self, name: str) -> ImageClassifier:
        encoder = PromptedEncoder(self.core.prompted, self.clip, name)
        vectors = encode_classes(
            encoder,
            self.dataset.class_names,
            [self.template],
            teacher_digest="in training",
        )
        return ZeroShotClassifier(encoder, vectors)

    def parameter_counts(self) -> dict[str, int]:
        """Of the whole prompted CLIP."""
        return {"student": sum(parameter.numel() for parameter in self.core.parameters())}

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Write the prompts and the name of the CLIP under them."""
        prompts = {name: weights[f"prompted.{name}.prompts"] for name in self.core.prompted.prompts()}
        base = clip_digest(self.clip)
        facts = TeacherFacts(
            clip=self.cfg.clip,
            clip_digest=base,
            shape=self.core.prompted.shape,
            template=self.template,
            class_names=[self.dataset.class_names[index] for index in self.protocol.train_classes],
            digest=teacher_digest(base, prompts),
        )
        write_teacher(folder, prompts, facts)
        return {f"prompted.{name}.prompts": value for name, value in prompts.items()}

    def check_exports(self, written: dict[Path, dict[str, Tensor]]) -> None:
        """Compare the export, read in a fresh process, with the chosen prompts in this one."""
        images = _probe_images(self.clip.image_spec)
        for folder, prompts in written.items():
            with using(self.core, prompts):
                encoder = PromptedEncoder(self.core.prompted, self.clip, "teacher")
                expected = {
                    "image_embeds": encoder.encode_image(images),
                    "text_embeds": encoder.encode_text([probe_text(self.template)]),
                }
            verify(folder, images, expected)


# ---------------------------------------------------------------------------------------------------------- student


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
        teacher: Teacher | None,
        text: Callable[[], Tensor] | None = None,
    ) -> None:
        """`teacher` is None where its image embeddings are stored; `text` computes the class vectors anew each step."""
        super().__init__(cfg, student, protocol, epoch)
        self.clip, self.vectors, self._text = clip, vectors, text
        self._teacher: ImageTeacher | None = None
        if teacher is not None:
            self._teacher = ImageTeacher(teacher, clip.image_spec, student.autocast_dtype)
            self._teacher_name = f"teacher {teacher.source}"
            self.teachers = [self._teacher]
        self._rows = vectors.vectors

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch of images; labels are not read."""
        with self.watch.span("teacher"), torch.no_grad():
            rows = self._class_rows(batch["images"].device)
            teacher_embeds, answered = teacher_image_embeds(batch, self._teacher)
            teacher_logits = cosine_logits(teacher_embeds, rows, self.vectors.logit_scale)
        embeds = self.student(batch["images"])
        with self.watch.span("loss"):
            logits = cosine_logits(embeds, rows, self.core.scale)
            loss = self.cfg.loss
            terms = {"kl": promptkd_loss(logits, teacher_logits, loss.temperature, loss.reduction, answered)}
            output = combine(terms, {"kl": loss.weight})
        agree = logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
        output.metrics["agreement"] = agree.float().mean().detach()
        return output

    def _class_rows(self, device: torch.device) -> Tensor:
        if self._text is not None:
            return self._text().to(device)
        if self._rows.device != device:
            self._rows = self._rows.to(device)
        return self._rows

    def _classifier(self, name: str) -> ImageClassifier:
        return StudentClassifier(name, self.core, self.vectors, self.clip.image_spec)

    def teacher_predictors(self) -> dict[str, ImageClassifier]:
        """The teacher over the same class vectors, where it is loaded."""
        if self._teacher is None:
            return {}
        return {self._teacher_name: _TeacherClassifier(self._teacher_name, self._teacher, self.vectors)}

    def teacher_logits(self, embeds: Tensor) -> Tensor:
        """By the class vectors."""
        return self.vectors.logits(embeds)

    def parameter_counts(self) -> dict[str, int]:
        """Of the student and of the teacher's image tower."""
        counts = {"student": sum(parameter.numel() for parameter in self.core.parameters())}
        if self._teacher is not None:
            counts[self._teacher_name] = sum(parameter.numel() for parameter in self._teacher.parameters())
        return counts

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> nn.Module:
        """Write the whole student with its class vectors as a classifier folder."""
        config, state = as_classifier(self.core, weights, self.clip, self.vectors)
        facts = {
            "teacher": self.vectors.teacher,
            "teacher_digest": self.vectors.teacher_digest,
            "class_vectors_digest": self.vectors.digest,
        }
        export_classifier(folder, config, state, provenance={"promptkd": facts})
        with using(self.core, weights):
            return _Logits(self.core, self.vectors)

    def check_exports(self, written: dict[Path, nn.Module]) -> None:
        """Compare the export, read in a fresh process, with the chosen weights in this one."""
        verify_classifiers(written)


class _Logits(nn.Module):
    """images -> logits of a copy of a student, in fp32: what its export must say."""

    vectors: Tensor

    def __init__(self, student: PromptedStudent, vectors: ClassVectors) -> None:
        super().__init__()
        self.student = copy.deepcopy(student)
        self.student.autocast_dtype = None
        self.register_buffer("vectors", vectors.vectors)

    def forward(self, images: Tensor) -> Tensor:
        return cosine_logits(self.student(images), self.vectors, self.student.scale)


class _TeacherClassifier:
    """The frozen image tower with the class vectors, as an ImageClassifier."""

    def __init__(self, name: str, tower: ImageTeacher, vectors: ClassVectors) -> None:
        self.name, self.image_spec, self.class_names = name, tower.spec, vectors.class_names
        self._tower, self._vectors = tower, vectors

    def classify(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in the teacher's statistics -> logits [B,C]."""
        device = next(self._tower.parameters()).device
        return self._vectors.logits(self._tower(images.to(device), own_statistics=True))


def _probe_images(spec: ImageSpec) -> Tensor:
    return torch.randn(_PROBES, 3, *spec.size, generator=torch.Generator().manual_seed(20240403))


def _score(results: list[Result], *, dataset: str, metric: str) -> float:
    (score,) = [result.metrics[metric] for result in results if result.dataset == dataset]
    return score
