"""NDS, mAP and the five true-positive errors of the nuScenes detection task (its configuration detection_cvpr_2019).

Equal to nuscenes-devkit 1.2.0 to 1e-6 (tests/golden/nuscenes_devkit.json). Pure NumPy. Letters: S samples, P
predictions, G true boxes, T matching distances.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmkd.errors import UserError, did_you_mean
from vlmkd.files import read_object, write_text
from vlmkd.results import Meaning, share

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]
ATTRIBUTES = (
    "pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing", "cycle.with_rider",
    "cycle.without_rider", "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip
ERRORS = ("ate", "ase", "aoe", "ave", "aae")
"""Of translation (m), scale (1 - IoU), orientation (rad), velocity (m/s), attribute (1 - share right)."""
_MISSING = {"traffic_cone": ("aoe", "ave", "aae"), "barrier": ("ave", "aae")}
"""Errors that a class does not have."""
_HALF_TURN = ("barrier",)
"""Classes whose front is not told from their back."""
_TWO_WHEELED = ("bicycle", "motorcycle")
_PARKED = ("vehicle.parked", "vehicle.moving")
_ATTRIBUTE_OF = {
    "car": _PARKED, "truck": _PARKED, "trailer": _PARKED, "construction_vehicle": _PARKED,
    "bus": ("vehicle.stopped", "vehicle.moving"), "pedestrian": ("pedestrian.standing", "pedestrian.moving"),
} | dict.fromkeys(_TWO_WHEELED, ("cycle.without_rider", "cycle.with_rider"))  # fmt: skip
"""Class -> attribute when it stands and when it moves, as mmdetection3d fills them in."""
_MOVING_SPEED = 0.2  # m/s
_ERROR_DISTANCE = 2.0  # m, of the matches that the errors are of
MOST_BOXES = 500
RECALLS = np.linspace(0, 1, 101)
_FIRST = 11  # recalls up to 0.10 are noisy and left out
_MIN_PRECISION = 0.1


NUSCENES: dict[str, float] = (
    dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), 50.0)
    | dict.fromkeys(("pedestrian", "motorcycle", "bicycle"), 40.0)
    | dict.fromkeys(("traffic_cone", "barrier"), 30.0)
)
"""Class -> metres from the ego vehicle from which on its boxes, true or predicted, do not count."""
DISTANCES = (0.5, 1.0, 2.0, 4.0)
"""Of centres on the ground, in metres, below which a prediction is right; AP is the mean over them."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of many samples in the order of their file, in any frame that predictions, truth and ego share."""

    sample: NDArray[np.int64]
    """[N]: index of the sample."""
    name: NDArray[np.str_]
    """[N]: class."""
    box: Floats
    """[N,9]: x, y, z of the centre, l, w, h, yaw, vx, vy in m, rad and m/s; an unknown velocity is NaN."""
    attribute: NDArray[np.str_]
    """[N]; "" where there is none."""
    score: Floats
    """[N]; 1 for true boxes."""
    num_points: NDArray[np.int64]
    """[N]: LiDAR and radar points within a true box; -1 for predictions."""

    @classmethod
    def stack(
        cls,
        samples: Iterable[tuple[Any, Sequence[str], Any, Sequence[str] | None, Any | None]],
        *,
        truth: bool = False,
    ) -> Boxes:
        """From (boxes [k,7 or 9], names, scores or None, attributes or None, numbers of points or None) a sample."""
        none, words, numbers = np.empty((0, 9)), np.empty(0, np.str_), np.empty(0, np.int64)
        parts = [cls(numbers, words, none, words, np.empty(0), numbers)]
        for number, (boxes, names, scores, attributes, counts) in enumerate(samples):
            size = len(names)
            boxes = np.asarray(boxes, np.float64).reshape(size, -1) if size else none
            parts.append(
                cls(
                    np.full(size, number),
                    np.array(names, np.str_),
                    np.pad(boxes, ((0, 0), (0, 9 - boxes.shape[1])), constant_values=np.nan),
                    np.array([""] * size if attributes is None else attributes, np.str_),
                    np.ones(size) if scores is None else np.asarray(scores, np.float64),
                    np.full(size, 1 if truth else -1) if counts is None else np.asarray(counts, np.int64),
                )
            )
        return cls(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))

    def __len__(self) -> int:
        return len(self.sample)

    def pick(self, which: NDArray[Any]) -> Boxes:
        """Those of a mask or of indices."""
        return Boxes(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ClassScores:
    """One class."""

    ap: dict[float, float]
    """By matching distance."""
    errors: dict[str, float]
    """NaN for those that the class does not have."""
    num_truth: int
    num_predictions: int

    @property
    def mean_ap(self) -> float:
        return float(np.mean(list(self.ap.values())))


@dataclass(frozen=True)
class Scores:
    """All classes."""

    classes: dict[str, ClassScores]

    @property
    def mean_ap(self) -> float:
        """Over classes and distances."""
        return float(np.mean([one.mean_ap for one in self.classes.values()]))

    @property
    def errors(self) -> dict[str, float]:
        """Means over the classes that have the error; 1 when none has."""
        values = {error: [one.errors[error] for one in self.classes.values()] for error in ERRORS}
        return {key: 1.0 if np.isnan(own).all() else float(np.nanmean(own)) for key, own in values.items()}

    @property
    def nds(self) -> float:
        """The nuScenes detection score (docs/papers/calico.md, eq. 7)."""
        return (5 * self.mean_ap + sum(max(0.0, 1 - error) for error in self.errors.values())) / 10

    def metrics(self) -> dict[str, float]:
        """What tables show; meanings in `MEANINGS`."""
        return {"nds": self.nds, "map": self.mean_ap, **self.errors}

    def details(self) -> dict[str, Any]:
        """Per class, as plain data; an error that a class does not have is None."""
        return {
            name: {
                "ap": {f"{distance:g}": value for distance, value in one.ap.items()},
                "errors": {key: None if math.isnan(value) else value for key, value in one.errors.items()},
                "num_truth": one.num_truth,
                "num_predictions": one.num_predictions,
            }
            for name, one in self.classes.items()
        }


MEANINGS = {"nds": share("NDS", main=True), "map": share("mAP")} | {
    error: Meaning(error.upper(), unit, higher_is_better=False)
    for error, unit in zip(ERRORS, ("m", "1 - IoU", "rad", "m/s", "1 - accuracy"), strict=True)
}


def evaluate(
    predictions: Boxes,
    truth: Boxes,
    ranges: Mapping[str, float] = NUSCENES,
    distances: Sequence[float] = DISTANCES,
    *,
    ego: Floats | None = None,
    racks: Boxes | None = None,
) -> Scores:
    """Filter and score the classes of `ranges`; one that no true box has counts as AP 0.

    `ego` [S,2] is the vehicle's place in the boxes' frame (None: the origin), `racks` are bicycle racks, in which no
    two-wheeled vehicle counts.
    """
    predictions, truth = (_that_count(boxes, ranges, ego, racks) for boxes in (predictions, truth))
    return Scores({name: _score_class(predictions, truth, distances, name) for name in ranges})


def attributes_of(names: Sequence[str], velocity: Floats) -> list[str]:
    """The likeliest attribute of each box, by its class and speed (`velocity` [k,2]), for models that predict none."""
    moving = np.hypot(*np.asarray(velocity, np.float64).reshape(-1, 2).T) > _MOVING_SPEED
    return [_ATTRIBUTE_OF.get(name, ("", ""))[int(moves)] for name, moves in zip(names, moving, strict=True)]


def _that_count(boxes: Boxes, ranges: Mapping[str, float], ego: Floats | None, racks: Boxes | None) -> Boxes:
    """Without boxes of other classes, beyond their class's range, without a point, or in a rack."""
    place = boxes.box[:, :2] - (0 if ego is None else np.asarray(ego)[boxes.sample])
    limit = np.array([ranges.get(name, -1.0) for name in boxes.name.tolist()])
    boxes = boxes.pick((np.hypot(place[:, 0], place[:, 1]) < limit) & (boxes.num_points != 0))
    counts = np.ones(len(boxes), bool)
    for sample, box in zip(racks.sample, racks.box, strict=True) if racks is not None else ():
        (x, y, z), cos, sin = (boxes.box[:, :3] - box[:3]).T, np.cos(box[6]), np.sin(box[6])
        offset = np.abs([x * cos + y * sin, y * cos - x * sin, z])
        inside = (offset <= box[3:6, None] / 2).all(0)
        counts &= ~(inside & (boxes.sample == sample) & np.isin(boxes.name, _TWO_WHEELED))
    return boxes.pick(counts)


def _score_class(predictions: Boxes, truth: Boxes, distances: Sequence[float], name: str) -> ClassScores:
    predictions, truth = (boxes.pick(boxes.name == name) for boxes in (predictions, truth))
    # By falling score; of equal scores the last of the file comes first, as in the devkit.
    predictions = predictions.pick(np.lexsort((np.arange(len(predictions)), predictions.score))[::-1])

    def apart(rows: Rows, targets: Rows) -> Floats:
        offset = predictions.box[rows, None, :2] - truth.box[targets, :2]
        return np.hypot(offset[..., 0], offset[..., 1])

    ap, errors = {}, dict.fromkeys(ERRORS, 1.0)
    for distance, matched in zip(distances, match(predictions, truth, apart, distances), strict=True):
        curve, confidence = _curves(matched >= 0, predictions.score, len(truth))
        ap[distance] = float(np.clip(curve[_FIRST:] - _MIN_PRECISION, 0, None).mean() / (1 - _MIN_PRECISION))
        reached = np.flatnonzero(confidence).max(initial=0)
        if distance == _ERROR_DISTANCE and reached >= _FIRST:
            right = predictions.pick(matched >= 0)
            each = _errors(right, truth.pick(matched[matched >= 0]), name in _HALF_TURN)
            for error, values in each.items():
                mean = np.interp(confidence[::-1], right.score[::-1], _running_mean(values)[::-1])[::-1]
                errors[error] = float(mean[_FIRST : reached + 1].mean())
    errors |= dict.fromkeys(_MISSING.get(name, ()), math.nan)
    return ClassScores(ap, errors, len(truth), len(predictions))


def match(
    own: Boxes, true: Boxes, apart: Callable[[Rows, Rows], Floats], limits: Sequence[float]
) -> NDArray[np.int64]:
    """[T,P], for each limit: the true box that each prediction, in their order, takes; -1: none.

    It is the nearest of its sample that is still free, or none when that one is too far. `apart` gives the distances of
    rows of predictions from rows of true boxes.
    """
    found = np.full((len(limits), len(own)), -1)
    rows_of = _by_sample(own.sample)
    for sample, targets in _by_sample(true.sample).items():
        rows = rows_of.get(sample, np.empty(0, np.int64))
        distance = apart(rows, targets)
        for number, limit in enumerate(limits):
            free = distance.copy()
            for row in np.flatnonzero((distance < limit).any(1)):
                nearest = free[row].argmin()
                if free[row, nearest] < limit:
                    found[number, rows[row]] = targets[nearest]
                    free[:, nearest] = np.inf
    return found


def _by_sample(samples: Rows) -> dict[int, Rows]:
    """Sample -> its rows, in order."""
    order = np.argsort(samples, kind="stable")
    names, first = np.unique(samples[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, first[1:]), strict=True)) if len(names) else {}


