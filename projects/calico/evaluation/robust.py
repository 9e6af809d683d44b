"""Damaged and attacked frames, and what they cost a detector. NumPy and SciPy only.

A damage is a function of (frame, name, severity), so every model meets the same one. Strengths are those of nuScenes-C where they
need no simulator; those of beams, cameras and images are ours. Letters: n points, V cameras.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from projects.calico.scenes import DRIVING_AXIS, Camera, Frame
from vlmkd.errors import UserError, did_you_mean

Floats = NDArray[np.floating[Any]]
Damage = Callable[[Frame, int, np.random.Generator], Frame]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(frame: Frame, name: str, severity: int) -> Frame:
    """The frame damaged in the way `name` (of `CORRUPTIONS`) with severity 1 to 5; labels of points are dropped."""
    if name not in CORRUPTIONS:
        raise UserError(
            f"config field eval.corruptions names {name!r}; {did_you_mean(name, CORRUPTIONS, ', '.join(CORRUPTIONS))}"
        )
    if severity not in SEVERITIES:
        raise UserError(f"config field eval.severities holds {severity}; severities are 1 to 5")
    damaged = CORRUPTIONS[name](frame, severity - 1, _generator(frame.token, name, severity))
    labels = frame.labels and replace(frame.labels, instance=None, ground=None)
    return replace(damaged, labels=labels)


def _generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")
    )


def mean_corruption_error(
    nds: Mapping[str, Sequence[float]], scratch: Mapping[str, Sequence[float]]
) -> tuple[float, dict[str, float]]:
    """mCE and the error CE of each corruption, as shares of the errors (1 - NDS) of a model trained from scratch.

    `nds`: corruption -> NDS at each severity; of the model and of the one from scratch, which has mCE 1.
    """
    each = {
        name: float(np.sum(1 - np.array(own)) / np.sum(1 - np.array(scratch[name])))
        for name, own in nds.items()
    }
    return float(np.mean(list(each.values()))), each


# ------------------------------------------------------------------------------------------------------------- points


def _keep(frame: Frame, keep: NDArray[np.bool_]) -> Frame:
    return replace(frame, points=frame.points[keep], key=frame.key[keep])


def _move(frame: Frame, rows: Any, offset: Floats) -> Frame:
    """x, y and z alone: intensity and time stay."""
    points = frame.points.copy()
    points[rows, :3] += offset
    return replace(frame, points=points)


def _some(frame: Frame, share: float, draw: np.random.Generator) -> NDArray[np.int64]:
    """Rows of a share of the points, each once."""
    return draw.choice(len(frame.points), round(share * len(frame.points)), replace=False)


def density(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """6 to 30 % of the points are lost."""
    keep = np.ones(len(frame.points), bool)
    keep[_some(frame, 0.06 * (level + 1), draw)] = False
    return _keep(frame, keep)


def cutout(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """2 to 10 times, the 2 % of the points nearest to one of them are lost."""
    for _ in range((2, 3, 5, 7, 10)[level]):
        apart = np.linalg.norm(
            frame.points[:, :3] - frame.points[draw.integers(len(frame.points)), :3], axis=1
        )
        keep = np.ones(len(apart), bool)
        keep[np.argsort(apart, kind="stable")[: len(apart) // 50]] = False
        frame = _keep(frame, keep)
    return frame


def gaussian(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """Every coordinate is off by N(0, 2 to 10 cm)."""
    return _move(frame, slice(None), draw.normal(0, 0.02 * (level + 1), (len(frame.points), 3)))


def uniform(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """Every coordinate is off by at most 2 to 10 cm."""
    reach = 0.02 * (level + 1)
    return _move(frame, slice(None), draw.uniform(-reach, reach, (len(frame.points), 3)))


def impulse(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """Every coordinate of 1/30 to 1/10 of the points is off by 10 cm."""
    rows = _some(frame, (1 / 30, 1 / 25, 1 / 20, 1 / 15, 1 / 10)[level], draw)
    return _move(frame, rows, draw.choice([-0.1, 0.1], (len(rows), 3)))


def crosstalk(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """Other LiDARs: 0.4 to 2 % of the points are off by N(0, 3 m)."""
    rows = _some(frame, 0.004 * (level + 1), draw)
    return _move(frame, rows, draw.normal(0, 3, (len(rows), 3)))


def glare(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """Sunlight: 1 to 5 % of the points are off by N(0, 2 m)."""
    rows = _some(frame, 0.01 * (level + 1), draw)
    return _move(frame, rows, draw.normal(0, 2, (len(rows), 3)))


def fov_loss(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """Only 105 to 45 degrees to either side of the driving direction are seen."""
    ahead, aside = _ahead(frame, frame.points)
    return _keep(frame, np.abs(np.degrees(np.arctan2(aside, ahead))) <= (105, 90, 75, 60, 45)[level])


def beam_drop(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """4 to 20 of 32 beams are lost; a beam is a thirty-second of the angles of elevation that occur."""
    up = np.arctan2(frame.points[:, 2], np.hypot(frame.points[:, 0], frame.points[:, 1]))
    low, high = up.min(), up.max()
    beam = np.minimum((32 * (up - low) / max(high - low, 1e-9)).astype(int), 31)
    return _keep(frame, ~np.isin(beam, draw.choice(32, 4 * (level + 1), replace=False)))


def _ahead(frame: Frame, points: Floats) -> tuple[Floats, Floats]:
    """Metres along the driving direction, and to its left."""
    if DRIVING_AXIS[frame.frame] == "x":
        return points[:, 0], points[:, 1]
    return points[:, 1], -points[:, 0]


# ------------------------------------------------------------------------------------------------------------ cameras


def _images(frame: Frame, change: Callable[[NDArray[np.float32]], Floats]) -> Frame:
    """Each image, float32 [H,W,3] from 0 to 255, changed and rounded."""

    def changed(camera: Camera) -> Camera:
        image = np.clip(np.rint(change(camera.load().astype(np.float32))), 0, 255).astype(np.uint8)
        return replace(camera, image=image)

    return replace(frame, cameras={name: changed(camera) for name, camera in frame.cameras.items()})


def missing_cameras(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """1 to 5 of 6 cameras, of others that share of them and at least one, are black."""
    gone = draw.permutation(list(frame.cameras))[: math.ceil(len(frame.cameras) * (level + 1) / 6)]
    cameras = dict(frame.cameras)
    for name in gone:
        cameras[name] = replace(cameras[name], image=np.zeros((*cameras[name].size, 3), np.uint8))
    return replace(frame, cameras=cameras)


def image_noise(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """N(0, 0.08 to 0.38 of full scale), as in ImageNet-C."""
    sigma = 255 * (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    return _images(frame, lambda image: image + sigma * draw.standard_normal(image.shape, np.float32))


def image_blur(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """A Gaussian of 0.25 to 1.5 % of the image's width."""
    share = (0.0025, 0.005, 0.0075, 0.01, 0.015)[level]
    return _images(frame, lambda image: gaussian_filter(image, (share * image.shape[1],) * 2 + (0,)))


