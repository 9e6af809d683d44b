"""Waymo Open Dataset v2: its parquet components, read by pyarrow alone (`pip install "vlmkd[waymo]"`).

The folder is `training` or `validation` of the release, with one a component (`lidar/SEGMENT.parquet`, ...). Points and boxes
are in the vehicle's frame (x forward, y left, z up), which stands for the LiDAR's here. Lens distortion is left out of
projections. The TFRecord release needs TensorFlow and is not read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from projects.calico.evaluation.waymo import HARD
from projects.calico.readers.files import read_table
from projects.calico.scenes import Camera, Frame, Frames, Labels, checked
from vlmkd.errors import UserError

CLASS_OF = {1: "vehicle", 2: "pedestrian", 4: "cyclist"}
CAMERAS = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}
_TOP = 1  # laser whose points each have a pose of their own
_COMPONENT = {
    "vehicle_pose": "VehiclePose", "lidar": "LiDAR", "lidar_pose": "LiDARPose", "lidar_calibration": "LiDARCalibration",
    "lidar_box": "LiDARBox", "camera_image": "CameraImage", "camera_calibration": "CameraCalibration",
}  # fmt: skip
_TIME, _LASER, _CAMERA = (f"key.{one}" for one in ("frame_timestamp_micros", "laser_name", "camera_name"))
_BOX = (
    *(f"box.{part}.{axis}" for part in ("center", "size") for axis in "xyz"),
    *("box.heading", "speed.x", "speed.y"),
)
_AXES = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""From x right, y down, z forward to Waymo's camera axes: x forward, y left, z up."""
Row = dict[str, Any]


@dataclass(frozen=True)
class WaymoFrames(Frames):
    """Frames of a folder of the release, see `Frames`; what is missing or damaged is told when it is read."""

    root: Path
    times: Sequence[tuple[str, int]]
    """Segment and microseconds of each frame."""
    kind = "waymo"

    @classmethod
    def of_folder(cls, root: Path) -> WaymoFrames:
        """All frames of all segments."""
        segments = sorted(path.stem for path in (root / "vehicle_pose").glob("*.parquet"))
        frames = ((one, row) for one in segments for row in _rows(root, "vehicle_pose", one, None, _TIME))
        return cls(root, sorted((segment, row[_TIME]) for segment, row in frames))

    @property
    def tokens(self) -> Sequence[str]:
        """Segment and time."""
        return [f"{segment}_{time}" for segment, time in self.times]

    @property
    def scenes(self) -> Sequence[str]:
        """The segments."""
        return [segment for segment, _ in self.times]

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """First returns of all five LiDARs, images, and boxes that hold a point."""
        segment, time = at = self.times[index]
        (row,) = _rows(self.root, "vehicle_pose", *at, "world_from_vehicle.transform")
        world = row["world_from_vehicle.transform"].reshape(4, 4)
        points = _points(self.root, segment, time, world)
        return checked(
            Frame(
                f"{segment}_{time}",
                segment,
                self.kind,
                points,
                np.ones(len(points), bool),
                _cameras(self.root, segment, time, world) if cameras else {},
                ego2global=world,
                labels=_labels(self.root, segment, time) if labels else None,
            )
        )


def _rows(root: Path, component: str, segment: str, time: int | None, *columns: str) -> list[Row]:
    """The rows of a component, of one frame or of all; lists come as arrays."""
    path = root / component / f"{segment}.parquet"
    head = f"[{_COMPONENT[component]}Component]."
    names = [one if one.startswith("key.") else head + one for one in columns]
    chosen = None if time is None else [(_TIME, "=", time)]
    mend = f"fetch {component}/ of the v2 release"
    table = read_table(path, "Waymo component", mend, columns=names, filters=chosen)
    if not len(table) and component not in ("lidar_box", "camera_image"):
        raise UserError(f"Waymo component {path} has no frame {time}")

    def plain(scalar: Any) -> Any:
        values = getattr(scalar, "values", None)
        return scalar.as_py() if values is None else values.to_numpy(zero_copy_only=False)

    pairs = list(zip(columns, names, strict=True))
    return [{column: plain(table[name][row]) for column, name in pairs} for row in range(len(table))]


