"""Waymo's parquet components, on a release of one frame that the test writes."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from projects.calico.frames import open_frames
from projects.calico.readers.waymo import WaymoFrames
from vlmkd.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SEGMENT, TIME = "segment-1", 1_500_000_000_000_000
RNG = np.random.default_rng(0)
RANGES = {
    1: np.pad(5 + 20 * RNG.random((4, 8, 1)), ((0, 0), (0, 0), (0, 3)), constant_values=0.25),
    2: np.zeros((2, 6, 4)),
}
RANGES[1][1, 3, 0] = 0  # no return
RANGES[2][1, 2] = (7.0, 0.5, 0, 0)


def turn(yaw: float, x: float, y: float, z: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    matrix[:3, 3] = x, y, z
    return matrix


WORLD = turn(0.7, 100, 200, 5)
EXTRINSIC = {1: turn(0.3, 1, 0, 2), 2: turn(-0.5, 3, 1, 1)}
BEAMS = [-0.3, -0.2, -0.05, 0.02]
ROLL, PITCH = 0.03, -0.04


def tilted(matrix: np.ndarray) -> np.ndarray:
    """Roll first, then pitch, then what `matrix` does."""
    roll, pitch = np.eye(4), np.eye(4)
    roll[1:3, 1:3] = [[math.cos(ROLL), -math.sin(ROLL)], [math.sin(ROLL), math.cos(ROLL)]]
    pitch[::2, ::2][:2, :2] = [[math.cos(PITCH), math.sin(PITCH)], [-math.sin(PITCH), math.cos(PITCH)]]
    return matrix @ pitch @ roll


MOVED = tilted(turn(0.72, 100.5, 200.4, 5))  # the car when the top laser looked


def write(root: Path, component: str, rows: list[dict[str, Any]]) -> None:
    (root / component).mkdir(exist_ok=True)
    rows = [{"key.segment_context_name": SEGMENT, **row} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / component / f"{SEGMENT}.parquet")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    now = {"key.frame_timestamp_micros": TIME}
    pose, lidar, calibration = (
        "[VehiclePoseComponent].",
        "[LiDARComponent].range_image_return1.",
        "[LiDARCalibrationComponent].",
    )
    write(
        tmp_path,
        "vehicle_pose",
        [
            now | {pose + "world_from_vehicle.transform": WORLD.ravel().tolist()},
            {"key.frame_timestamp_micros": 1, pose + "world_from_vehicle.transform": [0.0] * 16},
        ],
    )
    write(
        tmp_path,
        "lidar",
        [
            now
            | {
                "key.laser_name": n,
                lidar + "values": image.ravel().astype(np.float32),
                lidar + "shape": list(image.shape),
            }
            for n, image in RANGES.items()
        ],
    )
    pixel = np.broadcast_to([ROLL, PITCH, 0.72, 100.5, 200.4, 5], (4, 8, 6)).astype(np.float32)
    write(
        tmp_path,
        "lidar_pose",
        [
            now
            | {
                "key.laser_name": 1,
                "[LiDARPoseComponent].range_image_return1.values": pixel.ravel(),
                "[LiDARPoseComponent].range_image_return1.shape": [4, 8, 6],
            }
        ],
    )
    write(
        tmp_path, "lidar_calibration",
        [{"key.laser_name": n, calibration + "extrinsic.transform": EXTRINSIC[n].ravel().tolist(), calibration + "beam_inclination.min": -0.4,
          calibration + "beam_inclination.max": 0.4, calibration + "beam_inclination.values": BEAMS if n == 1 else None} for n in (1, 2)],
    )  # fmt: skip
    data = io.BytesIO()
    Image.new("RGB", (1920, 1280), (9, 9, 9)).save(data, "png")
    camera = "[CameraImageComponent]."
    write(
        tmp_path,
        "camera_image",
        [
            now
            | {
                "key.camera_name": 1,
                camera + "image": data.getvalue(),
                camera + "pose.transform": MOVED.ravel().tolist(),
                camera + "pose_timestamp": 1.5e9,
            }
        ],
    )
    intrinsic = {
        f"[CameraCalibrationComponent].intrinsic.{name}": value
        for name, value in zip(("f_u", "f_v", "c_u", "c_v"), (2000.0, 2000.0, 960.0, 640.0), strict=True)
    }
    write(
        tmp_path,
        "camera_calibration",
        [
            {
                "key.camera_name": 1,
                "[CameraCalibrationComponent].extrinsic.transform": turn(0, 1.5, 0, 2).ravel().tolist(),
                **intrinsic,
            }
        ],
    )
    box = "[LiDARBoxComponent]."
    rows = []
    for kind, points, level in ((1, 12, None), (2, 3, 2), (3, 50, None), (4, 0, None)):
        values = zip(
            ("center.x", "center.y", "center.z", "size.x", "size.y", "size.z", "heading"),
            (10.0, 2.0, 1.0, 4.5, 2.0, 1.6, 0.1),
            strict=True,
        )
        rows.append(
            now
            | {box + f"box.{name}": value for name, value in values}
            | {
                box + "type": kind,
                box + "num_lidar_points_in_box": points,
                box + "difficulty_level.detection": level,
                box + "speed.x": 3.0 if kind == 1 else None,
                box + "speed.y": 0.0,
            }
        )
    write(tmp_path, "lidar_box", rows)
    return tmp_path


def test_points_of_range_images(root: Path) -> None:
    """Each pixel by the definition: rows from the highest beam, columns from behind, clockwise, each laser's own frame."""
    expected = []
    for laser, image in RANGES.items():
        rows, columns = image.shape[:2]
        beams = BEAMS if laser == 1 else [-0.4 + (n + 0.5) * 0.8 / rows for n in range(rows)]
        yaw = math.atan2(EXTRINSIC[laser][1, 0], EXTRINSIC[laser][0, 0])
        for i in range(rows):
            for j in range(columns):
                r, intensity = image[i, j, 0], image[i, j, 1]
                if r > 0:
                    up, around = beams[rows - 1 - i], math.pi * (2 * (columns - j - 0.5) / columns - 1) - yaw
                    ray = [
                        r * math.cos(up) * math.cos(around),
                        r * math.cos(up) * math.sin(around),
                        r * math.sin(up),
                        1,
                    ]
                    point = EXTRINSIC[laser] @ ray
                    if laser == 1:  # moved to where the car is at the frame's time
                        point = np.linalg.inv(WORLD) @ MOVED @ point
                    expected.append([*point[:3], intensity, 0])
    frame = WaymoFrames(root, [(SEGMENT, TIME)]).read(0)
    assert len(frame.points) == 31 + 1 and frame.key.all() and frame.frame == "waymo" and frame.labels is None
    assert np.allclose(frame.points, expected, atol=1e-4)
    frames = open_frames(root)
    assert isinstance(frames, WaymoFrames) and list(frames.times) == [(SEGMENT, 1), (SEGMENT, TIME)]
    assert frames.tokens[1] == frame.token == f"{SEGMENT}_{TIME}"
    bare = frames.read(1, cameras=False)
    assert not bare.cameras and np.array_equal(bare.points, frame.points)


