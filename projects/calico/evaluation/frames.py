"""Evaluation of a model on labelled frames: detection scores and map overlap, each with its unit, and submissions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from projects.calico.config import CalicoConfig, SceneEvaluationConfig
from projects.calico.evaluation import detection, waymo
from projects.calico.evaluation.detection import NUSCENES, Boxes
from projects.calico.evaluation.map_iou import MapIoU
from projects.calico.frames import open_frames
from projects.calico.model_config import ModelConfig
from projects.calico.networks.boxes import Detections
from projects.calico.pipeline import LabelledPipeline, evaluation_pipeline
from projects.calico.readers.nuscenes import NuScenesFrames, lidar2global, to_global, truth
from projects.calico.scenes import Frame
from vlmkd import distributed
from vlmkd.config import require
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result, progress, spread
from vlmkd.results import share
from vlmkd.train.task import Batch

FrameBoxes = tuple[np.ndarray, list[str], np.ndarray]
"""Boxes [k, 9], classes and scores of a frame, in its LiDAR frame."""


@dataclass(frozen=True)
class SceneEvaluation:
    """Boxes and maps of the same frames, from one pass of a predictor as `task.BevPredictor` is."""

    pipeline: LabelledPipeline
    indices: Sequence[int]
    """Frames of the data set that are evaluated."""
    dataset: str
    ranges: dict[str, float]
    """Classes that are scored, and to what distance."""
    distances: Sequence[float]
    submission: Path | None = None
    """File for the boxes, in the format of the nuScenes server."""
    change: Callable[[Frame], Frame] | None = None
    """What is done to each frame before the model sees it."""
    name: str = "scenes"

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """See `vlmkd.evaluation.base.Evaluator`; a result for each head that the model has."""
        counts = MapIoU(self.pipeline.layers)
        own: list[tuple[int, FrameBoxes | None, Any]] = []
        mine = list(distributed.rank_share(len(self.indices)))
        steps = range(0, len(mine), context.batch_size)
        for start in progress(steps, len(steps), self.dataset, context):
            numbers = mine[start : start + context.batch_size]
            frames = [self.pipeline.read(self.indices[number]) for number in numbers]
            frames = frames if self.change is None else [self.change(frame) for frame in frames]
            given = [(frame, self.indices[number]) for frame, number in zip(frames, numbers, strict=True)]
            found, maps = self.predicted(predictor, given, context)
            if maps is not None:
                counts.add(*maps)
            for place, (number, frame) in enumerate(zip(numbers, frames, strict=True)):
                labels = self._true(frame)
                own.append((number, None if found is None else self._named(found[place]), labels))
        parts = distributed.gather_objects((own, counts.counts))
        rows = sorted((row for part, _ in parts for row in part), key=lambda row: row[0])
        counts.counts = sum(part for _, part in parts)
        results = []
        if rows and rows[0][1] is not None:
            results.append(self._detection([row[1] for row in rows], [row[2] for row in rows]))
        if self.pipeline.layers and counts.counts.any():
            meanings = counts.meanings()
            results.append(Result("map", self.dataset, counts.scores(), len(rows), meanings=meanings))
        return results

    def predicted(
        self, predictor: Any, frames: Sequence[tuple[Frame, int]], context: Context
    ) -> tuple[list[Detections] | None, tuple[np.ndarray, np.ndarray] | None]:
        """Boxes of each of the frames, which come with their indices; and probabilities and truth of their maps."""
        from vlmkd.train.trainer import to_device

        batch: Batch = self.pipeline.collate([self.pipeline.prepare(*frame) for frame in frames])
        found, drawn = predictor.predict(to_device(batch, context.device))
        return found, None if drawn is None else (drawn.cpu().numpy(), batch["masks"].numpy())

    def _true(self, frame: Frame) -> Any:
        """What `Boxes.stack` takes of the true boxes whose centre lies on the map; of nuScenes its own rules choose."""
        true = frame.labels
        assert true is not None
        rows = np.flatnonzero(self.pipeline.inside(torch.from_numpy(true.boxes[:, :2])))
        attributes = [true.attributes[row] for row in rows] if true.attributes else None
        return true.boxes[rows], [true.names[row] for row in rows], None, attributes, true.num_points[rows]

    def _named(self, found: Detections) -> FrameBoxes:
        """Of the classes that are scored, no more than nuScenes permits."""
        names = [self.pipeline.model.classes[label] for label in found.labels.tolist()]
        kept = [row for row, name in enumerate(names) if name in self.ranges][: detection.MOST_BOXES]
        boxes, scores = (part.float().cpu().numpy()[kept] for part in (found.boxes, found.scores))
        return boxes, [names[row] for row in kept], scores

    def of_file(self, path: Path) -> Result:
        """The scores of a results file in the format of the nuScenes server, in the place of a model's boxes."""
        frames = self.pipeline.frames
        if not isinstance(frames, NuScenesFrames):
            raise UserError(f"--boxes {path} is a results file of nuScenes; name its frames by --info")
        tokens = frames.tokens
        true, ego, racks = truth(frames.records[index] for index in self.indices)
        found = detection.read_submission(path, [tokens[index] for index in self.indices])
        scores = detection.evaluate(found, true, self.ranges, self.distances, ego=ego, racks=racks)
        return self._result(scores, len(self.indices))

    def _detection(self, found: Sequence[FrameBoxes], labels: Sequence[Any]) -> Result:
        frames, given = self.pipeline.frames, {}
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
            (boxes, names, scores, detection.attributes_of(names, boxes[:, 7:9]), None)
            for boxes, names, scores in found
        )
        if self.submission is not None and distributed.is_main():
            seen = {"camera": self.pipeline.images, "lidar": self.pipeline.model.lidar.encoder != "none"}
            tokens = frames.tokens
            named = [tokens[index] for index in self.indices]
            detection.write_submission(self.submission, predicted, named, **seen)
        if frames.kind != "waymo":
            scores = detection.evaluate(predicted, true, self.ranges, self.distances, **given)
            return self._result(scores, len(found))
        numbers = waymo.evaluate(predicted, true, {name: waymo.OVERLAP[name] for name in self.ranges})
        metrics, details = {name: numbers[name] for name in waymo.MEANINGS}, {"classes": numbers}
        return Result("detection", self.dataset, metrics, len(found), details, meanings=waymo.MEANINGS)

    def _result(self, scores: detection.Scores, count: int) -> Result:
        metrics, meanings = scores.metrics(), dict(detection.MEANINGS)
        for name, one in scores.classes.items():
            metrics[f"ap_{name}"] = one.mean_ap
            meanings[f"ap_{name}"] = share(f"AP {name.replace('_', ' ')}")
        return Result(
            "detection", self.dataset, metrics, count, {"classes": scores.details()}, meanings=meanings
        )


