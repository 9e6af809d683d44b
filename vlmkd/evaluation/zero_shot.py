"""Zero-shot classification: images against the mean text embedding of each class's prompts.

B images, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd import distributed
from vlmkd.config import ZeroShotConfig
from vlmkd.datasets.evaluation_sets import LabelledImages, labelled
from vlmkd.evaluation import prompts
from vlmkd.evaluation.base import (
    Context,
    DualEncoder,
    ImageClassifier,
    Result,
    gather_rows,
    progress,
    rank_share,
    require_protocol,
)
from vlmkd.evaluation.images import ImageOutputs, embed_batches
from vlmkd.models.class_vectors import require_same_classes

LOGIT_SCALE = 100.0
"""Factor of the cosines; any positive one gives the same order. 100 is open_clip's."""
CLASSES_PER_BATCH = 10
"""Classes whose prompts are made and averaged together, as in open_clip."""
TOP_K = (1, 5)


class ZeroShot:
    """Top-1, top-5 and mean per-class accuracy; the class with the highest cosine is the prediction.

    A top-k with k >= C is left out. Ties are broken by torch.topk, as in open_clip.
    """

    name = "zero_shot"

    def __init__(self, dataset: LabelledImages) -> None:
        self.dataset = dataset

    @classmethod
    def from_config(cls, cfg: ZeroShotConfig) -> ZeroShot:
        """The evaluator of a run's or script's zero-shot set."""
        return cls(labelled(cfg.data, class_names=cfg.class_names, templates=cfg.templates, name=cfg.name))

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """Accuracies over all ranks; `details` has (right, seen) per class and the unreadable files.

        An ImageClassifier answers by its own logits instead, if its classes are those of the data set.

        Raises:
            UserError: neither protocol, or a classifier of other classes.
        """
        data = self.dataset
        stream, unreadable = self._logits(predictor, context)
        labels = torch.tensor(data.labels)
        ks = [k for k in TOP_K if k == 1 or k < len(data.class_names)]
        right = torch.zeros(len(ks), len(data.class_names), dtype=torch.long)
        seen = torch.zeros(len(data.class_names), dtype=torch.long)
        for indices, logits in stream:
            target = labels[indices]
            hits = topk_hits(logits, target.to(logits.device), ks).cpu()
            seen += torch.bincount(target, minlength=len(seen))
            for row, hit in enumerate(hits):
                right[row] += torch.bincount(target[hit], minlength=len(seen))
        right, seen = (torch.stack(distributed.gather_objects(part)).sum(0) for part in (right, seen))
        return [_result(data, ks, right, seen, unreadable())]

    def _logits(
        self, predictor: Any, context: Context
    ) -> tuple[Iterable[tuple[Tensor, Tensor]], Callable[[], list[str]]]:
        """(indices [b], logits [b,C]) of the images by batches, and what gives the unreadable ones afterwards."""
        data = self.dataset
        title = f"{data.name}: images"
        if isinstance(predictor, ImageClassifier):
            require_same_classes(predictor.class_names, data.class_names, f"model {predictor.name}")
            stream = ImageOutputs(predictor.classify, predictor.image_spec, data.images, title, context)
            return stream, stream.unreadable
        require_protocol(self.name, predictor, DualEncoder)
        weights = class_weights(predictor, data.class_names, data.templates, context, title=data.name)
        weights = weights.to(context.device)
        batches, unreadable = embed_batches(predictor, data.images, title, context)
        logits = ((ids, LOGIT_SCALE * vectors.to(context.device) @ weights) for ids, vectors in batches)
        return logits, lambda: unreadable


def class_weights(
    predictor: DualEncoder, class_names: list[str], templates: list[str], context: Context, title: str
) -> Tensor:
    """Classifier [D,C]: per class the mean of its prompts' unit vectors, made a unit vector again.

    Ranks share the classes; the result is the same on all of them.
    """
    share = rank_share(len(class_names))
    starts = range(0, len(share), CLASSES_PER_BATCH)
    rows = [torch.empty(0)]
    with torch.no_grad():
        for start in progress(starts, len(starts), f"{title}: classes", context):
            chunk = share[start : start + CLASSES_PER_BATCH]
            texts = [prompts.fill(template, class_names[index]) for index in chunk for template in templates]
            # Encoded in batches, because 10 classes times 80 templates take gigabytes in a wide text tower.
            pieces = [texts[at : at + context.batch_size] for at in range(0, len(texts), context.batch_size)]
            vectors = torch.cat([predictor.encode_text(piece).float() for piece in pieces])
            mean = vectors.reshape(len(chunk), len(templates), -1).mean(dim=1)
            rows.append(F.normalize(mean, dim=-1).cpu())
    _, weights = gather_rows(torch.tensor(list(share), dtype=torch.long), torch.cat(rows))
    return weights.T


def topk_hits(logits: Tensor, target: Tensor, ks: list[int]) -> Tensor:
    """Whether the target [B] is among the k highest of logits [B,C]: bool [len(ks), B]."""
    found = logits.topk(max(ks), dim=1).indices == target[:, None]
    return torch.stack([found[:, :k].any(dim=1) for k in ks])


def _result(
    data: LabelledImages, ks: list[int], right: Tensor, seen: Tensor, unreadable: list[str]
) -> Result:
    count = int(seen.sum())
    metrics = {f"top{k}": int(right[row].sum()) / count for row, k in enumerate(ks)}
    present = seen > 0
    metrics["mean_per_class"] = float((right[0][present].double() / seen[present]).mean())
    details: dict[str, Any] = {
        "classes": data.class_names,
        "per_class": [list(pair) for pair in zip(right[0].tolist(), seen.tolist(), strict=True)],
    }
    if unreadable:
        metrics["unreadable"] = float(len(unreadable))
        details["unreadable"] = unreadable
    return Result(ZeroShot.name, data.name, metrics, count, details)
