"""KITTI's object data set: x forward, y left, z up from the LiDAR; one picture, the left colour camera's.

Boxes of its labels are in the frame of the rectified camera 0, with the middle of the bottom, and come out in the
LiDAR's, see `geometry.boxes_from_kitti`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from projects.calico.geometry import boxes_from_kitti, points_in_boxes
from projects.calico.scenes import Camera, Frame, FrameKind, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_object, read_text, unreadable


@dataclass(frozen=True)
class Record:
    """What the files around a sweep say."""

    velodyne: Path
    image: Path
    projection: np.ndarray
    """[3, 4], from the rectified camera 0 to pixels of camera 2: K [I | t]."""
    lidar2cam: np.ndarray
    """[4, 4], to the rectified camera 0."""
    boxes: np.ndarray
    """[k, 7]: x, y, z, l, h, w, ry in camera 0."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class KittiFrames:
    """The frames of KITTI's folders, or of an info file of mmdetection3d 1.1."""

    tokens: Sequence[str]
    record: Callable[[int], Record]
    kind: FrameKind = field(default="kitti", init=False)

    @classmethod
    def of_folder(cls, folder: Path) -> KittiFrames:
        """`velodyne`, `image_2`, `calib` and, for labels, `label_2`, here or in `training`."""
        folder = folder if (folder / "velodyne").is_dir() else folder / "training"
        tokens = sorted(path.stem for path in (folder / "velodyne").glob("*.bin"))
        if not tokens:
            raise UserError(f"{folder / 'velodyne'} holds no .bin files; fetch KITTI's velodyne archive")
        return cls(tokens, _Folder(folder, tokens))

    @classmethod
    def of_info(cls, path: Path) -> KittiFrames:
        """Files lie beside the info file."""
        rows = read_object(path, "info file").get("data_list")
        if not isinstance(rows, list) or not all("CAM2" in row.get("images", ()) for row in rows):
            raise UserError(
                f"info file {path} is not one of KITTI, version 1.1: it has no data_list with CAM2"
            )
        names = {2: "Car", 0: "Pedestrian", 1: "Cyclist"}
        return cls(
            [Path(row["lidar_points"]["lidar_path"]).stem for row in rows], _Info(path.parent, rows, names)
        )

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """See `scenes.Frames`. Intensity is the reflectance, 0 to 1; counts of points in boxes are our own."""
        record = self.record(index)
        try:
            values = np.fromfile(record.velodyne, np.float32)
        except OSError as error:
            raise unreadable(error, record.velodyne, "LiDAR sweep") from None
        if len(values) % 4:
            raise UserError(
                f"LiDAR sweep {record.velodyne} is cut off: {len(values)} numbers are no rows of four"
            )
        points = np.pad(values.reshape(-1, 4), ((0, 0), (0, 1)))
        cam2lidar = np.linalg.inv(record.lidar2cam)
        seen = {}
        if cameras:
            shift = np.eye(4)  # camera 2 stands beside camera 0
            shift[:3, 3] = np.linalg.solve(record.projection[:, :3], record.projection[:, 3])
            seen["CAM2"] = Camera(
                record.image, record.projection[:, :3], np.linalg.inv(shift @ record.lidar2cam)
            )
        return checked(
            Frame(
                token=self.tokens[index],
                scene=self.tokens[index],
                frame="kitti",
                points=points,
                key=np.ones(len(points), bool),
                cameras=seen,
                labels=_labels(record, points, cam2lidar) if labels else None,
            )
        )


def _labels(record: Record, points: np.ndarray, cam2lidar: np.ndarray) -> Labels:
    boxes = boxes_from_kitti(torch.as_tensor(record.boxes), torch.as_tensor(cam2lidar)).numpy()
    unknown = np.full((len(boxes), 2), np.nan)
    counts = points_in_boxes(points, boxes).sum(0).numpy()
    return Labels(np.concatenate([boxes, unknown], 1).astype(np.float32), record.names, counts)


@dataclass(frozen=True)
class _Folder:
    folder: Path
    tokens: Sequence[str]

    def __call__(self, index: int) -> Record:
        token = self.tokens[index]
        path = self.folder / "calib" / f"{token}.txt"
        try:
            rows = dict(
                line.split(":") for line in read_text(path, "KITTI calibration").splitlines() if ":" in line
            )
            numbers = {key: np.array(values.split(), float) for key, values in rows.items()}
            projection, rectify = numbers["P2"].reshape(3, 4), np.eye(4)
            rectify[:3, :3] = numbers["R0_rect"].reshape(3, 3)
            lidar2cam = rectify @ np.vstack([numbers["Tr_velo_to_cam"].reshape(3, 4), [0, 0, 0, 1]])
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"KITTI calibration {path} has no usable P2, R0_rect and Tr_velo_to_cam ({one_line(error)})"
            ) from None
        boxes, names = self._boxes(self.folder / "label_2" / f"{token}.txt")
        velodyne = self.folder / "velodyne" / f"{token}.bin"
        return Record(velodyne, self.folder / "image_2" / f"{token}.png", projection, lidar2cam, boxes, names)

    @staticmethod
    def _boxes(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
        """None without a label file: the test split has no such folder."""
        lines = read_text(path, "KITTI labels").splitlines() if path.is_file() else []
        rows = [line.split() for line in lines if line.strip() and not line.startswith("DontCare")]
        try:
            sizes = np.array([row[8:15] for row in rows], float).reshape(-1, 7)
        except ValueError as error:
            raise UserError(f"KITTI labels {path} are damaged ({one_line(error)})") from None
        height, width, length, x, y, z, ry = sizes.T
        return np.stack([x, y, z, length, height, width, ry], 1), tuple(row[0] for row in rows)


@dataclass(frozen=True)
class _Info:
    folder: Path
    rows: list[dict[str, Any]]
    names: dict[int, str]

    def __call__(self, index: int) -> Record:
        row = self.rows[index]
        camera = row["images"]["CAM2"]
        things = [one for one in row["instances"] if one["bbox_label_3d"] in self.names]
        return Record(
            self.folder / row["lidar_points"]["lidar_path"],
            self.folder / camera["img_path"],
            np.array(camera["cam2img"])[:3],
            np.array(camera["lidar2cam"]),
            np.array([one["bbox_3d"] for one in things], float).reshape(-1, 7),
            tuple(self.names[one["bbox_label_3d"]] for one in things),
        )
