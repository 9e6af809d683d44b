"""How much a student answers like its teacher, whether right or wrong. N images, C classes, D embedding width."""

from __future__ import annotations

from typing import Any, ClassVar

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
        self.teacher = teacher
        self.dataset = dataset
        self._teacher_affinity: Tensor | None = (
            None  # kept, because one teacher is compared with several students
        )

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """Compare on the images that can be read; each model sees its own input size and statistics."""
        require_protocol(self.name, predictor, DualEncoder)
        if self._teacher_affinity is None:
            self._teacher_affinity, _ = self._affinity(self.teacher, context)
        student, unreadable = self._affinity(predictor, context)
        metrics = agreement(self._teacher_affinity, student, self.teacher.logit_scale, predictor.logit_scale)
        details = {"teacher": self.teacher.name, "unreadable": unreadable}
        return [Result(self.name, self.dataset.name, metrics, len(student), details, meanings=self.meanings)]

    def _affinity(self, predictor: DualEncoder, context: Context) -> tuple[Tensor, list[str]]:
        """Image-text cosines [N,C] of all ranks."""
        data = self.dataset
        title = f"{data.name}: {predictor.name}"
        classes = class_vectors(predictor, data.class_names, data.templates, title, context)
        images = [item.image for item in data.splits["test"]]
        _, vectors, unreadable = embeddings(predictor, images, f"{title}: images", context).gathered()
        return vectors @ classes.vectors.T, unreadable


def agreement(
    teacher: Tensor, student: Tensor, teacher_scale: float, student_scale: float
) -> dict[str, float]:
    """The three metrics from two cosine matrices [N,C]; a constant matrix has affinity_correlation 0."""
    log_p = (teacher_scale * teacher.double()).log_softmax(dim=1)
    log_q = (student_scale * student.double()).log_softmax(dim=1)
    centred = [matrix.double() - matrix.double().mean() for matrix in (teacher, student)]
    norm = centred[0].norm() * centred[1].norm()
    return {
        "agreement_top1": float((teacher.argmax(dim=1) == student.argmax(dim=1)).double().mean()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean()),
        "affinity_correlation": float((centred[0] * centred[1]).sum() / norm) if norm > 0 else 0.0,
    }
