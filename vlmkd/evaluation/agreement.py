"""How much a student answers like its teacher, whether right or wrong. N images, C classes, D embedding width."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmkd.datasets.evaluation_sets import LabelledImages
from vlmkd.evaluation.base import Context, DualEncoder, Result, gather_rows, require_protocol
from vlmkd.evaluation.images import embed_all
from vlmkd.evaluation.zero_shot import class_weights


class Agreement:
    """Zero-shot agreement of a predictor (the student) with `teacher` on the same images and prompts.

    Metrics: `agreement_top1`, the share of images with the same first class; `kl`, the mean over images of
    KL(teacher || student) in nats between their class distributions, each with its own logit scale;
    `affinity_correlation`, Pearson's r between the two N x C image-text cosine matrices.
    """

    name = "agreement"

    def __init__(self, teacher: DualEncoder, dataset: LabelledImages) -> None:
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
        return [Result(self.name, self.dataset.name, metrics, len(student), details)]

    def _affinity(self, predictor: DualEncoder, context: Context) -> tuple[Tensor, list[str]]:
        """Image-text cosines [N,C] of all ranks."""
        data = self.dataset
        title = f"{data.name}: {predictor.name}"
        weights = class_weights(predictor, data.class_names, data.templates, context, title=title)
        ids, rows, unreadable = embed_all(predictor, data.images, f"{title}: images", context)
        _, vectors = gather_rows(ids, rows)
        return vectors @ weights, unreadable


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
