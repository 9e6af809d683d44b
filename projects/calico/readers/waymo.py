"""Waymo Open Dataset v2: its parquet components, read by pyarrow alone (`pip install "vlmkd[waymo]"`).

The folder is `training` or `validation` of the release, with one a component (`lidar/SEGMENT.parquet`, ...). Points and boxes
are in the vehicle's frame (x forward, y left, z up), which stands for the LiDAR's here. Lens distortion is left out of
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
from scipy.spatial.transform import Rotation

from projects.calico.evaluation.waymo import HARD
from projects.calico.scenes import Camera, Frame, FrameKind, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line

CLASS_OF = {1: "vehicle", 2: "pedestrian", 4: "cyclist"}
CAMERAS = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}
_TOP = 1  # laser whose points each have a pose of their own
_COMPONENT = {
    "vehicle_pose": "VehiclePose", "lidar": "LiDAR", "lidar_pose": "LiDARPose", "lidar_calibration": "LiDARCalibration",
    "lidar_box": "LiDARBox", "camera_image": "CameraImage", "camera_calibration": "CameraCalibration",
}  # fmt: skip
_BOX = tuple(f"box.{part}.{axis}" for part in ("center", "size") for axis in "xyz") + (
    "box.heading",
    "speed.x",
    "speed.y",
)
_AXES = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""From x right, y down, z forward to Waymo's camera axes: x forward, y left, z up."""


@dataclass(frozen=True)
class WaymoFrames:
    """Frames of a folder of the release: see `scenes.Frames`.

    Reading raises a UserError where a component's file or column is missing, or there is no such frame.
    """

    root: Path
    times: Sequence[tuple[str, int]]
    """Segment and microseconds of each frame."""
    kind: FrameKind = field(default="waymo", init=False)

    @classmethod
    def of_folder(cls, root: Path) -> WaymoFrames:
        """All frames of all segments."""
        segments = sorted(path.stem for path in (root / "vehicle_pose").glob("*.parquet"))
        column = "key.frame_timestamp_micros"
        rows = [
            (segment, row[column])
            for segment in segments
            for row in _rows(root, "vehicle_pose", segment, None, column)
        ]
        return cls(root, sorted(rows))

    @property
    def tokens(self) -> Sequence[str]:
        """One a frame."""
        return [f"{segment}_{time}" for segment, time in self.times]

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """First returns of all five LiDARs, images, and boxes that hold a point."""
        segment, time = self.times[index]
        (row,) = _rows(self.root, "vehicle_pose", segment, time, "world_from_vehicle.transform")
        world = row["world_from_vehicle.transform"].reshape(4, 4)
        points = _points(self.root, segment, time, world)
        return checked(
            Frame(
                token=f"{segment}_{time}",
                scene=segment,
                frame="waymo",
                points=points,
                key=np.ones(len(points), bool),
                cameras=_cameras(self.root, segment, time, world) if cameras else {},
                ego2global=world,
                labels=_labels(self.root, segment, time) if labels else None,
            )
        )


def _rows(root: Path, component: str, segment: str, time: int | None, *columns: str) -> list[dict[str, Any]]:
    """The rows of a component, of one frame or of all; lists come as arrays."""
    try:
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise UserError('the Waymo reader needs pyarrow; install it by pip install "vlmkd[waymo]"') from None
    path = root / component / f"{segment}.parquet"
    if not path.is_file():
        raise UserError(f"Waymo component {path} does not exist; fetch {component}/ of the v2 release")
    names = [
        one if one.startswith("key.") else f"[{_COMPONENT[component]}Component].{one}" for one in columns
    ]
    try:
        chosen = None if time is None else [("key.frame_timestamp_micros", "=", time)]
        table = parquet.read_table(path, columns=names, filters=chosen)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"Waymo component {path} cannot be read ({one_line(error)}); fetch it again"
        ) from None
    if not len(table) and component not in ("lidar_box", "camera_image"):
        raise UserError(f"Waymo component {path} has no frame {time}")

    def plain(scalar: Any) -> Any:
        values = getattr(scalar, "values", None)
        return scalar.as_py() if values is None else values.to_numpy(zero_copy_only=False)

    return [
        {column: plain(table[name][row]) for column, name in zip(columns, names, strict=True)}
        for row in range(len(table))
    ]


