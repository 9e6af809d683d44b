"""Argoverse 2's sensor data set: x forward, y left, z up from the middle of the rear axle (the ego frame).

A log is a folder with `annotations.feather`, `city_SE3_egovehicle.feather`, `calibration/`, `sensors/` and `map/`; its
tables are read by pyarrow alone (`pip install "vlmkd[waymo]"`). The same tables also come in formats that need no
reader, for tests: `sweep_N.npz` (xyz, intensity, laser_number, offset_ns), `flow_labels_sweep_N.npz`,
`annotations_calib.json` and `map_*.json`; those hold no pictures. Lens distortion is left out of projections.
"""

from __future__ import annotations

import importlib
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from projects.calico.geometry import pose
from projects.calico.scenes import Camera, Frame, FrameKind, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_object, unreadable

_SYNC = 0.05
"""Greatest seconds between a sweep and a picture of it."""
Row = dict[str, Any]


@dataclass(frozen=True)
class ArgoverseFrames:
    """The sweeps of one log, see `scenes.Frames`.

    Reading raises a UserError where a table or a column is missing or damaged.
    """

    folder: Path
    kind: FrameKind = field(default="av2", init=False)

    @cached_property
    def _plain(self) -> bool:
        return (self.folder / "annotations_calib.json").is_file()

    @cached_property
    def log(self) -> dict[str, Any]:
        """`log_id`, `sweeps` by token with pose and boxes, `calibration`."""
        try:
            if self._plain:
                found = read_object(self.folder / "annotations_calib.json", "Argoverse log")
                found["sweeps"] = {f"sweep_{number}": sweep for number, sweep in found["sweeps"].items()}
                return found
            return self._tables()
        except KeyError as error:
            raise UserError(
                f"Argoverse log {self.folder} has no {error} in its tables; fetch it again"
            ) from None

    def _tables(self) -> dict[str, Any]:
        poses = {
            row["timestamp_ns"]: row
            for row in _feather(self.folder / "city_SE3_egovehicle.feather").to_pylist()
        }
        boxes: dict[int, list[Row]] = defaultdict(list)
        if (path := self.folder / "annotations.feather").is_file():  # the test split has none
            for row in _feather(path).to_pylist():
                boxes[row["timestamp_ns"]].append(row)
        times = sorted(int(path.stem) for path in (self.folder / "sensors/lidar").glob("*.feather"))
        return {
            "log_id": self.folder.name,
            "poses": poses,
            "sweeps": {
                str(time): {"timestamp_ns": time, "city_SE3_egovehicle": poses[time], "boxes": boxes[time]}
                for time in times
            },
            "calibration": {
                name: _feather(self.folder / "calibration" / f"{name}.feather").to_pylist()
                for name in ("intrinsics", "egovehicle_SE3_sensor")
            },
        }

    @cached_property
    def tokens(self) -> Sequence[str]:
        """Nanoseconds; `sweep_0`, ... without Feather tables."""
        return list(self.log["sweeps"])

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """Intensity is 0 to 255; the city's frame is the global one."""
        token = self.tokens[index]
        sweep = self.log["sweeps"][token]
        ground = None
        if self._plain:
            table = read_table(self.folder / f"{token}.npz")
            columns = [*table["xyz"].T, table["intensity"]]
            flow = self.folder / f"flow_labels_{token}.npz"
            ground = read_table(flow)["is_ground"].astype(bool) if labels and flow.is_file() else None
        else:
            table = _feather(self.folder / "sensors/lidar" / f"{token}.feather")
            columns = [table[name].to_numpy() for name in ("x", "y", "z", "intensity")]
        points = np.stack([np.asarray(column, np.float32) for column in columns], 1)
        points = np.pad(points, ((0, 0), (0, 1)))
        return checked(
            Frame(
                token=token,
                scene=self.log["log_id"],
                frame="av2",
                points=points,
                key=np.ones(len(points), bool),
                cameras=self._cameras(sweep) if cameras and not self._plain else {},
                ego2global=_matrix(sweep["city_SE3_egovehicle"]),
                labels=_labels(sweep["boxes"], ground) if labels else None,
            )
        )

    def _cameras(self, sweep: Row) -> dict[str, Camera]:
        """The ring's pictures nearest in time, each with the car's motion since."""
        found = {}
        mounts = {
            row["sensor_name"]: _matrix(row) for row in self.log["calibration"]["egovehicle_SE3_sensor"]
        }
        to_ego = np.linalg.inv(_matrix(sweep["city_SE3_egovehicle"]))
        for row in self.log["calibration"]["intrinsics"]:
            name = row["sensor_name"]
            pictures = sorted((self.folder / "sensors/cameras" / name).glob("*.jpg"))
            if not name.startswith("ring_") or not pictures:
                continue
            best = min(pictures, key=lambda path: abs(int(path.stem) - sweep["timestamp_ns"]))
            time = int(best.stem)
            if abs(time - sweep["timestamp_ns"]) > _SYNC * 1e9:
                continue
            matrix = np.array([[row["fx_px"], 0, row["cx_px"]], [0, row["fy_px"], row["cy_px"]], [0, 0, 1]])
            moved = to_ego @ _matrix(self.log["poses"][time]) if time in self.log["poses"] else np.eye(4)
            found[name] = Camera(best, matrix, moved @ mounts[name], time * 1e-9)
        return found

    def map_polygons(self, layer: str) -> list[np.ndarray]:
        """Polygons [m, 3] of `drivable_areas` or `pedestrian_crossings`, in the city's frame."""
        maps = sorted([*self.folder.glob("map_*.json"), *self.folder.glob("map/log_map_archive_*.json")])
        path = next(iter(maps), self.folder / "map_CITY.json")
        rows = read_object(path, "Argoverse map")[layer].values()
        if layer == "pedestrian_crossings":
            return [_corners(row["edge1"] + row["edge2"][::-1]) for row in rows]
        return [_corners(row["area_boundary"]) for row in rows]


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The columns of an .npz file."""
    try:
        with np.load(path) as columns:
            return dict(columns)
    except OSError as error:
        raise unreadable(error, path, "Argoverse table") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"Argoverse table {path} is damaged ({one_line(error)}); fetch it again") from None


def _feather(path: Path) -> Any:
    """A Feather file as pyarrow's table."""
    try:
        pyarrow, feather = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.feather"))
    except ImportError:
        raise UserError(
            'the Argoverse reader needs pyarrow; install it by pip install "vlmkd[waymo]"'
        ) from None
    try:
        return feather.read_table(path)
    except FileNotFoundError as error:
        raise unreadable(error, path, "Argoverse table", "fetch the log again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"Argoverse table {path} is damaged ({one_line(error)}); fetch it again") from None


def _corners(rows: list[dict[str, float]]) -> np.ndarray:
    return np.array([[row["x"], row["y"], row["z"]] for row in rows])


def _matrix(row: dict[str, float]) -> np.ndarray:
    return pose(
        [row[k] for k in ("qw", "qx", "qy", "qz")], [row[k] for k in ("tx_m", "ty_m", "tz_m")]
    ).numpy()


def _labels(rows: list[dict[str, Any]], ground: np.ndarray | None) -> Labels:
    boxes = np.full((len(rows), 9), np.nan, np.float32)  # it states no velocities
    for row, box in zip(rows, boxes, strict=True):
        matrix = _matrix(row)
        box[:3] = matrix[:3, 3]
        box[3:6] = row["length_m"], row["width_m"], row["height_m"]
        box[6] = np.arctan2(matrix[1, 0], matrix[0, 0])
    counts = np.array([row["num_interior_pts"] for row in rows])
    return Labels(boxes, tuple(row["category"] for row in rows), counts, ground=ground)
