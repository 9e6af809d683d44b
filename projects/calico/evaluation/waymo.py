"""Average precision in the way of Waymo: 3-D overlap, two levels of difficulty, and weighted by heading (APH).

Predictions are matched by falling score to the free box that they overlap most, at every score; Waymo's own tool matches
at 100 scores by the Hungarian method, so numbers are close to its, not the same. Letters: P predictions, G true boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from projects.calico.evaluation.detection import Boxes, Floats, Rows, match
from projects.calico.networks.boxes import overlaps
from vlmkd.results import share

OVERLAP = {"vehicle": 0.7, "pedestrian": 0.5, "cyclist": 0.5}
"""Least 3-D intersection over union of a match."""
HARD = "LEVEL_2"
"""Attribute of a box that people marked as hard; those with at most five points are hard too."""
MEANINGS = {
    name: share(name.replace("_", " ").upper(), main=name == "ap_l2")
    for name in ("ap_l1", "aph_l1", "ap_l2", "aph_l2")
}


def evaluate(predictions: Boxes, truth: Boxes, overlap: Mapping[str, float] = OVERLAP) -> dict[str, float]:
    """`MEANINGS`, means over the classes, and the same of each class (`vehicle_ap_l1`).

    Level 1 asks for the boxes that are not hard, where a match with a hard one is neither right nor wrong; level 2 for all.
    A true box without a point is not asked for at any level.
    """
    truth = truth.pick(truth.num_points != 0)
    found: dict[str, float] = {}
    for name, least in overlap.items():
        own, true = (boxes.pick(boxes.name == name) for boxes in (predictions, truth))
        own = own.pick(np.argsort(-own.score, kind="stable"))
        hard = (true.attribute == HARD) | (true.num_points <= 5)
        for level, asked in (("l1", ~hard), ("l2", np.ones(len(true), bool))):
            (matched,) = match(own, true, partial(_apart, own, true, least, asked), [0.0])
            right = matched >= 0
            counted, turn = np.ones(len(own), bool), np.zeros(len(own))
            counted[right] = asked[matched[right]]
            turn[right] = own.box[right, 6] - true.box[matched[right], 6]
            heading = 1 - np.abs((turn + math.pi) % (2 * math.pi) - math.pi) / math.pi
            for metric, value in (("ap", right), ("aph", right * heading)):
                found[f"{name}_{metric}_{level}"] = _area(value[counted], int(asked.sum()))
    return found | {mean: float(np.mean([found[f"{name}_{mean}"] for name in overlap])) for mean in MEANINGS}


def _apart(
    own: Boxes, true: Boxes, least: float, asked: NDArray[np.bool_], rows: Rows, targets: Rows
) -> Floats:
    """Below 0 for boxes that overlap enough; those that are asked for are taken before others."""
    said, there = torch.from_numpy(own.box[rows]), torch.from_numpy(true.box[targets])
    common = overlaps(said, there, height=True).numpy()
    return -np.where(common >= least, common + asked[targets], 0.0)


def _area(value: Floats | NDArray[np.bool_], asked: int) -> float:
    """Area under the highest precision from each recall on. `value` [P]: what each prediction adds, best score first."""
    if not asked or not len(value):
        return 0.0
    gained = np.cumsum(value)
    precision, recall = gained / np.arange(1, len(value) + 1), gained / asked
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * envelope).sum())
