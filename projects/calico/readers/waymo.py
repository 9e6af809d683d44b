"""Waymo Open Dataset v2: its parquet components, read by pyarrow alone (`pip install "vlmkd[waymo]"`).

ROOT is `training` or `validation` of the release, with a folder a component (`lidar/SEGMENT.parquet`, ...). Points and boxes are
in the vehicle's frame (x forward, y left, z up), which is the frame's "LiDAR" frame here. Lens distortion is left out of
projections. The TFRecord release needs TensorFlow and is not read.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from projects.calico.evaluation.waymo import HARD
from projects.calico.scenes import Camera, Frame, FrameKind, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line

Floats = NDArray[np.floating[Any]]
CLASS_OF = {1: "vehicle", 2: "pedestrian", 4: "cyclist"}
CAMERAS = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}
TOP = 1
"""Laser whose points each have a pose of their own (`lidar_pose`)."""
_TIME = "key.frame_timestamp_micros"
_AXES = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""From x right, y down, z forward to Waymo's camera axes: x forward, y left, z up."""


def times(root: Path, segment: str) -> list[int]:
    """Frames of a segment, in microseconds."""
    return sorted({row[_TIME] for row in _rows(root, "vehicle_pose", segment, [_TIME])})


@dataclass(frozen=True)
class WaymoFrames:
    """Frames of a folder of the release: see `scenes.Frames`."""

    root: Path
    times: Sequence[tuple[str, int]]
    """Segment and microseconds of each frame."""
    kind: FrameKind = field(default="waymo", init=False)

    @classmethod
    def of_folder(cls, root: Path) -> WaymoFrames:
        """All frames of all segments."""
        segments = sorted(path.stem for path in (root / "vehicle_pose").glob("*.parquet"))
        return cls(root, [(segment, time) for segment in segments for time in times(root, segment)])

    @property
    def tokens(self) -> Sequence[str]:
        """One a frame."""
        return [f"{segment}_{time}" for segment, time in self.times]

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """Frame number `index`."""
        return read_frame(self.root, *self.times[index], labels=labels, cameras=cameras)


def read_frame(root: Path, segment: str, time: int, *, labels: bool = False, cameras: bool = True) -> Frame:
    """One frame: first returns of all five LiDARs, images, and with `labels` the boxes that hold a point.

    Raises:
        UserError: a component's file or a column is missing, or there is no such frame.
    """
    world = _matrix(
        _rows(root, "vehicle_pose", segment, ["[VehiclePoseComponent].world_from_vehicle.transform"], time)[0]
    )
    points = _points(root, segment, time, world)
    return checked(
        Frame(
            token=f"{segment}_{time}",
            scene=segment,
            frame="waymo",
            points=points,
            key=np.ones(len(points), bool),
            cameras=_cameras(root, segment, time, world) if cameras else {},
            ego2global=world,
            labels=_labels(root, segment, time) if labels else None,
        )
    )


def _rows(
    root: Path, component: str, segment: str, columns: Sequence[str], time: int | None = None
) -> list[dict[str, Any]]:
    """The rows of a component, of one frame or of all."""
    try:
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise UserError('the Waymo reader needs pyarrow; install it by pip install "vlmkd[waymo]"') from None
    path = root / component / f"{segment}.parquet"
    if not path.is_file():
        raise UserError(f"Waymo component {path} does not exist; fetch {component}/ of the v2 release")
    try:
        table = parquet.read_table(
            path, columns=list(columns), filters=None if time is None else [(_TIME, "=", time)]
        )
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"Waymo component {path} cannot be read ({one_line(error)}); fetch it again"
        ) from None
    if not len(table) and component not in ("lidar_box", "camera_image"):
        raise UserError(f"Waymo component {path} has no frame {time}")

    def plain(scalar: Any) -> Any:  # lists as arrays: a range image has 700 000 numbers
        values = getattr(scalar, "values", None)
        return scalar.as_py() if values is None else values.to_numpy(zero_copy_only=False)

    return [{name: plain(table[name][row]) for name in columns} for row in range(len(table))]


def _matrix(row: dict[str, Any]) -> NDArray[np.float64]:
    """The one transform of a row."""
    (value,) = (value for name, value in row.items() if name.endswith(".transform"))
    return np.array(value, np.float64).reshape(4, 4)


def _image(row: dict[str, Any], component: str) -> Floats:
    """The range image of the first return, [H,W,channels]."""
    name = f"[{component}].range_image_return1"
    return np.array(row[f"{name}.values"], np.float64).reshape(row[f"{name}.shape"])