def _curves(right: NDArray[np.bool_], score: Floats, num_truth: int) -> tuple[Floats, Floats]:
    """Precision and score at the recalls, both [101]; 0 where the recall is not reached."""
    if not right.any():
        return np.zeros(len(RECALLS)), np.zeros(len(RECALLS))
    hits = np.cumsum(right)
    recall, precision = hits / num_truth, hits / np.arange(1, len(right) + 1)
    return np.interp(RECALLS, recall, precision, right=0), np.interp(RECALLS, recall, score, right=0)


def _errors(predicted: Boxes, true: Boxes, half_turn: bool) -> dict[str, Floats]:
    """Of pairs, [n] each; NaN where the truth does not say."""
    said, there = predicted.box.T, true.box.T
    offset, period = there - said, np.pi if half_turn else 2 * np.pi
    common = np.minimum(said[3:6], there[3:6]).prod(0)
    return {
        "ate": np.hypot(offset[0], offset[1]),
        "ase": 1 - common / (said[3:6].prod(0) + there[3:6].prod(0) - common),
        "aoe": np.abs((offset[6] + period / 2) % period - period / 2),
        "ave": np.hypot(offset[7], offset[8]),
        "aae": np.where(true.attribute == "", np.nan, predicted.attribute != true.attribute),
    }


