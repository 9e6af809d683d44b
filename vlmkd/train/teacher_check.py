"""Does the teacher know the classes of the run, before anything is learned from it?"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vlmkd import distributed
from vlmkd.data.labelled import UNLABELLED, Item
from vlmkd.data.loader import Loader
from vlmkd.data.pipelines import ImagePipeline
from vlmkd.data.sources import ItemSource
from vlmkd.evaluation.base import Context, Evaluator, OfItems, spread
from vlmkd.evaluation.classify import Classification
from vlmkd.predictors import ImageClassifier
from vlmkd.train.task import Task

log = logging.getLogger(__name__)

_MOST_IMAGES = 256  # that the teacher is asked about
_FEWEST_IMAGES = 20  # with fewer, or fewer than half an image a class, nothing is said


def look_at_teachers(task: Task, evaluators: list[Evaluator], loader: Loader, context: Context) -> None:
    """Say how many labelled validation images each teacher, stored or loaded, knows; warn of one that guesses.

    A collective.
    """
    items = [item for one in evaluators if isinstance(one, OfItems) for item in one.items]
    if stored := _stored(loader, items):
        embeds, labels, name = stored
        if (logits := task.teacher_logits(embeds)) is not None:
            right = int((logits.cpu().argmax(1) == labels).sum())
            _tell(name, right, len(labels), logits.shape[1], task.without_teacher)
        return
    items = [*spread([item for item in items if item.label != UNLABELLED], _MOST_IMAGES)]
    for name, predictor in task.teacher_predictors().items() if items else ():
        if isinstance(predictor, ImageClassifier):
            judged = Classification(items, predictor.class_names, dataset="validation images")
            (result,) = judged.run(predictor, context)
            right = round(result.metrics["top1"] * result.count)
            _tell(name, right, result.count, len(predictor.class_names), task.without_teacher)


def hardly_knows(right: int, count: int, classes: int) -> bool:
    """Whether `right` of `count` is less than twice chance, or a tenth of the way from chance to all."""
    chance = 1 / classes
    enough = count >= min(_MOST_IMAGES, max(_FEWEST_IMAGES, classes // 2))
    return enough and right / count < min(2 * chance, chance + 0.1 * (1 - chance))


def _stored(loader: Loader, items: list[Item]) -> tuple[Tensor, Tensor, str] | None:
    """Stored vectors [images, width] and labels of validation images, else of training images; and whose."""
    source, pipeline = loader.source, loader.pipeline
    if not (isinstance(source, ItemSource) and isinstance(pipeline, ImagePipeline) and pipeline.stored):
        return None
    (stored,) = pipeline.stored[0]
    held = [item for item in items if item.key in stored] or source.labelled()
    entries = [(stored.get(item.key), item.label) for item in spread(held, _MOST_IMAGES)]
    rows = [(entry.columns["image_embeds"][0].float(), label) for entry, label in entries if entry]
    rows = [(row, label) for row, label in rows if row.any()]  # a masked answer is stored as zeros
    if not rows:
        return None
    embeds, labels = zip(*rows, strict=True)
    return torch.stack(embeds), torch.tensor(labels), f"teacher {stored.info.source} (stored)"


def _tell(name: str, right: int, count: int, classes: int, without: str) -> None:
    if not distributed.is_main() or right == count:  # the labels may be its own answers
        return
    log.info(
        "%s: %d of %d images right before the run (%.1f %%; guessing among %d classes: %.1f %%)",
        name, right, count, 100 * right / count, classes, 100 / classes,
    )  # fmt: skip
    if hardly_knows(right, count, classes):
        log.warning(
            "%s hardly knows these classes, and a student learns no more than it knows: stop here and name another "
            "teacher, other prompts or plainer class names%s",
            name, f", or learn from the labels alone ({without})" if without else "",
        )  # fmt: skip
