"""Corruptions have the stated strength and are the same for every model; attacks stand where they should."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from projects.calico.evaluation.robust import (
    CORRUPTIONS,
    OF_CAMERAS,
    Trace,
    corrupt,
    mean_corruption_error,
    plan_attack,
    spoof,
    succeeded,
    traces,
)
from projects.calico.scenes import Camera, Frame, Labels
from vlmkd.errors import UserError


def frame(token: str = "a", kind: str = "nuscenes", count: int = 20_000) -> Frame:
    rng = np.random.default_rng(5)
    points = np.concatenate([rng.uniform([-50, -50, -3], [50, 50, 3], (count, 3)), rng.random((count, 2))], 1)
    image = rng.integers(60, 120, (40, 80, 3), dtype=np.uint8)
    cameras = {f"CAM_{n}": Camera(image, np.eye(3), np.eye(4)) for n in range(6)}
    labels = Labels(np.zeros((1, 9), np.float32), ("car",), np.ones(1), instance=np.zeros(count, np.int16))
    return Frame(
        token, "s", kind, points.astype(np.float32), np.arange(count) < count // 2, cameras, labels=labels
    )  # type: ignore[arg-type]


FRAME = frame()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_frame_name_and_severity(name: str) -> None:
    small = frame(count=2000)
    before = small.points.copy()
    first, again, other = (corrupt(one, name, 3) for one in (small, small, replace(small, token="b")))
    assert (small.points == before).all() and first.token == "a"
    assert first.labels is not None and first.labels.instance is None and first.labels.names == ("car",)
    assert len(first.points) == len(first.key)
    assert np.array_equal(first.points, again.points)
    same = np.array_equal(first.points, other.points)
    for camera in first.cameras:
        a, b, c = (one.cameras[camera] for one in (first, again, other))
        assert np.array_equal(a.image, b.image) and np.array_equal(a.cam2lidar, b.cam2lidar)
        same &= np.array_equal(a.image, c.image) and np.array_equal(a.cam2lidar, c.cam2lidar)
    assert same == (name in ("fov_loss", "image_blur", "image_brightness"))
    if name in OF_CAMERAS:
        assert np.array_equal(first.points, small.points)
    else:
        assert all(first.cameras[camera] is small.cameras[camera] for camera in small.cameras)


def moved(name: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [n,3] of all points, and which of them moved."""
    found = corrupt(FRAME, name, severity)
    assert (found.points[:, 3:] == FRAME.points[:, 3:]).all()
    offset = found.points[:, :3].astype(float) - FRAME.points[:, :3]
    return offset, (offset != 0).any(1)


@pytest.mark.parametrize("severity", [1, 5])
def test_strengths_of_moved_points(severity: int) -> None:
    low_high = {1: 0, 5: 1}[severity]
    offset, _ = moved("gaussian", severity)
    assert offset.std() == pytest.approx((0.02, 0.10)[low_high], rel=0.02)
    offset, _ = moved("uniform", severity)
    assert np.abs(offset).max() == pytest.approx((0.02, 0.10)[low_high], rel=0.01)
    assert offset.std() == pytest.approx((0.02, 0.10)[low_high] / math.sqrt(3), rel=0.02)
    offset, which = moved("impulse", severity)
    assert which.mean() == pytest.approx((1 / 30, 1 / 10)[low_high], rel=0.01)
    assert np.allclose(np.abs(offset[which]), 0.1, atol=1e-5)
    for name, share, sigma in (("crosstalk", (0.004, 0.02), 3), ("glare", (0.01, 0.05), 2)):
        offset, which = moved(name, severity)
        assert which.mean() == pytest.approx(share[low_high], rel=0.01)
        assert offset[which].std() == pytest.approx(sigma, rel=0.15)


