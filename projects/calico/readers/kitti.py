"""KITTI's object data set: x forward, y left, z up from the LiDAR; one picture, the left colour camera's.

Boxes of its labels are in the frame of the rectified camera 0, with the middle of the bottom, and come out in the
LiDAR's, see `geometry.boxes_from_kitti`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from projects.calico.geometry import boxes_from_kitti, points_in_boxes
from projects.calico.readers.files import read_sweep
from projects.calico.scenes import Camera, Frame, Frames, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_object, read_text

CLASS_OF = {0: "Pedestrian", 1: "Cyclist", 2: "Car"}
"""By the labels of mmdetection3d's info files."""


class Record(NamedTuple):
    """What the files around a sweep say."""

    sweep: Path
    image: Path
    projection: np.ndarray
    """[3, 4], from the rectified camera 0 to pixels of camera 2: K [I | t]."""
    lidar2cam: np.ndarray
    """[4, 4], to the rectified camera 0."""
    boxes: np.ndarray
    """[k, 7]: x, y, z, l, h, w, ry in camera 0."""
    names: Sequence[str]


@dataclass(frozen=True)
class KittiFrames(Frames):
    """The frames of KITTI's folders, or of an info file of mmdetection3d 1.1, whose files lie beside it."""

    folder: Path
    tokens: Sequence[str]
    rows: Sequence[Any] = ()
    """Of the info file."""
    kind = "kitti"

    @classmethod
    def of_folder(cls, folder: Path) -> KittiFrames:
        """`velodyne`, `image_2`, `calib` and, for labels, `label_2`, here or in `training`."""
        folder = folder if (folder / "velodyne").is_dir() else folder / "training"
        tokens = sorted(path.stem for path in (folder / "velodyne").glob("*.bin"))
        if not tokens:
            raise UserError(f"{folder / 'velodyne'} holds no .bin files; fetch KITTI's velodyne archive")
        return cls(folder, tokens)

    @classmethod
    def of_info(cls, path: Path) -> KittiFrames:
        """The frames of an info file."""
        rows = read_object(path, "info file").get("data_list")
        if not isinstance(rows, list) or not all("CAM2" in row.get("images", ()) for row in rows):
            raise UserError(
                f"info file {path} is not one of KITTI, version 1.1: it has no data_list with CAM2"
            )
        return cls(path.parent, [Path(row["lidar_points"]["lidar_path"]).stem for row in rows], rows)

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """See `Frames`. Intensity is the reflectance, 0 to 1; counts of points in boxes are our own."""
        record = self._listed(self.rows[index]) if self.rows else self._filed(self.tokens[index])
        points = np.pad(read_sweep(record.sweep, 4), ((0, 0), (0, 1)))
        seen, drawn = {}, None
        if cameras:
            intrinsics, shift = record.projection[:, :3], np.eye(4)
            shift[:3, 3] = np.linalg.solve(intrinsics, record.projection[:, 3])  # it stands beside camera 0
            seen["CAM2"] = Camera(record.image, intrinsics, np.linalg.inv(shift @ record.lidar2cam))
        if labels:
            cam2lidar = torch.as_tensor(np.linalg.inv(record.lidar2cam))
            boxes = boxes_from_kitti(torch.as_tensor(record.boxes), cam2lidar).numpy()
            counts = points_in_boxes(points, boxes).sum(0).numpy()
            boxes = np.pad(boxes, ((0, 0), (0, 2)), constant_values=np.nan).astype(np.float32)
            drawn = Labels(boxes, tuple(record.names), counts)
        token, key = self.tokens[index], np.ones(len(points), bool)
        return checked(Frame(token, token, self.kind, points, key, seen, labels=drawn))

    def _listed(self, row: dict[str, Any]) -> Record:
        camera = row["images"]["CAM2"]
        things = [one for one in row["instances"] if one["bbox_label_3d"] in CLASS_OF]
        return Record(
            self.folder / row["lidar_points"]["lidar_path"],
            self.folder / camera["img_path"],
            np.array(camera["cam2img"])[:3],
            np.array(camera["lidar2cam"]),
            np.array([one["bbox_3d"] for one in things], float).reshape(-1, 7),
            [CLASS_OF[one["bbox_label_3d"]] for one in things],
        )

    def _filed(self, token: str) -> Record:
        path, rectify = self.folder / "calib" / f"{token}.txt", np.eye(4)
        lines = read_text(path, "KITTI calibration").splitlines()
        try:
            numbers = {
                key: np.array(values.split(), float)
                for key, _, values in (line.partition(":") for line in lines)
            }
            projection = numbers["P2"].reshape(3, 4)
            rectify[:3, :3] = numbers["R0_rect"].reshape(3, 3)
            lidar2cam = rectify @ np.vstack([numbers["Tr_velo_to_cam"].reshape(3, 4), [0, 0, 0, 1]])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"KITTI calibration {path} has no usable P2, R0_rect and Tr_velo_to_cam ({one_line(error)})"
            ) from None
        path = self.folder / "label_2" / f"{token}.txt"  # which the test split has not
        lines = read_text(path, "KITTI labels").splitlines() if path.is_file() else []
        rows = [line.split() for line in lines if line.strip() and not line.startswith("DontCare")]
        try:
            height, width, length, *place = np.array([row[8:15] for row in rows], float).reshape(-1, 7).T
        except ValueError as error:
            raise UserError(f"KITTI labels {path} are damaged ({one_line(error)})") from None
        x, y, z, ry = place
        return Record(
            self.folder / "velodyne" / f"{token}.bin",
            self.folder / "image_2" / f"{token}.png",
            projection,
            lidar2cam,
            np.stack([x, y, z, length, height, width, ry], 1),
            [row[0] for row in rows],
        )
