"""The record of a frame: one LiDAR sweep, its cameras, and, apart from them, its labels.

Letters: n points, k boxes, V cameras. Boxes and points are in the LiDAR frame of the data set, see `geometry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from projects.calico.geometry import in_image, project
from vlmkd.errors import UserError
from vlmkd.files import unreadable

FrameKind = Literal["nuscenes", "kitti", "av2", "waymo", "synthdrive"]
Axis = Literal["x", "y"]
DRIVING_AXIS: dict[FrameKind, Axis] = {
    "nuscenes": "y",
    "kitti": "x",
    "av2": "x",
    "waymo": "x",
    "synthdrive": "x",
}
"""The axis along which the car drives: +y in nuScenes (x right), +x elsewhere (y left)."""
SENSOR_HEIGHT: dict[FrameKind, float] = {
    "nuscenes": 1.841,
    "kitti": 1.73,
    "av2": 0.33,
    "waymo": 0.0,
    "synthdrive": 1.8,
}
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
    time: float = 0.0
    """Seconds, on the clock of the data set."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns; of a file, its header is read."""
        if isinstance(self.image, np.ndarray):
            return self.image.shape[0], self.image.shape[1]
        with self._open(self.image) as image:
            return image.height, image.width

    def load(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        if isinstance(self.image, np.ndarray):
            return self.image
        with self._open(self.image) as image:
            try:
                return np.asarray(image.convert("RGB"))
            except OSError as error:
                raise UserError(f"camera image {self.image} is cut off or damaged ({error})") from None

    @staticmethod
    def _open(path: Path) -> Image.Image:
        try:
            return Image.open(path)
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
        rows = len(self.boxes)
        wrong = self.boxes.ndim != 2 or self.boxes.shape[1] != 9
        if wrong or len(self.names) != rows or len(self.num_points) != rows:
            raise ValueError(
                f"boxes {self.boxes.shape}, {len(self.names)} names, {len(self.num_points)} counts"
            )
        if self.attributes and len(self.attributes) != rows:
            raise ValueError(f"{rows} boxes with {len(self.attributes)} attributes")


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

    def without_labels(self) -> Frame:
        """The same for pre-training."""
        return replace(self, labels=None)

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Intrinsics [V, 3, 3] and cam2lidar [V, 4, 4], float64, in the order of `cameras`."""
        cameras = list(self.cameras.values())
        return np.stack([c.intrinsics for c in cameras]), np.stack([c.cam2lidar for c in cameras])

    def pixels(self, points: np.ndarray, nearest: float = 0.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each camera, pixels [n, 2] and depths [n] of points [n, >= 3]; depth 0 when not in its image."""
        placed = torch.as_tensor(points[:, :3], dtype=torch.float64)[None]
        return {name: _seen(camera, placed, nearest) for name, camera in self.cameras.items()}


def _seen(camera: Camera, points: torch.Tensor, nearest: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    intrinsics, cam2lidar = (torch.as_tensor(m)[None, None] for m in (camera.intrinsics, camera.cam2lidar))
    uv, depth = project(points, torch.linalg.inv(cam2lidar.double()), intrinsics)
    seen = in_image(uv, depth, camera.size, nearest)
    return uv[0, 0].numpy(), torch.where(seen, depth, 0.0)[0, 0].numpy()


class Frames(Protocol):
    """The key frames of a data set on disk; `frames.open_frames` finds the right one."""

    @property
    def kind(self) -> FrameKind:
        """Whose axes its frames have."""
        ...

    @property
    def tokens(self) -> Sequence[str]:
        """One a frame, fit for the name of a file."""
        ...

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """Frame number `index`, with labels and pictures only when asked for."""
        ...


def checked(frame: Frame) -> Frame:
    """The frame without points that are not finite, which `dropped` counts.

    Raises:
        UserError: points of another shape, a sweep without points, a matrix that is not finite or cannot be inverted,
            cameras none of which sees a point.
    """
    name = f"frame {frame.token}"
    points = frame.points
    if points.ndim != 2 or points.shape[1] != 5 or len(frame.key) != len(points):
        raise UserError(
            f"{name}: points must be [n, 5] with n key flags; they are {list(points.shape)} with {len(frame.key)}"
        )
    finite = np.isfinite(points).all(1)
    if not (finite & frame.key).any():
        why = f"all of its {len(points)} points are NaN" if len(points) else "its sweep file holds no points"
        raise UserError(f"{name}: the key sweep is empty, {why}; leave the frame out or fetch it again")
    for camera, matrix in _matrices(frame):
        if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
            raise UserError(f"{name}: the calibration of {camera} is not an invertible matrix")
    if not finite.all():
        frame = _kept(frame, finite)
    placed = torch.as_tensor(frame.points[:, :3])[None]
    if frame.cameras and not any((_seen(camera, placed)[1] > 0).any() for camera in frame.cameras.values()):
        raise UserError(
            f"{name}: its calibration puts no point into any of {len(frame.cameras)} images; are cam2lidar and the"
            " intrinsics those of this car, and is cam2lidar not its inverse?"
        )
    return frame


def _matrices(frame: Frame) -> list[tuple[str, Any]]:
    found = [(n, m) for n, c in frame.cameras.items() for m in (c.intrinsics, c.cam2lidar)]
    return [*found, ("lidar2ego", frame.lidar2ego), ("ego2global", frame.ego2global)]


def _kept(frame: Frame, keep: np.ndarray) -> Frame:
    labels = frame.labels
    if labels is not None:
        labels = replace(
            labels,
            instance=None if labels.instance is None else labels.instance[keep],
            ground=None if labels.ground is None else labels.ground[keep],
        )
    dropped = frame.dropped + int((~keep).sum())
    return replace(frame, points=frame.points[keep], key=frame.key[keep], labels=labels, dropped=dropped)