@pytest.mark.parametrize(("severity", "lost", "cuts"), [(1, 0.06, 2), (5, 0.30, 10)])
def test_strengths_of_lost_points(severity: int, lost: float, cuts: int) -> None:
    assert len(corrupt(FRAME, "density", severity).points) == round(20_000 * (1 - lost))
    assert len(corrupt(FRAME, "cutout", severity).points) == pytest.approx(20_000 * 0.98**cuts, abs=cuts)
    kept = corrupt(FRAME, "fov_loss", severity).points
    angle = np.degrees(np.abs(np.arctan2(-kept[:, 0], kept[:, 1])))  # from +y, where nuScenes drives
    assert angle.max() == pytest.approx((105, 45)[severity == 5], abs=0.1)
    kitti = corrupt(frame(kind="kitti"), "fov_loss", severity).points
    assert np.degrees(np.abs(np.arctan2(kitti[:, 1], kitti[:, 0]))).max() <= (105, 45)[severity == 5]
    ring = np.repeat(np.arange(32), 100)
    up = np.radians(-30 + 40 / 31 * ring)
    cloud = np.stack([10 * np.cos(up), 0 * up, 10 * np.sin(up), ring, 0 * up], 1).astype(np.float32)
    rings = corrupt(replace(FRAME, points=cloud, key=ring >= 0), "beam_drop", severity).points[:, 3]
    assert len(np.unique(rings)) == 32 - 4 * severity and len(rings) == 100 * (32 - 4 * severity)


def test_cutouts_are_balls() -> None:
    """What one cut of severity 1 takes lies nearer to some point than all that is left."""
    found = corrupt(FRAME, "cutout", 1).points
    left = set(map(bytes, found))
    lost = np.array([point for point in FRAME.points if bytes(point) not in left])[:, :3]
    assert len(lost) == 400 + 392
    centres = lost[:: len(lost) // 40]
    radii = [np.sort(np.linalg.norm(lost - centre, axis=1))[390] for centre in centres]
    assert min(radii) < 13  # 392 of 20 000 points in 100 x 100 x 6 m fill a disc of 8 m radius


def test_images_and_cameras() -> None:
    image = FRAME.cameras["CAM_0"].load().astype(float)
    dark = [
        camera for camera in corrupt(FRAME, "missing_cameras", 2).cameras.values() if not camera.load().any()
    ]
    assert len(dark) == 2
    assert (
        len(
            [
                c
                for c in corrupt(
                    replace(FRAME, cameras=dict(list(FRAME.cameras.items())[:1])), "missing_cameras", 1
                ).cameras.values()
                if not c.load().any()
            ]
        )
        == 1
    )
    noise = corrupt(FRAME, "image_noise", 1).cameras["CAM_0"].load() - image
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.05)
    assert (corrupt(FRAME, "image_brightness", 2).cameras["CAM_0"].load() - image).mean() == pytest.approx(
        51, abs=0.5
    )
    blurred = corrupt(FRAME, "image_blur", 5).cameras["CAM_0"].load().astype(float)
    assert blurred.mean() == pytest.approx(image.mean(), abs=0.5) and blurred.std() < 0.4 * image.std()
    errors = [
        one.cam2lidar
        for token in map(str, range(40))
        for one in corrupt(replace(FRAME, token=token), "extrinsic_error", 5).cameras.values()
    ]
    assert np.std([one[:3, 3] for one in errors]) == pytest.approx(0.2, rel=0.1)
    turns = Rotation.from_matrix([one[:3, :3] for one in errors]).as_rotvec()
    assert turns.std() == pytest.approx(0.02, rel=0.1)


def test_mean_corruption_error() -> None:
    scratch = {"a": [0.4, 0.2], "b": [0.5, 0.3]}
    assert mean_corruption_error(scratch, scratch)[0] == pytest.approx(1)
    mean, each = mean_corruption_error({"a": [0.7, 0.6], "b": [0.5, 0.3]}, scratch)
    assert each == {"a": pytest.approx(0.5), "b": pytest.approx(1)} and mean == pytest.approx(0.75)


def test_unknown_corruptions_are_named() -> None:
    with pytest.raises(UserError, match="--corruptions names 'densty'; did you mean density"):
        corrupt(FRAME, "densty", 1)
    with pytest.raises(UserError, match="severities holds 6; severities are 1 to 5"):
        corrupt(FRAME, "density", 6)


# -------------------------------------------------------------------------------------------------------------- attacks