def _points(root: Path, segment: str, time: int, world: NDArray[np.float64]) -> NDArray[np.float32]:
    """[n,5] in the vehicle's frame at the time of the frame."""
    values, shape = "range_image_return1.values", "range_image_return1.shape"

    def images(component: str) -> dict[int, NDArray[Any]]:
        rows = _rows(root, component, segment, time, _LASER, values, shape)
        return {row[_LASER]: row[values].reshape(row[shape]).astype(np.float64) for row in rows}

    ranges, poses, clouds = images("lidar"), images("lidar_pose"), []
    beam = [f"beam_inclination.{part}" for part in ("min", "max", "values")]
    for row in _rows(root, "lidar_calibration", segment, None, _LASER, "extrinsic.transform", *beam):
        laser, extrinsic = row[_LASER], row["extrinsic.transform"].reshape(4, 4)
        if laser not in ranges:
            told = f"Waymo frame {segment}_{time} has no range image of laser {laser}"
            raise UserError(f"{told}; fetch lidar/ again")
        low, high, up = (row[one] for one in beam)
        height, width = ranges[laser].shape[:2]
        if up is None:
            up = low + (np.arange(height) + 0.5) * (high - low) / height
        turn = np.pi * (1 - (2 * np.arange(width) + 1) / width) - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
        rows, columns = np.nonzero(ranges[laser][..., 0] > 0)
        seen, up, turn = ranges[laser][rows, columns], up[::-1][rows], turn[columns]
        ray = np.stack([np.cos(turn) * np.cos(up), np.sin(turn) * np.cos(up), np.sin(up)], 1)
        placed = ray * seen[:, :1] @ extrinsic[:3, :3].T + extrinsic[:3, 3]
        if laser == _TOP and laser in poses:
            own = poses[laser][
                rows, columns
            ]  # of the vehicle, at the point's time: roll, pitch, yaw, x, y, z
            placed = Rotation.from_euler("xyz", own[:, :3]).apply(placed) + own[:, 3:]
            placed = (placed - world[:3, 3]) @ world[:3, :3]
        clouds.append(np.column_stack([placed, seen[:, 1], np.zeros(len(placed))]))
    return np.concatenate(clouds).astype(np.float32)


def _cameras(root: Path, segment: str, time: int, world: NDArray[np.float64]) -> dict[str, Camera]:
    numbers = [f"intrinsic.{part}" for part in ("f_u", "f_v", "c_u", "c_v")]
    rows = _rows(root, "camera_calibration", segment, None, _CAMERA, "extrinsic.transform", *numbers)
    calibrations = {row[_CAMERA]: row for row in rows}
    found = {}
    for row in _rows(root, "camera_image", segment, time, _CAMERA, "image", "pose.transform"):
        calibration = calibrations[row[_CAMERA]]
        f_u, f_v, c_u, c_v = (calibration[number] for number in numbers)
        vehicle, mount = row["pose.transform"], calibration["extrinsic.transform"]
        found[CAMERAS[row[_CAMERA]]] = Camera(
            image=np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")),
            intrinsics=np.array([[f_u, 0, c_u], [0, f_v, c_v], [0, 0, 1.0]]),
            cam2lidar=np.linalg.inv(world) @ vehicle.reshape(4, 4) @ mount.reshape(4, 4) @ _AXES,
        )
    return found


def _labels(root: Path, segment: str, time: int) -> Labels:
    count, level = "num_lidar_points_in_box", "difficulty_level.detection"
    rows = _rows(root, "lidar_box", segment, time, *_BOX, "type", count, level)
    rows = [row for row in rows if row["type"] in CLASS_OF and row[count]]
    return Labels(
        boxes=np.array([[row[column] for column in _BOX] for row in rows], np.float32).reshape(-1, 9),
        names=tuple(CLASS_OF[row["type"]] for row in rows),
        num_points=np.array([row[count] for row in rows], np.int64),
        attributes=tuple(HARD if row[level] == 2 else "" for row in rows),
    )
