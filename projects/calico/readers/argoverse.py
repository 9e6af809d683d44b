"""Argoverse 2 sweeps: x forward, y left, z up from the middle of the rear axle (the ego frame).

The data set's Feather tables need an Arrow reader, which is no requirement here; this reads them after a lossless
change of format: `sweep_N.npz` (xyz, intensity, laser_number, offset_ns), `flow_labels_sweep_N.npz` where there are
any, `annotations_calib.json` (boxes and poses by sweep, calibration), and the vector map `map_*.json` as it is. There
are no pictures.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from projects.calico.geometry import pose
from projects.calico.scenes import Frame, FrameKind, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_object, unreadable


@dataclass(frozen=True)
class ArgoverseFrames:
    """The sweeps of one log."""

    folder: Path
    kind: FrameKind = field(default="av2", init=False)

    @cached_property
    def log(self) -> dict[str, Any]:
        """`annotations_calib.json`."""
        return read_object(self.folder / "annotations_calib.json", "Argoverse log")

    @cached_property
    def tokens(self) -> Sequence[str]:
        """`sweep_0`, ..."""
        return [f"sweep_{number}" for number in self.log["sweeps"]]

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """See `scenes.Frames`. Intensity is 0 to 255; the city's frame is the global one."""
        token = self.tokens[index]
        sweep = self.log["sweeps"][token.removeprefix("sweep_")]
        table = read_table(self.folder / f"{token}.npz")
        points = np.zeros((len(table["xyz"]), 5), np.float32)
        points[:, :3], points[:, 3] = table["xyz"], table["intensity"]
        flow = self.folder / f"flow_labels_{token}.npz"
        ground = read_table(flow)["is_ground"].astype(bool) if labels and flow.is_file() else None
        return checked(
            Frame(
                token=token,
                scene=self.log["log_id"],
                frame="av2",
                points=points,
                key=np.ones(len(points), bool),
                ego2global=_matrix(sweep["city_SE3_egovehicle"]),
                labels=_labels(sweep["boxes"], ground) if labels else None,
            )
        )

    def map_polygons(self, layer: str) -> list[np.ndarray]:
        """Polygons [m, 3] of `drivable_areas` or `pedestrian_crossings`, in the city's frame."""
        path = next(iter(sorted(self.folder.glob("map_*.json"))), self.folder / "map_CITY.json")
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
