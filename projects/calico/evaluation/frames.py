"""Evaluation of a model on labelled frames: detection scores and map overlap, each with its unit, and submissions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from projects.calico.config import CalicoConfig, SceneEvaluationConfig
from projects.calico.evaluation import waymo
from projects.calico.evaluation.detection import (
    MEANINGS,
    NUSCENES,
    Boxes,
    Rules,
    attributes_of,
    evaluate,
    write_submission,
)
from projects.calico.evaluation.map_iou import MapIoU
from projects.calico.frames import open_frames
from projects.calico.model_config import ModelConfig
from projects.calico.networks.boxes import Detections
from projects.calico.pipeline import LabelledPipeline, evaluation_pipeline
from projects.calico.readers.nuscenes import NuScenesFrames, lidar2global, to_global, truth
from projects.calico.scenes import Frame
from vlmkd import distributed
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result, progress
from vlmkd.results import share
from vlmkd.train.task import Batch

FrameBoxes = tuple[np.ndarray, list[str], np.ndarray]
"""Boxes [k, 9], classes and scores of a frame, in its LiDAR frame."""
WAYMO_MEANINGS = {name: share(name.replace("_", " ").upper(), main=name == "ap_l2") for name in (
    "ap_l1", "aph_l1", "ap_l2", "aph_l2")}  # fmt: skip


class Predicts(Protocol):
    """What the evaluation asks of a model."""

    def predict(self, batch: Batch) -> tuple[list[Detections] | None, Tensor | None]:
        """Boxes of each frame, and probabilities [B, M, X, Y]."""
        ...


@dataclass(frozen=True)
class SceneEvaluation:
    """Boxes and maps of the same frames, from one pass."""

    pipeline: LabelledPipeline
    indices: Sequence[int]
    """Frames of the data set that are evaluated."""
    classes: Sequence[str]
    """That are scored."""
    dataset: str
    rules: Rules
    submission: Path | None = None
    """File for the boxes, in the format of the nuScenes server."""
    change: Callable[[Frame], Frame] | None = None
    """What is done to each frame before the model sees it."""
    name: str = "scenes"

    def run(self, predictor: Predicts, context: Context) -> list[Result]:
        """See `vlmkd.evaluation.base.Evaluator`; a result for each head that the model has."""
        counts = MapIoU(self.pipeline.layers)
        own: list[tuple[int, FrameBoxes | None, Any]] = []
        mine = list(distributed.rank_share(len(self.indices)))
        steps = range(0, len(mine), context.batch_size)
        for start in progress(steps, len(steps), self.dataset, context):
            numbers = mine[start : start + context.batch_size]
            frames = [(self._frame(self.indices[number]), self.indices[number]) for number in numbers]
            found = self.predicted(predictor, frames, context, counts)
            for place, (number, (frame, _)) in enumerate(zip(numbers, frames, strict=True)):
                boxes = None if found is None else self._named(found[place])
                own.append((number, boxes, self._truth(frame)))
        parts = distributed.gather_objects((own, counts.counts))
        rows = sorted((row for part, _ in parts for row in part), key=lambda row: row[0])
        counts.counts = sum(part for _, part in parts)
        results = []
        if rows and rows[0][1] is not None:
            results.append(self._detection([row[1] for row in rows], [row[2] for row in rows]))
        if self.pipeline.layers and counts.counts.any():
            scores = counts.scores()
            results.append(Result("map", self.dataset, scores, len(rows), meanings=counts.meanings()))
        return results

    def _frame(self, index: int) -> Frame:
        frame = self.pipeline.read(index)
        return frame if self.change is None else self.change(frame)

    def predicted(
        self,
        predictor: Predicts,
        frames: Sequence[tuple[Frame, int]],
        context: Context,
        counts: MapIoU | None = None,
    ) -> list[Detections] | None:
        """Boxes of each of the frames, which come with their indices; maps are added to `counts`."""
        from vlmkd.train.trainer import to_device

        batch = self.pipeline.collate([self.pipeline.prepare(*frame) for frame in frames])
        found, drawn = predictor.predict(to_device(batch, context.device))
        if drawn is not None and counts is not None:
            counts.add(drawn.cpu().numpy(), batch["masks"].numpy())
        return found

    def _named(self, found: Detections) -> FrameBoxes:
        """Of the classes that are scored, no more than the rules permit."""
        classes = self.pipeline.model.classes
        names = [classes[label] for label in found.labels.tolist()]
        kept = [row for row, name in enumerate(names) if name in self.classes][: self.rules.most_boxes]
        boxes, scores = (part.float().cpu().numpy()[kept] for part in (found.boxes, found.scores))
        return boxes, [names[row] for row in kept], scores

    @staticmethod
    def _truth(frame: Frame) -> tuple[Any, ...]:
        labels = frame.labels
        assert labels is not None
        return labels.boxes, labels.names, None, labels.attributes or None, labels.num_points

    def _detection(self, found: Sequence[Any], labels: Sequence[Any]) -> Result:
        frames = self.pipeline.frames
        if frames.kind == "waymo":
            numbers = waymo.evaluate(
                Boxes.stack((boxes, names, scores, None, None) for boxes, names, scores in found),
                Boxes.stack(labels, truth=True),
                {name: waymo.OVERLAP[name] for name in self.classes},
            )
            means = {name: value for name, value in numbers.items() if name in WAYMO_MEANINGS}
            return Result(
                "detection", self.dataset, means, len(found), {"classes": numbers}, meanings=WAYMO_MEANINGS
            )
        given: dict[str, Any] = {}
        true = Boxes.stack(labels, truth=True)
        if isinstance(frames, NuScenesFrames):
            records = [frames.records[index] for index in self.indices]
            true, ego, racks = truth(records)
            given = {"ego": ego, "racks": racks}
            found = [
                (to_global(boxes, lidar2global(record)), names, scores)
                for (boxes, names, scores), record in zip(found, records, strict=True)
            ]
        predicted = Boxes.stack(
            (boxes, names, scores, attributes_of(names, boxes[:, 7:9]), None)
            for boxes, names, scores in found
        )
        if self.submission is not None and distributed.is_main():
            seen = {"camera": self.pipeline.images, "lidar": self.pipeline.model.lidar.encoder != "none"}
            tokens = [frames.tokens[index] for index in self.indices]
            write_submission(self.submission, predicted, tokens, rules=self.rules, **seen)
        scores = evaluate(predicted, true, self.rules, **given)
        metrics = scores.metrics() | {f"ap_{name}": _ap(one) for name, one in scores.classes.items()}
        meanings = MEANINGS | {f"ap_{name}": share(f"AP {name.replace('_', ' ')}") for name in scores.classes}
        return Result(
            "detection", self.dataset, metrics, len(found), {"classes": scores.details()}, meanings=meanings
        )


def _ap(one: Any) -> float:
    return float(np.mean(list(one.ap.values())))


def rules_of(model: ModelConfig, options: SceneEvaluationConfig, kind: str) -> Rules:
    """nuScenes' own rules for its frames; else every box within the model's range counts."""
    classes = options.classes or model.classes
    if unknown := [name for name in classes if name not in model.classes]:
        raise UserError(
            f"config field evaluation.classes has {unknown[0]}; the model knows {', '.join(model.classes)}"
        )
    distances = tuple(options.distances)
    if kind == "nuscenes":
        if unknown := [name for name in classes if name not in NUSCENES.ranges]:
            raise UserError(
                f"config field evaluation.classes has {unknown[0]}, which nuScenes does not score"
            )
        chosen = NUSCENES.only(classes)
        return Rules(chosen.ranges, distances, most_boxes=chosen.most_boxes)
    reach = max(math.hypot(x, y) for x in model.range[::3] for y in model.range[1::3])
    return Rules(dict.fromkeys(classes, reach), distances)


def scene_evaluation(
    cfg: CalicoConfig,
    *,
    change: Callable[[Frame], Frame] | None = None,
    name: str = "",
    submission: Path | None = None,
) -> SceneEvaluation:
    """The evaluation that a config asks for; `name` of the data set: by default that of its path."""
    options, path = cfg.evaluation, Path(cfg.evaluation.info)
    frames = open_frames(path, Path(options.data_root) if options.data_root else None, sweeps=cfg.data.sweeps)
    indices = spread(len(frames.tokens), options.frames)
    pipeline = evaluation_pipeline(cfg, frames)
    classes = options.classes or cfg.model.classes
    rules = rules_of(cfg.model, options, frames.kind)
    return SceneEvaluation(pipeline, indices, classes, name or path.stem, rules, submission, change)


def spread(count: int, most: int) -> list[int]:
    """All indices, or `most` of them at equal distances."""
    return list(range(count)) if not most or most >= count else [n * count // most for n in range(most)]