def _points(root: Path, segment: str, time: int, world: NDArray[np.float64]) -> NDArray[np.float32]:
    """[n,5] in the vehicle's frame at the time of the frame."""
    values, shape = "range_image_return1.values", "range_image_return1.shape"

    def images(component: str) -> dict[int, NDArray[Any]]:
        rows = _rows(root, component, segment, time, "key.laser_name", values, shape)
        return {row["key.laser_name"]: row[values].reshape(row[shape]).astype(np.float64) for row in rows}

    ranges, poses, clouds = images("lidar"), images("lidar_pose"), []
    beam = [f"beam_inclination.{part}" for part in ("min", "max", "values")]
    for row in _rows(
        root, "lidar_calibration", segment, None, "key.laser_name", "extrinsic.transform", *beam
    ):
        laser, extrinsic = row["key.laser_name"], row["extrinsic.transform"].reshape(4, 4)
        if laser not in ranges:
            raise UserError(
                f"Waymo frame {segment}_{time} has no range image of laser {laser}; fetch lidar/ again"
            )
        low, high, up = (row[one] for one in beam)
        height, width = ranges[laser].shape[:2]
        if up is None:
            up = low + (np.arange(height) + 0.5) * (high - low) / height
        turn = np.pi * (1 - (2 * np.arange(width) + 1) / width) - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
        rows, columns = np.nonzero(ranges[laser][..., 0] > 0)
        seen, up, turn = ranges[laser][rows, columns], up[::-1][rows], turn[columns]
        ray = np.stack([np.cos(turn) * np.cos(up), np.sin(turn) * np.cos(up), np.sin(up)], 1)
        placed = ray * seen[:, :1] @ extrinsic[:3, :3].T + extrinsic[:3, 3]
        if (
            laser == _TOP and laser in poses
        ):  # from the vehicle at the point's own time: roll, pitch, yaw, x, y, z
            pose = poses[laser][rows, columns]
            placed = Rotation.from_euler("xyz", pose[:, :3]).apply(placed) + pose[:, 3:]
            placed = (placed - world[:3, 3]) @ world[:3, :3]
        clouds.append(np.concatenate([placed, seen[:, 1:2], np.zeros((len(placed), 1))], 1))
    return np.concatenate(clouds).astype(np.float32)


def _cameras(root: Path, segment: str, time: int, world: NDArray[np.float64]) -> dict[str, Camera]:
    name, numbers = "key.camera_name", [f"intrinsic.{part}" for part in ("f_u", "f_v", "c_u", "c_v")]
    rows = _rows(root, "camera_calibration", segment, None, name, "extrinsic.transform", *numbers)
    calibrations = {row[name]: row for row in rows}
    found = {}
    for row in _rows(root, "camera_image", segment, time, name, "image", "pose.transform", "pose_timestamp"):
        calibration = calibrations[row[name]]
        f_u, f_v, c_u, c_v = (calibration[number] for number in numbers)
        extrinsic = calibration["extrinsic.transform"].reshape(4, 4)
        found[CAMERAS[row[name]]] = Camera(
            image=np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")),
            intrinsics=np.array([[f_u, 0, c_u], [0, f_v, c_v], [0, 0, 1.0]]),
            cam2lidar=np.linalg.inv(world) @ row["pose.transform"].reshape(4, 4) @ extrinsic @ _AXES,
            time=row["pose_timestamp"],
        )
    return found


def _labels(root: Path, segment: str, time: int) -> Labels:
    count, level = "num_lidar_points_in_box", "difficulty_level.detection"
    rows = _rows(root, "lidar_box", segment, time, *_BOX, "type", count, level)
    rows = [row for row in rows if row["type"] in CLASS_OF and row[count]]
    values = [[np.nan if row[column] is None else row[column] for column in _BOX] for row in rows]
    return Labels(
        boxes=np.array(values, np.float32).reshape(-1, 9),
        names=tuple(CLASS_OF[row["type"]] for row in rows),
        num_points=np.array([row[count] for row in rows], np.int64),
        attributes=tuple(HARD if row[level] == 2 else "" for row in rows),
    )