def test_cameras_and_boxes(root: Path) -> None:
    frame = WaymoFrames(root, [(SEGMENT, TIME)]).read(0, labels=True)
    # A point 10 m ahead of the camera, 1 m to its left and 0.5 m up, where the car stood at the camera's time.
    point = np.linalg.inv(WORLD) @ MOVED @ [1.5 + 10, 1, 2 + 0.5, 1]
    uv, depth = frame.pixels(point[None])["FRONT"]
    assert depth[0] == pytest.approx(10) and uv[0] == pytest.approx([960 - 200, 640 - 100])
    labels = frame.labels
    assert (
        labels is not None
        and labels.names == ("vehicle", "pedestrian")
        and labels.attributes == ("", "LEVEL_2")
    )
    assert labels.num_points.tolist() == [12, 3]
    assert labels.boxes[0] == pytest.approx([10, 2, 1, 4.5, 2, 1.6, 0.1, 3, 0])
    assert np.isnan(labels.boxes[1, 7])


def test_what_is_missing_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="vehicle_pose.* has no frame 7"):
        WaymoFrames(root, [(SEGMENT, 7)]).read(0)
    (root / "lidar_pose" / f"{SEGMENT}.parquet").unlink()
    with pytest.raises(UserError, match="lidar_pose.* does not exist; fetch lidar_pose/ of the v2 release"):
        WaymoFrames(root, [(SEGMENT, TIME)]).read(0)
    (root / "lidar" / f"{SEGMENT}.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="lidar/.* cannot be read"):
        WaymoFrames(root, [(SEGMENT, TIME)]).read(0)
    write(root, "lidar", [{"key.frame_timestamp_micros": TIME, "key.laser_name": 1}])
    with pytest.raises(UserError, match=r"cannot be read .*range_image_return1"):
        WaymoFrames(root, [(SEGMENT, TIME)]).read(0)
    import importlib

    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UserError, match=r'needs pyarrow; install it by pip install "vlmkd\[waymo\]"'):
        WaymoFrames.of_folder(root)
