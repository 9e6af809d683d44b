"""Damaged and attacked frames, and what they cost a detector.

A damage is a function of (frame, name, severity), so every model meets the same one. Strengths are those of nuScenes-C where they
need no simulator; those of beams, cameras and images are ours. Letters: n points, V cameras.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from projects.calico.geometry import points_in_boxes
from projects.calico.pipeline import generator
from projects.calico.scenes import DRIVING_AXIS, Camera, Frame
from vlmkd.errors import UserError, did_you_mean

Floats = NDArray[np.floating[Any]]
Draw = np.random.Generator
Size = tuple[int, ...]
SEVERITIES = (1, 2, 3, 4, 5)
_MOVED: dict[str, tuple[tuple[float, ...], Callable[[Draw, int, Size], Floats]]] = {
    # Name: share of the points at each severity, and what is added to their coordinates, in metres.
    "gaussian": ((1,) * 5, lambda draw, severity, size: draw.normal(0, 0.02 * severity, size)),
    "uniform": ((1,) * 5, lambda draw, severity, size: draw.uniform(-0.02 * severity, 0.02 * severity, size)),
    "impulse": (
        (1 / 30, 1 / 25, 1 / 20, 1 / 15, 1 / 10),
        lambda draw, _, size: draw.choice([-0.1, 0.1], size),
    ),
    # Other LiDARs, and sunlight.
    "crosstalk": ((0.004, 0.008, 0.012, 0.016, 0.02), lambda draw, _, size: draw.normal(0, 3, size)),
    "glare": ((0.01, 0.02, 0.03, 0.04, 0.05), lambda draw, _, size: draw.normal(0, 2, size)),
}
_LOST = ("density", "cutout", "fov_loss", "beam_drop")
_NOISE, _BLUR = (0.08, 0.12, 0.18, 0.26, 0.38), (0.0025, 0.005, 0.0075, 0.01, 0.015)
_IMAGES: dict[str, Callable[[Floats, int, Draw], Floats]] = {
    # Of float32 [H,W,3], 0 to 255; noise and brightness as in ImageNet-C, the blur a share of the width.
    "image_noise": lambda image, severity, draw: (
        image + 255 * _NOISE[severity - 1] * draw.standard_normal(image.shape, np.float32)
    ),
    "image_blur": lambda image, severity, draw: gaussian_filter(
        image, _BLUR[severity - 1] * image.shape[1], axes=(0, 1)
    ),
    "image_brightness": lambda image, severity, draw: image + 25.5 * severity,
}
OF_CAMERAS = ("missing_cameras", "extrinsic_error", *_IMAGES)
"""Those that a model without cameras does not meet."""
CORRUPTIONS = (*_LOST, *_MOVED, *OF_CAMERAS)


def corrupt(frame: Frame, name: str, severity: int) -> Frame:
    """The frame damaged in the way `name` (of `CORRUPTIONS`) with severity 1 to 5; labels of points are dropped."""
    check(name, severity)
    draw = generator(frame.token, name, severity)
    if name in _MOVED:
        share, noise = _MOVED[name]
        points, rows = frame.points.copy(), _some(frame, share[severity - 1], draw)
        points[rows, :3] += noise(draw, severity, (len(rows), 3))  # intensity and time stay
        return _with(frame, points, frame.key)
    if name in _LOST:
        left = _left(frame, name, severity, draw)
        return _with(frame, frame.points[left], frame.key[left])
    cameras = {key: _damaged(camera, name, severity, draw) for key, camera in frame.cameras.items()}
    if name == "missing_cameras":  # 1 to 5 of 6 are black; of other numbers that share, and at least one
        for key in draw.permutation(list(cameras))[: math.ceil(len(cameras) * severity / 6)]:
            cameras[key] = replace(cameras[key], image=np.zeros((*cameras[key].size, 3), np.uint8))
    return _with(replace(frame, cameras=cameras), frame.points, frame.key)


def check(name: str, severity: int) -> None:
    """Refuse what `corrupt` does not know."""
    if name not in CORRUPTIONS:
        told = did_you_mean(name, CORRUPTIONS, ", ".join(CORRUPTIONS))
        raise UserError(f"--corruptions names {name!r}; {told}")
    if severity not in SEVERITIES:
        raise UserError(f"--severities holds {severity}; severities are 1 to 5")


def _with(frame: Frame, points: Floats, key: NDArray[np.bool_]) -> Frame:
    """The frame with other points, of which labels tell nothing."""
    labels = frame.labels and replace(frame.labels, instance=None, ground=None)
    return replace(frame, points=points, key=key, labels=labels)


def _some(frame: Frame, share: float, draw: Draw) -> NDArray[np.int64]:
    """Rows of a share of the points, each once."""
    return draw.choice(len(frame.points), round(share * len(frame.points)), replace=False)


def _left(frame: Frame, name: str, severity: int, draw: Draw) -> NDArray[np.bool_]:
    """[n]: the points that are not lost."""
    x, y, z = points = frame.points[:, :3].T
    if name == "fov_loss":  # only so many degrees to either side of the driving direction are seen
        ahead, aside = (x, y) if DRIVING_AXIS[frame.frame] == "x" else (y, -x)
        return np.abs(np.degrees(np.arctan2(aside, ahead))) <= (105, 90, 75, 60, 45)[severity - 1]
    if name == "beam_drop":  # 4 to 20 of 32; a beam is a thirty-second of the angles of elevation that occur
        up = np.arctan2(z, np.hypot(x, y))
        beam = (32 * (up - up.min()) / max(np.ptp(up), 1e-9)).astype(int).clip(0, 31)
        return ~np.isin(beam, draw.choice(32, 4 * severity, replace=False))
    left = np.ones(len(x), bool)
    if name == "density":
        left[_some(frame, 0.06 * severity, draw)] = False
        return left
    for _ in range((2, 3, 5, 7, 10)[severity - 1]):  # cutout: 2 % of the points, the nearest to one of them
        rows = np.flatnonzero(left)
        apart = np.linalg.norm(points.T[rows] - points.T[draw.choice(rows)], axis=1)
        left[rows[np.argsort(apart, kind="stable")[: len(rows) // 50]]] = False
    return left


def _damaged(camera: Camera, name: str, severity: int, draw: Draw) -> Camera:
    if name in _IMAGES:
        image = _IMAGES[name](camera.load().astype(np.float32), severity, draw)
        return replace(camera, image=np.clip(np.rint(image), 0, 255).astype(np.uint8))
    if name != "extrinsic_error":
        return camera
    # It stands N(0, 4 to 20 cm) off along each axis, and is turned by N(0, 4 to 20 mrad) about each.
    error = np.eye(4)
    error[:3, :3] = Rotation.from_rotvec(draw.normal(0, 2 * 0.002 * severity, 3)).as_matrix()
    error[:3, 3] = draw.normal(0, 2 * 0.02 * severity, 3)
    return replace(camera, cam2lidar=camera.cam2lidar @ error)


def mean_corruption_error(
    nds: Mapping[str, Sequence[float]], scratch: Mapping[str, Sequence[float]]
) -> tuple[float, dict[str, float]]:
    """mCE and the error CE of each corruption, as shares of the errors (1 - NDS) of a model trained from scratch.

    `nds`: corruption -> NDS at each severity; of the model and of the one from scratch, which has mCE 1
    (docs/papers/calico.md, eq. 8).
    """
    each = {
        name: float((1 - np.array(own)).sum() / (1 - np.array(scratch[name])).sum())
        for name, own in nds.items()
    }
    return float(np.mean(list(each.values()))), each


# ------------------------------------------------------------------------------------------------------------ attacks

VEHICLES = (
    "car", "truck", "bus", "van", "vehicle", "regular_vehicle", "large_vehicle", "box_truck", "school_bus"
)  # fmt: skip
"""Of all data sets, in small letters."""
_MOST_POINTS, _FEWEST_POINTS = 200, 10  # of a vehicle that is shown again
_WINDOW = math.radians(10)  # in which a spoofer can place points
_NEAREST, _FURTHEST = 5.0, 8.0  # metres before the car
_FREE = 4.0  # metres around the place without a true box
_SCORE, _REACH = 0.3, 2.0  # of a detection that counts as the false vehicle


@dataclass(frozen=True)
class Trace:
    """The returns of a far or hidden vehicle."""

    token: str
    """Of its frame."""
    points: NDArray[np.float32]
    """[m,5]."""
    centre: Floats
    """[2]: where the vehicle is, or seems to be."""


def traces(frames: Iterable[Frame]) -> list[Trace]:
    """Of all vehicles of labelled frames with 10 to 200 points in the key sweep, beyond 10 m."""
    found = []
    for frame in frames:
        cloud, labels = frame.points[frame.key], frame.labels
        assert labels is not None
        inside = points_in_boxes(cloud, labels.boxes).numpy()
        for box, name, rows in zip(labels.boxes, labels.names, inside.T, strict=True):
            sparse = _FEWEST_POINTS <= rows.sum() <= _MOST_POINTS
            if name.lower() in VEHICLES and sparse and np.hypot(box[0], box[1]) > 10:
                found.append(Trace(frame.token, cloud[rows], box[:2].astype(np.float64)))
    return found


def fitting(known: Sequence[Trace], points: int) -> list[Trace]:
    """The traces of at most `points` points, of which there must be one."""
    fit = [trace for trace in known if len(trace.points) <= points]
    if not fit:
        told = f"{_FEWEST_POINTS} to {points} points to attack with; give more labelled frames"
        raise UserError(f"no labelled vehicle has {told}, or --attacks without this number")
    return fit


def plan_attack(frame: Frame, known: Sequence[Trace], points: int) -> Trace | None:
    """One of the traces of at most `points` points (60, 100 or 200), moved before the car; None when the road is not free.

    A black-box attack: it asks no model, so all models meet the same. The points are turned about the sensor and pushed along
    the ground, and those within a window of 10 degrees are shown.
    """
    fit = fitting(known, points)
    fit = [trace for trace in fit if trace.token != frame.token] or fit
    draw = generator(frame.token, "spoof", points)
    trace = fit[draw.integers(len(fit))]
    distance, side = draw.uniform(_NEAREST, _FURTHEST), draw.uniform(-0.5, 0.5)
    centre = np.array([distance, side] if DRIVING_AXIS[frame.frame] == "x" else [-side, distance])
    if frame.labels and (np.linalg.norm(frame.labels.boxes[:, :2] - centre, axis=1) < _FREE).any():
        return None
    turn = math.atan2(centre[1], centre[0]) - math.atan2(trace.centre[1], trace.centre[0])
    cos, sin = math.cos(turn), math.sin(turn)
    moved = trace.points.copy()
    moved[:, :2] = (moved[:, :2] - trace.centre) @ np.array([[cos, sin], [-sin, cos]]) + centre
    shown = moved[np.abs(_angles(moved, centre)[0]) <= _WINDOW / 2]
    return Trace(frame.token, shown, centre) if len(shown) else None


def _angles(points: Floats, centre: Floats) -> tuple[Floats, Floats, Floats]:
    """Of each point: to the left of `centre`, up, and metres on the ground."""
    left = np.arctan2(points[:, 1], points[:, 0]) - math.atan2(centre[1], centre[0])
    away = np.hypot(points[:, 0], points[:, 1])
    return (left + np.pi) % (2 * np.pi) - np.pi, np.arctan2(points[:, 2], away), away


def spoof(frame: Frame, attack: Trace) -> Frame:
    """The frame under the attack planned for it: false points are added, and true ones that they hide are gone."""
    left, up, away = _angles(attack.points, attack.centre)
    at, height, distance = _angles(frame.points, attack.centre)
    shadow = (at >= left.min()) & (at <= left.max()) & (height >= up.min()) & (height <= up.max())
    seen = ~(shadow & (distance > away.min()))
    points = np.concatenate([frame.points[seen], attack.points])
    return _with(frame, points, np.concatenate([frame.key[seen], np.ones(len(attack.points), bool)]))


def succeeded(attack: Trace, boxes: Floats, names: Sequence[str], scores: Floats) -> bool:
    """Whether a detector that gave boxes [k, 7 or 9] for the attacked frame saw the false vehicle.

    The attack success rate is the mean over all attacked frames.
    """
    near = np.hypot(*(boxes[:, :2] - attack.centre).T) <= _REACH
    return bool((near & (scores >= _SCORE) & np.isin([name.lower() for name in names], VEHICLES)).any())