def ranges_of(model: ModelConfig, options: SceneEvaluationConfig, kind: str) -> dict[str, float]:
    """nuScenes' own ranges for its frames; else every box within the model's range counts."""
    classes = options.classes or model.classes
    reach = max(math.hypot(x, y) for x in model.range[::3] for y in model.range[1::3])
    official = {"nuscenes": ("nuScenes", NUSCENES), "waymo": ("Waymo", dict.fromkeys(waymo.OVERLAP, reach))}
    whose, ranges = official.get(kind, ("", dict.fromkeys(model.classes, reach)))
    for name in classes:
        told = f"has {name}; the model knows {', '.join(model.classes)}"
        require(name in model.classes, "evaluation.classes", told)
        told = f"has {name}, which {whose} does not score; it scores {', '.join(ranges)}"
        require(name in ranges, "evaluation.classes", told)
    return {name: ranges[name] for name in classes}


def scene_evaluation(cfg: CalicoConfig, *, submission: Path | None = None) -> SceneEvaluation:
    """The evaluation that a config asks for."""
    options, path = cfg.evaluation, Path(cfg.evaluation.info)
    frames = open_frames(path, Path(options.data_root) if options.data_root else None, sweeps=cfg.data.sweeps)
    indices = spread(range(len(frames.tokens)), options.frames)
    ranges = ranges_of(cfg.model, options, frames.kind)
    pipeline = evaluation_pipeline(cfg, frames)
    return SceneEvaluation(pipeline, indices, path.stem, ranges, options.distances, submission)