def _running_mean(values: Floats) -> Floats:
    """Of the values so far that are not NaN; 0 before the first, 1 when all are NaN."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    return np.nancumsum(values) / np.maximum(np.cumsum(known), 1)


# ------------------------------------------------------------------------------------------------- the official format


def write_submission(
    path: Path, predictions: Boxes, tokens: Sequence[str], *, camera: bool, lidar: bool
) -> None:
    """Write predictions in the global frame as a results file of the nuScenes server; of a sample the best boxes."""
    results: dict[str, list[dict[str, Any]]] = {token: [] for token in tokens}
    for row in np.lexsort((-predictions.score, predictions.sample)):
        token = tokens[predictions.sample[row]]
        if len(results[token]) < MOST_BOXES:
            x, y, z, length, width, height, yaw, vx, vy = predictions.box[row].tolist()
            results[token].append(
                {
                    "sample_token": token,
                    "translation": [x, y, z],
                    "size": [width, length, height],
                    "rotation": [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)],
                    "velocity": [vx, vy],
                    "detection_name": str(predictions.name[row]),
                    "detection_score": float(predictions.score[row]),
                    "attribute_name": str(predictions.attribute[row]),
                }
            )
    meta = dict.fromkeys(("use_radar", "use_map", "use_external"), False)
    meta |= {"use_camera": camera, "use_lidar": lidar}
    write_text(path, json.dumps({"meta": meta, "results": results}), "results file")


def read_submission(path: Path, tokens: Sequence[str]) -> Boxes:
    """The predictions of a results file for the samples `tokens`, in the file's order."""
    what, content = f"results file {path}", read_object(path, "results file")
    results = content.get("results")
    if not isinstance(results, dict) or not isinstance(content.get("meta"), dict):
        told = "lacks 'meta' or 'results'; write it in the format of the nuScenes detection server"
        raise UserError(f"{what} {told}")
    for told, others in (("lacks", set(tokens) - set(results)), ("has unknown", set(results) - set(tokens))):
        if others:
            told += f" {len(others)} samples, first {min(others)}"
            raise UserError(f"{what} {told}; it must have each of the {len(tokens)} of the split")
    samples = []
    for token, boxes in results.items():
        if not isinstance(boxes, list):
            raise UserError(f"{what}: sample {token} has no list of boxes; give it one, which may be empty")
        if len(boxes) > MOST_BOXES:
            told = f"{len(boxes)} boxes, more than {MOST_BOXES}; keep the best {MOST_BOXES}"
            raise UserError(f"{what}: sample {token} has {told}")
        rows = [_read_box(box, token, f"{what}: a box of sample {token}") for box in boxes]
        samples.append((*(zip(*rows, strict=True) if rows else [()] * 4), None))
    found, number_of = Boxes.stack(samples), {token: number for number, token in enumerate(tokens)}
    return replace(found, sample=np.array([number_of[token] for token in results], np.int64)[found.sample])


