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
from vlmkd.files import new_file, read_object, write_text

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
        np.random.default_rng((seed, number)).choice(holders[name], round(total / len(holders)))
        for number, name in enumerate(sorted(holders))
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
        """From labelled frames, all of the given scenes."""
        boxes, names, attributes, points = [], [], [], []
        for frame in frames:
            labels, why = frame.labels, ""
            if labels is None:
                why = "has no labels"
            elif frame.scene not in scenes:
                why = f"is of scene {frame.scene}, which is not among the {len(scenes)} labelled ones"
            if labels is None or why:
                told = f"paste database: frame {frame.token} {why}"
                raise UserError(f"{told}; build it from the labelled fraction alone")
            inside = points_in_boxes(frame.points, labels.boxes).numpy()
            for row in np.flatnonzero(inside.sum(0) >= _FEWEST_POINTS):
                boxes.append(labels.boxes[row])
                names.append(labels.names[row])
                attributes.append(labels.attributes[row] if labels.attributes else "")
                points.append(frame.points[inside[:, row]])
        rows = np.array(boxes, np.float32).reshape(-1, 9)
        return cls(rows, tuple(names), tuple(attributes), points, tuple(scenes))

    def write(self, path: Path) -> None:
        """Write the points as an array and, beside it, the boxes as JSON."""
        with new_file(path, "paste database") as partial, partial.open("wb") as file:
            np.save(file, np.concatenate([np.empty((0, 5), np.float32), *self.points]))
        content = {name: getattr(self, name) for name in ("scenes", "boxes", "names", "attributes")}
        content |= {"boxes": self.boxes.tolist(), "counts": list(map(len, self.points))}
        write_text(path.with_suffix(".json"), json.dumps(content), "paste database")

    @classmethod
    def read(cls, path: Path, scenes: Sequence[str]) -> PasteDatabase:
        """Of the labelled scenes of the run, and no other; points stay on disk until they are pasted."""
        content = read_object(path.with_suffix(".json"), "paste database")
        made = content.get("scenes", [])
        if digest(made) != digest(scenes):
            told = f"was made from {len(made)} scenes ({digest(made)}), the run's labels are of {len(scenes)}"
            raise UserError(f"paste database {path} {told} ({digest(scenes)}); build it from these")
        ends = np.cumsum(content["counts"], dtype=np.int64)
        try:
            points = np.load(path, mmap_mode="r", allow_pickle=False)
            if len(points) != sum(content["counts"]):
                raise ValueError(f"it has {len(points)} points, its list another number")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"paste database {path} cannot be read ({error}); build it again") from None
        boxes = np.array(content["boxes"], np.float32).reshape(-1, 9)
        names, attributes = tuple(content["names"]), tuple(content["attributes"])
        return cls(boxes, names, attributes, np.split(points, ends[:-1]), tuple(made))

    def paste(self, frame: Frame, counts: Mapping[str, int], draw: np.random.Generator) -> Frame:
        """The frame with objects of each class up to `counts`, where nothing stands; real points within them are gone."""
        labels = frame.labels
        assert labels is not None
        kept: list[int] = []
        taken = torch.from_numpy(labels.boxes)
        for name, count in counts.items():
            rows = [row for row, own in enumerate(self.names) if own == name]
            wanted = max(0, min(count - labels.names.count(name), len(rows)))
            for row in draw.choice(rows, wanted, replace=False) if wanted else ():
                box = torch.from_numpy(self.boxes[row : row + 1])
                if not (overlaps(box, taken) > 0).any():
                    kept.append(int(row))
                    taken = torch.cat([taken, box])
        if not kept:
            return frame
        free = ~points_in_boxes(frame.points, self.boxes[kept]).numpy().any(1)
        pasted = np.concatenate([self.points[row] for row in kept])
        return replace(
            frame,
            points=np.concatenate([frame.points[free], pasted]),
            key=np.concatenate([frame.key[free], pasted[:, 4] == 0]),
            labels=Labels(
                boxes=taken.numpy(),
                names=labels.names + tuple(self.names[row] for row in kept),
                num_points=np.concatenate([labels.num_points, [len(self.points[row]) for row in kept]]),
                attributes=(labels.attributes or ("",) * len(labels.names))
                + tuple(self.attributes[row] for row in kept),
                masks=labels.masks,
            ),
        )