def _points(root: Path, segment: str, time: int, world: NDArray[np.float64]) -> NDArray[np.float32]:
    """[n,5] in the vehicle's frame at the time of the frame."""

    def images(component: str, name: str) -> dict[int, Floats]:
        columns = [
            "key.laser_name",
            *(f"[{name}].range_image_return1.{part}" for part in ("values", "shape")),
        ]
        return {
            row["key.laser_name"]: _image(row, name) for row in _rows(root, component, segment, columns, time)
        }

    ranges, poses = images("lidar", "LiDARComponent"), images("lidar_pose", "LiDARPoseComponent")
    name = "[LiDARCalibrationComponent]"
    columns = [
        "key.laser_name",
        f"{name}.extrinsic.transform",
        *(f"{name}.beam_inclination.{part}" for part in ("min", "max", "values")),
    ]
    clouds = []
    for row in _rows(root, "lidar_calibration", segment, columns):
        laser, extrinsic = row["key.laser_name"], _matrix(row)
        if laser not in ranges:
            raise UserError(
                f"Waymo frame {segment}/{time} has no range image of laser {laser}; fetch lidar/ again"
            )
        low, high, beams = (row[f"{name}.beam_inclination.{part}"] for part in ("min", "max", "values"))
        image = ranges[laser]
        height, width = image.shape[:2]
        if beams is None:
            beams = low + (np.arange(height) + 0.5) * (high - low) / height
        inclination = np.array(beams)[::-1, None]
        azimuth = ((width - np.arange(width) - 0.5) / width * 2 - 1) * np.pi - np.arctan2(
            extrinsic[1, 0], extrinsic[0, 0]
        )
        ray = [
            np.cos(azimuth) * np.cos(inclination),
            np.sin(azimuth) * np.cos(inclination),
            np.sin(inclination) + 0 * azimuth,
        ]
        hit = image[..., 0] > 0
        placed = (np.stack(ray, -1) * image[..., :1])[hit] @ extrinsic[:3, :3].T + extrinsic[:3, 3]
        if laser == TOP and laser in poses:
            placed = _to_frame(placed, poses[laser][hit], world)
        clouds.append(np.concatenate([placed, image[hit][:, 1:2], np.zeros((len(placed), 1))], 1))
    return np.concatenate(clouds).astype(np.float32)


def _to_frame(points: Floats, poses: Floats, world: NDArray[np.float64]) -> Floats:
    """Points [n,3] of the vehicle at their own times (`poses` [n,6]: roll, pitch, yaw, x, y, z), at the frame's."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(poses[:, :3]).T, np.sin(poses[:, :3]).T
    turn = np.stack(
        [
            np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr], -1),
            np.stack([sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr], -1),
            np.stack([-sp, cp * sr, cp * cr], -1),
        ],
        1,
    )
    placed: Floats = np.einsum("nij,nj->ni", turn, points) + poses[:, 3:] - world[:3, 3]
    return placed @ world[:3, :3]


def _cameras(root: Path, segment: str, time: int, world: NDArray[np.float64]) -> dict[str, Camera]:
    name = "[CameraCalibrationComponent]"
    parts = [f"{name}.intrinsic.{part}" for part in ("f_u", "f_v", "c_u", "c_v")]
    calibrations = {
        row["key.camera_name"]: row
        for row in _rows(
            root, "camera_calibration", segment, ["key.camera_name", f"{name}.extrinsic.transform", *parts]
        )
    }
    image, taken = "[CameraImageComponent].image", "[CameraImageComponent].pose_timestamp"
    found = {}
    for row in _rows(
        root,
        "camera_image",
        segment,
        ["key.camera_name", image, "[CameraImageComponent].pose.transform", taken],
        time,
    ):
        calibration = calibrations[row["key.camera_name"]]
        f_u, f_v, c_u, c_v = (calibration[part] for part in parts)
        found[CAMERAS[row["key.camera_name"]]] = Camera(
            image=np.asarray(Image.open(io.BytesIO(row[image])).convert("RGB")),
            intrinsics=np.array([[f_u, 0, c_u], [0, f_v, c_v], [0, 0, 1.0]]),
            cam2lidar=np.linalg.inv(world) @ _matrix(row) @ _matrix(calibration) @ _AXES,
            time=row[taken],
        )
    return found


def _labels(root: Path, segment: str, time: int) -> Labels:
    name = "[LiDARBoxComponent]"
    box = [
        f"{name}.box.{part}"
        for part in (*(f"center.{axis}" for axis in "xyz"), *(f"size.{axis}" for axis in "xyz"), "heading")
    ]
    speed = [f"{name}.speed.x", f"{name}.speed.y"]
    kind, count, level = (
        f"{name}.type",
        f"{name}.num_lidar_points_in_box",
        f"{name}.difficulty_level.detection",
    )
    rows = [
        row
        for row in _rows(root, "lidar_box", segment, [*box, *speed, kind, count, level], time)
        if row[kind] in CLASS_OF and row[count]
    ]
    values = [[np.nan if row[column] is None else row[column] for column in (*box, *speed)] for row in rows]
    return Labels(
        boxes=np.array(values, np.float32).reshape(-1, 9),
        names=tuple(CLASS_OF[row[kind]] for row in rows),
        num_points=np.array([row[count] for row in rows], np.int64),
        attributes=tuple(HARD if row[level] == 2 else "" for row in rows),
    )