def street(token: str, kind: str, vehicle_at: float, blocked: bool = False) -> Frame:
    """A wall behind, and a vehicle of 80 points far ahead; another right before the car if `blocked`."""
    rng = np.random.default_rng(len(token) + int(vehicle_at))
    car = rng.uniform([-2, -0.9, -0.7], [2, 0.9, 0.7], (80, 3)) + [vehicle_at, 3, -1]
    y, z = np.meshgrid(np.linspace(-8, 8, 161), np.linspace(-4, 0, 33))
    wall = np.stack([np.full(y.size, 15.0), y.ravel(), z.ravel()], 1)
    points = np.concatenate([car, wall])
    boxes = np.array(
        [[vehicle_at, 3, -1, 4, 1.8, 1.5, 0, 0, 0]] + [[6, 0, -1, 4, 1.8, 1.5, 0, 0, 0]] * blocked, np.float32
    )
    if kind == "nuscenes":  # forward is y
        points[:, :2] = np.stack([-points[:, 1], points[:, 0]], 1)
        boxes[:, :2], boxes[:, 6] = np.stack([-boxes[:, 1], boxes[:, 0]], 1), math.pi / 2
    cloud = np.pad(points, ((0, 0), (0, 2))).astype(np.float32)
    labels = Labels(boxes, ("car",) * len(boxes), np.full(len(boxes), 80))
    return Frame(token, "s", kind, cloud, np.ones(len(cloud), bool), labels=labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["nuscenes", "kitti"])
@pytest.mark.parametrize("most", [100, 200])
def test_attacks_stand_before_the_car(kind: str, most: int) -> None:
    frames = [street("a", kind, 30), street("bb", kind, 40), street("ccc", kind, 25, blocked=True)]
    known = traces(iter(frames))
    assert [(trace.token, len(trace.points)) for trace in known] == [("a", 80), ("bb", 80), ("ccc", 80)]
    *attacks, none = (plan_attack(one, known, most) for one in frames)
    assert none is None  # the place of the third is taken
    again = [plan_attack(one, known, most) for one in frames[:2]]
    assert all((one.points == other.points).all() for one, other in zip(attacks, again, strict=True))
    for attack, one in zip(attacks, frames, strict=False):
        ahead, aside = (
            (attack.centre[0], attack.centre[1]) if kind == "kitti" else (attack.centre[1], -attack.centre[0])
        )
        assert 5 <= ahead <= 8 and abs(aside) <= 0.5
        assert 1 <= len(attack.points) <= 80
        around = np.arctan2(attack.points[:, 1], attack.points[:, 0])
        assert np.ptp(around) <= math.radians(10) + 1e-6
        assert (
            np.linalg.norm(attack.points[:, :2] - attack.centre, axis=1).max() < 2.3
        )  # half the diagonal of a car
        assert np.ptp(attack.points[:, 2]) < 1.5 and attack.points[:, 2].mean() == pytest.approx(-1, abs=0.3)
        seen = spoof(one, attack)
        assert (seen.points[-len(attack.points) :] == attack.points).all() and seen.key.all()
        # The wall has a hole in the shadow, and nowhere else.
        gone = len(one.points) + len(attack.points) - len(seen.points)
        wall = one.points[80:]
        at = np.arctan2(wall[:, 1], wall[:, 0])
        up = np.arctan2(wall[:, 2], np.hypot(wall[:, 0], wall[:, 1]))
        height = np.arctan2(attack.points[:, 2], np.hypot(attack.points[:, 0], attack.points[:, 1]))
        shadow = (at >= around.min()) & (at <= around.max()) & (up >= height.min()) & (up <= height.max())
        assert shadow.sum() <= gone <= shadow.sum() + 80 and gone > 0


@pytest.mark.parametrize("name", ["Car", "REGULAR_VEHICLE", "vehicle"])
def test_vehicles_have_the_names_of_their_data_sets(name: str) -> None:
    one = street("a", "kitti", 30)
    assert one.labels is not None
    (trace,) = traces([replace(one, labels=replace(one.labels, names=(name,)))])
    box = np.array([[*trace.centre, 0, 4, 2, 1.5, 0, 0, 0]])
    assert succeeded(trace, box, [name], np.array([0.9]))


def test_attacks_need_sparse_vehicles() -> None:
    with pytest.raises(UserError, match="no labelled vehicle has 10 to 60 points"):
        plan_attack(street("a", "kitti", 30), traces([street("a", "kitti", 30)]), 60)


def test_success_is_a_confident_vehicle_at_the_place() -> None:
    attack = Trace("a", np.zeros((1, 5), np.float32), np.array([0.0, 6.0]))
    box = np.zeros((1, 9))
    for x, name, score, hit in (
        (1.9, "car", 0.3, True),
        (2.1, "car", 0.9, False),
        (0, "truck", 0.29, False),
        (0, "pedestrian", 0.9, False),
    ):
        box[0, :2] = x, 6.0
        assert succeeded(attack, box, [name], np.array([score])) == hit
    assert not succeeded(attack, np.zeros((0, 9)), [], np.zeros(0))
