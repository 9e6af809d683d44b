"""Argoverse 2's sensor data set: x forward, y left, z up from the middle of the rear axle (the ego frame).

A log is a folder with `annotations.feather`, `city_SE3_egovehicle.feather`, `calibration/` and `sensors/`; its tables
are read by pyarrow alone (`pip install "vlmkd[waymo]"`). The same tables also come in formats that need no reader, for
tests, without pictures: `sweep_N.npz` (xyz, intensity), `flow_labels_sweep_N.npz` and `annotations_calib.json`. Lens
distortion is left out of projections.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from projects.calico.geometry import pose
from projects.calico.readers.files import read_arrays, read_table
from projects.calico.scenes import Camera, Frame, Frames, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import read_object

_SYNC = 50_000_000
"""Greatest nanoseconds between a sweep and a picture of it."""
_WHAT = "Argoverse table"
_POINT = ("x", "y", "z", "intensity")
_POSE = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
_BOX = ("length_m", "width_m", "height_m", "num_interior_pts", "category")
_LENS = ("sensor_name", "fx_px", "fy_px", "cx_px", "cy_px")
Row = dict[str, Any]


@dataclass(frozen=True)
class ArgoverseFrames(Frames):
    """The sweeps of one log, see `Frames`; of the tables what is missing or damaged is told when it is read."""

    folder: Path
    kind = "av2"

    @cached_property
    def tokens(self) -> Sequence[str]:
        """Nanoseconds; `sweep_0`, ... without Feather tables."""
        return list(self.log["sweeps"])

    @property
    def scenes(self) -> Sequence[str]:
        """The log's name, for each."""
        return [self.log["log_id"]] * len(self.tokens)

    @cached_property
    def _plain(self) -> bool:
        return (self.folder / "annotations_calib.json").is_file()

    @cached_property
    def log(self) -> dict[str, Any]:
        """`log_id`, `sweeps` by token with pose and boxes, `poses` by time, `calibration`."""
        if self._plain:
            found = read_object(self.folder / "annotations_calib.json", "Argoverse log")
            return found | {"sweeps": {f"sweep_{n}": sweep for n, sweep in found["sweeps"].items()}}
        poses = {
            row["timestamp_ns"]: row for row in self._rows("city_SE3_egovehicle", ["timestamp_ns", *_POSE])
        }
        boxes: dict[int, list[Row]] = defaultdict(list)
        if (self.folder / "annotations.feather").is_file():  # the test split has none
            for row in self._rows("annotations", ["timestamp_ns", *_POSE, *_BOX]):
                boxes[row["timestamp_ns"]].append(row)
        times = sorted(int(path.stem) for path in (self.folder / "sensors/lidar").glob("*.feather"))
        if missing := [time for time in times if time not in poses]:
            raise UserError(f"Argoverse log {self.folder} has no pose at {missing[0]}; fetch it again")
        tables = {"intrinsics": _LENS, "egovehicle_SE3_sensor": ("sensor_name", *_POSE)}
        return {
            "log_id": self.folder.name,
            "poses": poses,
            "sweeps": {
                str(time): {"timestamp_ns": time, "city_SE3_egovehicle": poses[time], "boxes": boxes[time]}
                for time in times
            },
            "calibration": {name: self._rows(f"calibration/{name}", needs) for name, needs in tables.items()},
        }

    def _table(self, name: str, needs: Sequence[str]) -> Any:
        return read_table(self.folder / f"{name}.feather", _WHAT, "fetch the log again", needs)

    def _rows(self, name: str, needs: Sequence[str]) -> list[Row]:
        rows: list[Row] = self._table(name, needs).to_pylist()
        return rows

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """Intensity is 0 to 255; the city's frame is the global one."""
        token = self.tokens[index]
        sweep = self.log["sweeps"][token]
        ground = None
        if self._plain:
            arrays = read_arrays(self.folder / f"{token}.npz", _WHAT, needs=("xyz", "intensity"))
            columns = [*arrays["xyz"].T, arrays["intensity"]]
            flow = self.folder / f"flow_labels_{token}.npz"
            if labels and flow.is_file():
                ground = read_arrays(flow, _WHAT, needs=("is_ground",))["is_ground"].astype(bool)
        else:
            table = self._table(f"sensors/lidar/{token}", _POINT)
            columns = [table[name].to_numpy() for name in _POINT]
        points = np.pad(np.stack(columns, 1, dtype=np.float32, casting="unsafe"), ((0, 0), (0, 1)))
        return checked(
            Frame(
                token,
                self.log["log_id"],
                self.kind,
                points,
                np.ones(len(points), bool),
                self._cameras(sweep) if cameras and not self._plain else {},
                ego2global=_matrix(sweep["city_SE3_egovehicle"]),
                labels=_labels(sweep["boxes"], ground) if labels else None,
            )
        )

    def _cameras(self, sweep: Row) -> dict[str, Camera]:
        """The ring's pictures nearest in time, each with the car's motion since."""
        found = {}
        poses, calibration = self.log["poses"], self.log["calibration"]
        mounts = {row["sensor_name"]: _matrix(row) for row in calibration["egovehicle_SE3_sensor"]}
        to_ego = np.linalg.inv(_matrix(sweep["city_SE3_egovehicle"]))
        for row in calibration["intrinsics"]:
            name = row["sensor_name"]
            pictures = {
                int(path.stem): path for path in (self.folder / "sensors/cameras" / name).glob("*.jpg")
            }
            time = min(pictures, key=lambda shot: abs(shot - sweep["timestamp_ns"]), default=None)
            if time is None or not name.startswith("ring_") or abs(time - sweep["timestamp_ns"]) > _SYNC:
                continue
            matrix = np.array([[row["fx_px"], 0, row["cx_px"]], [0, row["fy_px"], row["cy_px"]], [0, 0, 1]])
            moved = to_ego @ _matrix(poses[time]) if time in poses else np.eye(4)
            found[name] = Camera(pictures[time], matrix, moved @ mounts[name])
        return found


def _matrix(row: Row) -> np.ndarray:
    return pose([row[f"q{k}"] for k in "wxyz"], [row[f"t{k}_m"] for k in "xyz"]).numpy()


def _labels(rows: list[Row], ground: np.ndarray | None) -> Labels:
    boxes = np.full((len(rows), 9), np.nan, np.float32)  # it states no velocities
    for row, box in zip(rows, boxes, strict=True):
        matrix = _matrix(row)
        box[:3], box[3:6] = matrix[:3, 3], [row[f"{side}_m"] for side in ("length", "width", "height")]
        box[6] = np.arctan2(matrix[1, 0], matrix[0, 0])
    counts = np.array([row["num_interior_pts"] for row in rows])
    return Labels(boxes, tuple(row["category"] for row in rows), counts, ground=ground)