_LENGTHS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2, "detection_score": 1}
_NAMES = {"detection_name": ("class", tuple(NUSCENES)), "attribute_name": ("attribute", ("", *ATTRIBUTES))}


def _read_box(box: Any, token: str, where: str) -> tuple[list[float], str, float, str]:
    """Box, class, score and attribute."""
    if not isinstance(box, dict) or box.get("sample_token") != token:
        raise UserError(f"{where} is no object whose sample_token is its own sample's")
    for key, (kind, known) in _NAMES.items():
        if box.get(key) not in known:
            told = did_you_mean(str(box.get(key)), known, f"known are {', '.join(known)}")
            raise UserError(f"{where} has the unknown {kind} {box.get(key)!r}; {told}")
    numbers: dict[str, list[float]] = {}
    for key, count in _LENGTHS.items():
        given = box.get(key)
        value = numbers[key] = given if isinstance(given, list) and count > 1 else [given]
        if len(value) != count or any(type(one) not in (int, float) for one in value):
            raise UserError(f"{where} needs {count} number{'s' * (count > 1)} as {key}; it has {given!r}")
        if key != "velocity" and not all(map(math.isfinite, value)):
            raise UserError(f"{where} has {key} {given}; only velocities may be unknown (NaN)")
    if min(numbers["size"]) <= 0 or not any(numbers["rotation"]):
        told = f"size {box['size']} and rotation {box['rotation']}; sizes are positive, a quaternion is not 0"
        raise UserError(f"{where} has {told}")
    width, length, height = numbers["size"]
    w, x, y, z = numbers["rotation"]
    yaw = math.atan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)  # of the x axis, seen from above
    placed = [*numbers["translation"], length, width, height, yaw, *numbers["velocity"]]
    return placed, box["detection_name"], numbers["detection_score"][0], box["attribute_name"]
