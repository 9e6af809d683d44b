"""How much a student answers like its teacher, whether right or wrong. N images, C classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmkd.data.labelled import LabelledSet
from vlmkd.evaluation.base import Context, Result, require_protocol
from vlmkd.evaluation.images import class_vectors, embeddings
from vlmkd.predictors import DualEncoder
from vlmkd.results import Meaning, share


class Agreement:
    """Zero-shot agreement of a predictor (the student) with `teacher` on the same images and prompts.

    Metrics: `agreement_top1`, the share of images with the same first class; `kl`, the mean over images of
    KL(teacher || student) in nats between their class distributions, each with its own logit scale;
    `affinity_correlation`, Pearson's r between the two N x C image-text cosine matrices.
    """

    name = "agreement"
    meanings: ClassVar = {
        "agreement_top1": share("agreement top-1"),
        "kl": Meaning("KL", "nats", higher_is_better=False),
        "affinity_correlation": Meaning(higher_is_better=True),
    }

    def __init__(self, teacher: DualEncoder, dataset: LabelledSet) -> None:
        require_protocol(self.name, teacher, DualEncoder)
        self.teacher, self.dataset = teacher, dataset
        self._of_teacher: Tensor | None = None  # kept, because one teacher is compared with several students

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """See `Evaluator`; each model sees its own input size and statistics."""
        require_protocol(self.name, predictor, DualEncoder)
        if self._of_teacher is None:
            self._of_teacher, _ = self._affinity(self.teacher, context)
        student, unreadable = self._affinity(predictor, context)
        metrics = agreement(self._of_teacher, student, self.teacher.logit_scale, predictor.logit_scale)
        details = {"teacher": self.teacher.name, "unreadable": unreadable}
        return [Result(self.name, self.dataset.name, metrics, len(student), details, meanings=self.meanings)]

    def _affinity(self, predictor: DualEncoder, context: Context) -> tuple[Tensor, list[str]]:
        """Image-text cosines [N,C] of all ranks, and the unreadable images."""
        data, title = self.dataset, f"{self.dataset.name}: {predictor.name}"
        classes = class_vectors(predictor, data.class_names, data.templates, title, context)
        images = [item.image for item in data.splits["test"]]
        _, vectors, unreadable = embeddings(predictor, images, f"{title}: images", context)
        return vectors @ classes.vectors.T, unreadable


def agreement(
    teacher: Tensor, student: Tensor, teacher_scale: float, student_scale: float
) -> dict[str, float]:
    """The three metrics from two cosine matrices [N,C]; a constant matrix has affinity_correlation 0."""
    teacher, student = teacher.double(), student.double()
    log_p, log_q = (teacher_scale * teacher).log_softmax(dim=1), (student_scale * student).log_softmax(dim=1)
    correlation = torch.corrcoef(torch.stack([teacher.flatten(), student.flatten()]))[0, 1]
    return {
        "agreement_top1": float((teacher.argmax(dim=1) == student.argmax(dim=1)).double().mean()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean()),
        "affinity_correlation": float(correlation.nan_to_num()),
    }
