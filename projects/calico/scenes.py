"""The record of a frame: one LiDAR sweep, its cameras, and, apart from them, its labels.

Letters: n points, k boxes, V cameras. Boxes and points are in the LiDAR frame of the data set, see `geometry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from projects.calico.geometry import in_image, project
from vlmkd.errors import UserError
from vlmkd.files import unreadable

FrameKind = Literal["nuscenes", "kitti", "av2", "waymo", "synthdrive"]
Axis = Literal["x", "y"]
DRIVING_AXIS: dict[FrameKind, Axis] = dict(nuscenes="y", kitti="x", av2="x", waymo="x", synthdrive="x")
"""The axis along which the car drives: +y in nuScenes (x right), +x elsewhere (y left)."""
SENSOR_HEIGHT: dict[FrameKind, float] = dict(nuscenes=1.841, kitti=1.73, av2=0.33, waymo=0.0, synthdrive=1.8)
"""Metres from the ground to the origin of the points: the LiDAR, in AV2 the rear axle, in Waymo the ground."""


@dataclass(frozen=True)
class Camera:
    """One picture and where it was taken, at its own time."""

    image: Path | np.ndarray
    """A file, or uint8 [H, W, 3]."""
    intrinsics: np.ndarray
    """float64 [3, 3]."""
    cam2lidar: np.ndarray
    """float64 [4, 4], from the camera at its time to the LiDAR frame of the sweep."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns; of a file, its header is read."""
        if isinstance(self.image, np.ndarray):
            return self.image.shape[0], self.image.shape[1]
        with _opened(self.image) as image:
            return image.height, image.width

    def load(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        if isinstance(self.image, np.ndarray):
            return self.image
        with _opened(self.image) as image:
            return np.asarray(image.convert("RGB"))

    def pixels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [n, 2] and depths [n] of points [n, >= 3]; depth 0 for those that are not in the picture."""
        placed = torch.as_tensor(points[:, :3], dtype=torch.float64)[None]
        intrinsics, cam2lidar = (torch.as_tensor(m)[None, None] for m in (self.intrinsics, self.cam2lidar))
        uv, depth = project(placed, torch.linalg.inv(cam2lidar.double()), intrinsics)
        depth = torch.where(in_image(uv, depth, self.size), depth, 0.0)
        return uv[0, 0].numpy(), depth[0, 0].numpy()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:
        raise unreadable(error, path, "camera image") from None


@dataclass(frozen=True)
class Labels:
    """What people drew: a pre-training run never holds one."""

    boxes: np.ndarray
    """float32 [k, 9]; a velocity that is not known is NaN."""
    names: tuple[str, ...]
    num_points: np.ndarray
    """int [k], LiDAR points in each box as the data set states them."""
    attributes: tuple[str, ...] = ()
    """One a box, "" for none; or empty when the data set has none."""
    instance: np.ndarray | None = None
    """int16 [n]: the row of `boxes` that a point lies on, -1 for none."""
    ground: np.ndarray | None = None
    """bool [n]: whether a point lies on the ground."""
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    """Map layers, each bool [X, Y]."""

    def __post_init__(self) -> None:
        rows, attributes = len(self.names), len(self.attributes)
        if self.boxes.shape != (rows, 9) or len(self.num_points) != rows or attributes not in (0, rows):
            counts = f"{rows} names, {len(self.num_points)} counts, {attributes} attributes"
            raise ValueError(f"boxes {self.boxes.shape}, {counts}")


@dataclass(frozen=True)
class Frame:
    """One key frame. Readers return it through `checked`."""

    token: str
    scene: str
    frame: FrameKind
    points: np.ndarray
    """float32 [n, 5]: x, y, z, intensity in the data set's unit, seconds before the key sweep (0 or more)."""
    key: np.ndarray
    """bool [n]: points of the key sweep."""
    cameras: dict[str, Camera] = field(default_factory=dict)
    lidar2ego: np.ndarray = field(default_factory=lambda: np.eye(4))
    ego2global: np.ndarray = field(default_factory=lambda: np.eye(4))
    labels: Labels | None = None
    dropped: int = 0
    """Points that `checked` took out because one of their numbers was NaN or infinite."""

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Intrinsics [V, 3, 3] and cam2lidar [V, 4, 4], float64, in the order of `cameras`."""
        cameras = self.cameras.values()
        return np.stack([c.intrinsics for c in cameras]), np.stack([c.cam2lidar for c in cameras])

    def pixels(self, points: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What each camera sees of points, see `Camera.pixels`."""
        return {name: camera.pixels(points) for name, camera in self.cameras.items()}


class Frames(ABC):
    """The key frames of a data set on disk; `frames.open_frames` finds the right one."""

    kind: ClassVar[FrameKind]
    tokens: Sequence[str]
    """One a frame, fit for the name of a file."""

    @abstractmethod
    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """Frame number `index`, with labels and pictures only when asked for."""

    @property
    def scenes(self) -> Sequence[str]:
        """The drive of each frame; where the data set does not tell, each is one."""
        return self.tokens

    def classes(self, index: int) -> Sequence[str]:
        """Of the labelled objects of a frame that hold a point."""
        labels = self.read(index, labels=True, cameras=False).labels
        return [] if labels is None else [labels.names[row] for row in np.flatnonzero(labels.num_points)]


def checked(frame: Frame) -> Frame:
    """The frame without points that are not finite, which `dropped` counts.

    Raises:
        UserError: points of another shape, a sweep without points, a matrix that is not finite or cannot be inverted,
            cameras none of which sees a point.
    """
    name, points, labels = f"frame {frame.token}", frame.points, frame.labels
    if points.shape != (len(frame.key), 5):
        found = f"{list(points.shape)} with {len(frame.key)}"
        raise UserError(f"{name}: points must be [n, 5] with n key flags; they are {found}")
    finite = np.isfinite(points).all(1)
    if not (finite & frame.key).any():
        why = f"all of its {len(points)} points are NaN" if len(points) else "its sweep file holds no points"
        raise UserError(f"{name}: the key sweep is empty, {why}; leave the frame out or fetch it again")
    matrices = [(n, m) for n, c in frame.cameras.items() for m in (c.intrinsics, c.cam2lidar)]
    for which, matrix in (*matrices, ("lidar2ego", frame.lidar2ego), ("ego2global", frame.ego2global)):
        if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
            raise UserError(f"{name}: the calibration of {which} is not an invertible matrix")
    if not finite.all():
        if labels is not None:
            instance, ground = (
                one if one is None else one[finite] for one in (labels.instance, labels.ground)
            )
            labels = replace(labels, instance=instance, ground=ground)
        dropped = frame.dropped + int((~finite).sum())
        frame = replace(frame, points=points[finite], key=frame.key[finite], labels=labels, dropped=dropped)
    cameras = frame.cameras.values()
    if cameras and not any(camera.pixels(frame.points)[1].any() for camera in cameras):
        raise UserError(
            f"{name}: its calibration puts no point into any of {len(cameras)} images; are cam2lidar and the"
            " intrinsics those of this car, and is cam2lidar not its inverse?"
        )
    return frame