def image_brightness(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """0.1 to 0.5 of full scale brighter, as in ImageNet-C."""
    return _images(frame, lambda image: image + 25.5 * (level + 1))


def extrinsic_error(frame: Frame, level: int, draw: np.random.Generator) -> Frame:
    """Every camera stands N(0, 4 to 20 cm) off along each axis, and is turned by N(0, 4 to 20 mrad) about each."""

    def moved(camera: Camera) -> Camera:
        angles = draw.normal(0, 2 * 0.002 * (level + 1), 3)
        error = np.eye(4)
        error[:3, :3] = _rotation(angles)
        error[:3, 3] = draw.normal(0, 2 * 0.02 * (level + 1), 3)
        return replace(camera, cam2lidar=camera.cam2lidar @ error)

    return replace(frame, cameras={name: moved(camera) for name, camera in frame.cameras.items()})


def _rotation(vector: Floats) -> Floats:
    """[3,3] by the rotation vector [3] (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


CORRUPTIONS: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        *(density, cutout, gaussian, uniform, impulse, crosstalk, glare, fov_loss, beam_drop),
        *(missing_cameras, image_noise, image_blur, image_brightness, extrinsic_error),
    )
}
OF_CAMERAS = ("missing_cameras", "image_noise", "image_blur", "image_brightness", "extrinsic_error")
"""Those that a model without cameras does not meet."""


# ------------------------------------------------------------------------------------------------------------ attacks

VEHICLES = ("car", "truck", "bus", "vehicle")
_WINDOW = math.radians(10)  # in which a spoofer can place points
_NEAREST, _FURTHEST = 5.0, 8.0  # metres before the car
_FREE = 4.0  # metres around the place without a true box
_SCORE, _REACH = 0.3, 2.0  # of a detection that counts as the false vehicle


@dataclass(frozen=True)
class Attack:
    """Points that a spoofer shows to the LiDAR of one frame."""

    token: str
    points: NDArray[np.float32]
    """[m,5]."""
    centre: Floats
    """[2]: where the false vehicle seems to be."""


def plan_attacks(frames: Iterable[Frame], points: int) -> list[Attack]:
    """For each frame with free road ahead, the returns of a far or hidden vehicle of another frame, moved before the car.

    A black-box attack: it asks no model. The vehicle's points are turned about the sensor and pushed along the ground, so that
    their pattern stays, at most `points` (60, 100 or 200) within a window of 10 degrees.

    Raises:
        UserError: frames without labels, or none whose vehicles have so few points.
    """
    frames = list(frames)
    donors = [(frame.token, *donor) for frame in frames for donor in _donors(frame, points)]
    if not donors:
        raise UserError(
            f"no frame has a labelled vehicle of 10 to {points} points to attack with; give labelled frames"
        )
    found = []
    for frame in frames:
        draw = _generator(frame.token, "spoof", points)
        others = [donor for donor in donors if donor[0] != frame.token] or donors
        _, cloud, middle = others[draw.integers(len(others))]
        distance, side = draw.uniform(_NEAREST, _FURTHEST), draw.uniform(-0.5, 0.5)
        centre = (
            np.array([distance, side]) if DRIVING_AXIS[frame.frame] == "x" else np.array([-side, distance])
        )
        labels = frame.labels
        assert labels is not None, "donors come from labels"
        if (np.linalg.norm(labels.boxes[:, :2] - centre, axis=1) < _FREE).any():
            continue
        turn = math.atan2(centre[1], centre[0]) - math.atan2(middle[1], middle[0])
        cos, sin = math.cos(turn), math.sin(turn)
        moved = cloud.astype(np.float64)
        moved[:, :2] = (cloud[:, :2] - middle) @ np.array([[cos, sin], [-sin, cos]]) + centre
        off = np.arctan2(moved[:, 1], moved[:, 0]) - math.atan2(centre[1], centre[0])
        moved = moved[np.abs((off + np.pi) % (2 * np.pi) - np.pi) <= _WINDOW / 2]
        if len(moved):
            found.append(Attack(frame.token, moved.astype(np.float32), centre))
    return found


def _donors(frame: Frame, points: int) -> list[tuple[NDArray[np.float32], Floats]]:
    """Points [m,5] and centre [2] of the vehicles with 10 to `points` points in the key sweep, beyond 10 m."""
    found = []
    cloud = frame.points[frame.key]
    for box, name in zip(frame.labels.boxes, frame.labels.names, strict=True) if frame.labels else ():
        x, y, z = (cloud[:, :3] - box[:3]).T
        cos, sin = math.cos(box[6]), math.sin(box[6])
        inside = (
            (np.abs(cos * x + sin * y) <= box[3] / 2)
            & (np.abs(cos * y - sin * x) <= box[4] / 2)
            & (np.abs(z) <= box[5] / 2)
        )
        if name in VEHICLES and 10 <= inside.sum() <= points and np.hypot(box[0], box[1]) > 10:
            found.append((cloud[inside], box[:2].astype(np.float64)))
    return found


def spoof(frame: Frame, attack: Attack) -> Frame:
    """The frame under attack: false points are added, and true ones that they hide are gone."""
    assert frame.token == attack.token

    def angles(points: Floats) -> tuple[Floats, Floats, Floats]:
        """Around (from the attack's middle), up, and distance."""
        around = np.arctan2(points[:, 1], points[:, 0]) - math.atan2(attack.centre[1], attack.centre[0])
        distance = np.hypot(points[:, 0], points[:, 1])
        return (around + np.pi) % (2 * np.pi) - np.pi, np.arctan2(points[:, 2], distance), distance

    around, up, distance = angles(attack.points)
    at, height, away = angles(frame.points)
    hidden = (
        (at >= around.min())
        & (at <= around.max())
        & (height >= up.min())
        & (height <= up.max())
        & (away > distance.min())
    )
    frame = _keep(frame, ~hidden)
    return replace(
        frame,
        points=np.concatenate([frame.points, attack.points]),
        key=np.concatenate([frame.key, np.ones(len(attack.points), bool)]),
        labels=frame.labels and replace(frame.labels, instance=None, ground=None),
    )


def succeeded(attack: Attack, boxes: Floats, names: Sequence[str], scores: Floats) -> bool:
    """Whether a detector that gave boxes [k, 7 or 9] for the attacked frame saw the false vehicle."""
    near = (
        np.linalg.norm(np.asarray(boxes).reshape(len(names), -1)[:, :2] - attack.centre, axis=1) <= _REACH
        if len(names)
        else np.zeros(0, bool)
    )
    return bool((near & (np.asarray(scores) >= _SCORE) & np.isin(names, VEHICLES)).any())


def attack_success_rate(outcomes: Sequence[bool]) -> float:
    """Share of attacked frames in which the false vehicle was seen."""
    return float(np.mean(outcomes)) if len(outcomes) else math.nan
