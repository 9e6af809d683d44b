"""Class-balanced drawing, and a paste database that knows the labelled fraction alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from projects.calico.balance import NUSCENES_COUNTS, PasteDatabase, balanced
from projects.calico.evaluation.detection import NUSCENES
from projects.calico.geometry import points_in_boxes
from projects.calico.scenes import Frame, Labels
from projects.calico.splits import digest, fraction, nuscenes_scenes
from vlmkd.errors import UserError


def test_every_class_is_drawn_equally_often() -> None:
    names = [["car", "car"]] * 90 + [["car", "bus"]] * 8 + [["bicycle"]] * 2 + [[]] * 5
    found = balanced(names, 3)
    assert len(found) == 3 * round((98 + 8 + 2) / 3)
    classes = Counter(name for index in found for name in set(names[index]))
    assert classes["bus"] >= 36 and classes["bicycle"] == 36 and max(found) < 100
    assert (balanced(names, 3) == found).all() and (balanced(names, 4) != found).any()
    assert len(balanced([[], []], 0)) == 0


def frame(scene: str, token: str, at: list[tuple[float, float, str]], seed: int = 0) -> Frame:
    """Boxes of 4 x 2 x 2 m with 40 points each, and ground everywhere."""
    rng = np.random.default_rng(seed)
    boxes = np.array([[x, y, 0, 4, 2, 2, 0.3, 1, 0] for x, y, _ in at], np.float32).reshape(-1, 9)
    own = [box[:3] + rng.uniform(-0.6, 0.6, (40, 3)) for box in boxes]
    ground = rng.uniform([-30, -30, -0.5], [30, 30, 0.5], (4000, 3))
    points = np.pad(np.concatenate([*own, ground]), ((0, 0), (0, 2))).astype(np.float32)
    points[::2, 4] = 0.05
    labels = Labels(
        boxes, tuple(name for *_, name in at), np.full(len(at), 40), ("vehicle.parked",) * len(at)
    )
    return Frame(token, scene, "nuscenes", points, points[:, 4] == 0, labels=labels)


SCENES = fraction(nuscenes_scenes("train"), 5)
LABELLED = [
    frame(SCENES[0], "a", [(10, 0, "car"), (10, 10, "bus")], 1),
    frame(SCENES[1], "b", [(-10, 0, "car"), (-10, 12, "bicycle")], 2),
]


@pytest.fixture
def database(tmp_path: Path) -> PasteDatabase:
    """Written and read."""
    made = PasteDatabase.of(iter(LABELLED), SCENES)
    made.write(tmp_path / "paste.npy")
    read = PasteDatabase.read(tmp_path / "paste.npy", SCENES)
    assert (
        (read.names, read.scenes) == (made.names, made.scenes) == (("car", "bus", "car", "bicycle"), SCENES)
    )
    assert all(np.array_equal(one, other) for one, other in zip(read.points, made.points, strict=True))
    return read


def test_the_database_holds_the_labelled_fraction_alone(tmp_path: Path, database: PasteDatabase) -> None:
    held_back = next(name for name in nuscenes_scenes("train") if name not in SCENES)
    for other, told in (
        (
            frame(held_back, "c", [(0, 0, "car")]),
            f"frame c is of scene {held_back}, which is not among the 35 labelled ones",
        ),
        (replace(LABELLED[0], labels=None), "frame a has no labels"),
    ):
        with pytest.raises(UserError, match=told):
            PasteDatabase.of([*LABELLED, other], SCENES)
    ten = fraction(nuscenes_scenes("train"), 10)
    with pytest.raises(
        UserError,
        match=rf"made from 35 scenes \({digest(SCENES)}\), the run's labels are of 70 \({digest(ten)}\)",
    ):
        PasteDatabase.read(tmp_path / "paste.npy", ten)
    (tmp_path / "paste.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="paste.npy cannot be read"):
        PasteDatabase.read(tmp_path / "paste.npy", SCENES)
    listed = json.loads((tmp_path / "paste.json").read_text())
    assert listed["counts"] == [len(points) for points in database.points]


def test_objects_are_pasted_where_nothing_stands(database: PasteDatabase) -> None:
    target = frame("x", "t", [(10, 1, "car"), (25, 25, "pedestrian")], 7)
    found = database.paste(target, {"car": 3, "bus": 1, "bicycle": 1, "truck": 4}, np.random.default_rng(0))
    labels = found.labels
    assert labels is not None and target.labels is not None
    # The car at (10, 0) would stand in the one that is there; the bus, the other car and the bicycle fit.
    assert sorted(labels.names) == ["bicycle", "bus", "car", "car", "pedestrian"]
    assert (
        labels.names[:2] == target.labels.names
        and len(labels.boxes) == len(labels.num_points) == len(labels.attributes) == 5
    )
    inside = points_in_boxes(found.points, labels.boxes).numpy()
    for row in range(2, 5):
        source = next(n for n in range(4) if (database.boxes[n] == labels.boxes[row]).all())
        own = {bytes(point) for point in found.points[inside[:, row]]}
        assert own == {bytes(point) for point in database.points[source]} and labels.num_points[row] == len(
            database.points[source]
        )
    assert (found.key == (found.points[:, 4] == 0)).all()
    same = database.paste(target, {"car": 1, "pedestrian": 1}, np.random.default_rng(0))
    assert same is target


def test_counts_are_of_the_ten_classes() -> None:
    assert NUSCENES_COUNTS.keys() == NUSCENES.keys()
