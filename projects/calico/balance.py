"""Rare classes: frames drawn by class (CBGS), and objects of the labelled frames pasted into others.

Both know the labelled scenes alone: a database made from all labels would leak what a fraction holds back. Letters: n points,
k boxes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from projects.calico.geometry import points_in_boxes
from projects.calico.networks.boxes import overlaps
from projects.calico.scenes import Frame, Labels
from projects.calico.splits import digest
from vlmkd.errors import UserError
from vlmkd.files import new_file, read_object

NUSCENES_COUNTS = {
    "car": 2, "truck": 3, "construction_vehicle": 7, "bus": 4, "trailer": 6, "barrier": 2, "motorcycle": 6, "bicycle": 6,
    "pedestrian": 2, "traffic_cone": 2,
}  # fmt: skip
"""Objects of a class in a frame up to which BEVFusion pastes more."""
_FEWEST_POINTS = 5


def balanced(names: Sequence[Sequence[str]], seed: int) -> NDArray[np.int64]:
    """Indices of frames so drawn that every class is in an equal share of the draws (class-balanced grouping, CBGS).

    `names`: the classes of each frame. The sum over classes of the frames that hold one is divided equally, so an epoch is as
    many times longer as a frame has classes on average; its length is the result's.
    """
    holders: dict[str, list[int]] = {}
    for index, own in enumerate(names):
        for name in dict.fromkeys(own):
            holders.setdefault(name, []).append(index)
    total = sum(map(len, holders.values()))
    drawn = [
        np.random.default_rng((seed, number)).choice(frames, round(total / len(holders)))
        for number, (_, frames) in enumerate(sorted(holders.items()))
    ]
    return np.concatenate([np.empty(0, np.int64), *drawn])


@dataclass(frozen=True)
class PasteDatabase:
    """Boxes of the labelled scenes with their points, where they stood."""

    boxes: NDArray[np.float32]
    """[k,9]."""
    names: tuple[str, ...]
    attributes: tuple[str, ...]
    points: Sequence[NDArray[np.float32]]
    """Of each box, [n,5]."""
    scenes: tuple[str, ...]
    """That it was made from: its own, in order."""

    @classmethod
    def of(cls, frames: Iterable[Frame], scenes: Sequence[str]) -> PasteDatabase:
        """From labelled frames, all of the given scenes.

        Raises:
            UserError: a frame of another scene, or without labels.
        """
        boxes, names, attributes, points = [], [], [], []
        for frame in frames:
            labels = frame.labels
            if frame.scene not in scenes or labels is None:
                why = (
                    "has no labels"
                    if labels is None
                    else f"is of scene {frame.scene}, which is not among the {len(scenes)} labelled ones"
                )
                raise UserError(
                    f"paste database: frame {frame.token} {why}; build it from the labelled fraction alone"
                )
            inside = points_in_boxes(frame.points, labels.boxes).numpy()
            for row in np.flatnonzero(inside.sum(0) >= _FEWEST_POINTS):
                boxes.append(labels.boxes[row])
                names.append(labels.names[row])
                attributes.append(labels.attributes[row] if labels.attributes else "")
                points.append(frame.points[inside[:, row]])
        return cls(
            np.array(boxes, np.float32).reshape(-1, 9), tuple(names), tuple(attributes), points, tuple(scenes)
        )

    def write(self, path: Path) -> None:
        """Write the points as an array and, beside it, the boxes as JSON."""
        counts = [len(points) for points in self.points]
        with new_file(path, "paste database") as partial, partial.open("wb") as file:
            np.save(file, np.concatenate([np.empty((0, 5), np.float32), *self.points]))
        content = {
            "scenes": self.scenes,
            "boxes": self.boxes.tolist(),
            "names": self.names,
            "attributes": self.attributes,
            "counts": counts,
        }
        with new_file(path.with_suffix(".json"), "paste database") as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, path: Path, scenes: Sequence[str]) -> PasteDatabase:
        """Of the labelled scenes of the run; points stay on disk until they are pasted.

        Raises:
            UserError: it is missing, damaged or was made from other scenes.
        """
        content = read_object(path.with_suffix(".json"), "paste database")
        made = content.get("scenes", [])
        if digest(made) != digest(scenes):
            raise UserError(
                f"paste database {path} was made from {len(made)} scenes ({digest(made)}), the run's labels are of {len(scenes)}"
                f" ({digest(scenes)}); build it from these"
            )
        try:
            points = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"paste database {path} cannot be read ({error}); build it again") from None
        ends = np.cumsum(content["counts"])
        if len(points) != (ends[-1] if len(ends) else 0):
            raise UserError(
                f"paste database {path} has {len(points)} points, its list another number; build it again"
            )
        boxes = np.array(content["boxes"], np.float32).reshape(-1, 9)
        return cls(
            boxes,
            tuple(content["names"]),
            tuple(content["attributes"]),
            np.split(points, ends[:-1]),
            tuple(made),
        )

    def paste(self, frame: Frame, counts: Mapping[str, int], draw: np.random.Generator) -> Frame:
        """The frame with objects of each class up to `counts`, where nothing stands; real points within them are gone."""
        labels = frame.labels
        assert labels is not None
        chosen: list[int] = []
        for name, count in counts.items():
            rows = [row for row, own in enumerate(self.names) if own == name]
            wanted = min(count - labels.names.count(name), len(rows))
            chosen += draw.choice(rows, wanted, replace=False).tolist() if wanted > 0 else []
        taken = torch.from_numpy(labels.boxes)
        kept: list[int] = []
        for row in chosen:
            box = torch.from_numpy(self.boxes[row : row + 1])
            if not (overlaps(box, taken) > 0).any():
                kept.append(row)
                taken = torch.cat([taken, box])
        if not kept:
            return frame
        free = ~points_in_boxes(frame.points, self.boxes[kept]).numpy().any(1)
        clouds = [frame.points[free], *(np.asarray(self.points[row]) for row in kept)]
        key = np.ones(sum(map(len, clouds)), bool)
        key[: free.sum()] = frame.key[free]
        key[free.sum() :] = np.concatenate([cloud[:, 4] == 0 for cloud in clouds[1:]])
        attributes = labels.attributes or ("",) * len(labels.names)
        return replace(
            frame,
            points=np.concatenate(clouds),
            key=key,
            labels=Labels(
                boxes=np.concatenate([labels.boxes, self.boxes[kept]]),
                names=labels.names + tuple(self.names[row] for row in kept),
                num_points=np.concatenate([labels.num_points, [len(self.points[row]) for row in kept]]),
                attributes=attributes + tuple(self.attributes[row] for row in kept),
                masks=labels.masks,
            ),
        )
