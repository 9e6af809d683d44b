"""Map IoU against counting by hand; Waymo's AP against cases worked out on paper and against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial import ConvexHull, HalfspaceIntersection

from projects.calico.evaluation.detection import Boxes
from projects.calico.evaluation.map_iou import THRESHOLDS, MapIoU
from projects.calico.evaluation.waymo import HARD, evaluate


def test_map_iou_is_over_the_whole_set() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((5, 3, 8, 9)) < 0.3
    said = np.clip(truth * 0.3 + 0.6 * rng.random(truth.shape), 0, 1)
    found = MapIoU(("road", "walkway", "divider"))
    found.add(said[:2], truth[:2])
    for one, there in zip(said[2:], truth[2:], strict=True):
        found.add(one, there)
    iou = np.empty((3, len(THRESHOLDS)))
    for layer in range(3):
        for column, threshold in enumerate(THRESHOLDS):
            cells = list(zip((said[:, layer] >= threshold).ravel(), truth[:, layer].ravel(), strict=True))
            iou[layer, column] = cells.count((True, True)) / (len(cells) - cells.count((False, False)) + 1e-7)
    scores = found.scores()
    assert scores["miou"] == pytest.approx(iou.max(1).mean())
    assert scores["miou_at_50"] == pytest.approx(iou[:, 3].mean())
    assert scores["iou_divider"] == pytest.approx(iou[2].max())
    assert scores.keys() == found.meanings().keys()


def test_map_iou_of_nothing_is_zero_and_of_all_one() -> None:
    found = MapIoU(("road",))
    assert found.scores()["miou"] == 0
    found.add(np.ones((1, 4, 4)), np.ones((1, 4, 4), bool))
    assert found.scores()["miou"] == pytest.approx(1)


def boxes(rows: list[tuple[int, float, float, float]], **more: list) -> Boxes:
    """Vehicles of 4 x 2 x 1.5 m: (sample, x, yaw, score)."""
    box = [[x, 0, 0, 4, 2, 1.5, yaw, 0, 0] for _, x, yaw, _ in rows]
    return Boxes(
        np.array([row[0] for row in rows], dtype=np.int64), np.array(["vehicle"] * len(rows)), np.array(box, float).reshape(-1, 9),
        np.array(more.get("attribute", [""] * len(rows))), np.array([row[3] for row in rows], float), np.array(more.get("points", [9] * len(rows))),
    )  # fmt: skip


ONLY = {"vehicle": 0.7}


def test_waymo_average_precision() -> None:
    true = boxes([(0, 0, 0, 1), (0, 20, 0, 1), (1, 0, 0, 1), (1, 20, 0, 1)])
    # Right, wrong, right turned by 90 degrees too far (the overlap then is too small), right with its head behind.
    said = boxes([(0, 0.1, 0, 0.9), (0, 40, 0, 0.8), (1, 0, math.pi / 2, 0.7), (1, 20.1, math.pi, 0.6)])
    found = evaluate(said, true, ONLY)
    assert found["ap_l1"] == found["ap_l2"] == pytest.approx(0.25 * 1 + 0.25 * 0.5)
    assert found["aph_l1"] == pytest.approx(0.25)
    assert evaluate(true, true, ONLY)["aph_l2"] == pytest.approx(1)


def test_waymo_levels() -> None:
    """Hard boxes are asked for at level 2 alone; empty ones never; a match with a hard one does not count at level 1."""
    true = boxes(
        [(0, 0, 0, 1), (0, 20, 0, 1), (0, 40, 0, 1), (0, 60, 0, 1)],
        points=[9, 5, 9, 0],
        attribute=["", "", HARD, ""],
    )
    said = boxes([(0, 20, 0, 0.9), (0, 0, 0, 0.8), (0, 60, 0, 0.7)])
    found = evaluate(said, true, ONLY)
    assert found["ap_l1"] == pytest.approx(1)
    assert found["ap_l2"] == pytest.approx(2 / 3)


def test_waymo_overlap_is_that_of_volumes() -> None:
    """Pairs with an overlap just below and above 0.7, by an exact intersection of half-spaces."""
    rng = np.random.default_rng(3)
    true = boxes([(n, 0, 0, 1) for n in range(40)])
    said = boxes([(n, 0, 0, 1) for n in range(40)])
    said.box[:, :7] += rng.normal(0, [0.2, 0.1, 0.08, 0.3, 0.1, 0.1, 0.1], (40, 7))
    expected = [_overlap(a, b) >= 0.7 for a, b in zip(said.box, true.box, strict=True)]
    assert 5 < sum(expected) < 35
    found = [evaluate(said.pick(np.array([n])), true.pick(np.array([n])), ONLY)["ap_l1"] for n in range(40)]
    assert found == pytest.approx(np.array(expected, float))


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    def planes(box: np.ndarray) -> np.ndarray:
        axes = [[math.cos(box[6]), math.sin(box[6]), 0], [-math.sin(box[6]), math.cos(box[6]), 0], [0, 0, 1]]
        return np.array(
            [
                [*(s * np.array(axis)), -s * np.dot(axis, box[:3]) - size / 2]
                for axis, size in zip(axes, box[3:6], strict=True)
                for s in (1, -1)
            ]
        )

    corners = HalfspaceIntersection(
        np.concatenate([planes(first), planes(second)]), (first[:3] + second[:3]) / 2
    )
    common = ConvexHull(corners.intersections).volume
    return common / (first[3:6].prod() + second[3:6].prod() - common)
