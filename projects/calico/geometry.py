"""Coordinates of points, boxes, bird's-eye cells and pixels: one convention for everything in this folder.

Letters: B batch, V cameras, N points, K boxes, C channels, X, Y, Z cells along the axes, D depth bins, H, W rows and
columns of an image, h, w those of a feature map.

- Lengths are metres in the LiDAR frame of the data set, angles are radians; no data set's axes become another's.
- A box is (x, y, z, l, w, h, yaw[, vx, vy]): gravity centre, yaw counter-clockwise about +z from +x, heading along l.
- A bird's-eye map is [B, C, X, Y]; cell i covers [min + i * cell, min + (i + 1) * cell).
- A pixel is (u, v), column and row; the image holds 0 <= u < W and 0 <= v < H.
- Matrices are 4x4 and act from the left. `lidar_aug` takes a point of the sweep to the augmented frame, in which the
  bird's-eye map lies; `img_aug` takes a pixel (u, v, depth) of the camera's file to the network's image.

Everything is computed as sums of products, not as matrix products, so that autocast leaves it in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn.functional import grid_sample

Three = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Cells between two corners, each three numbers (x, y, z)."""

    min: Three
    max: Three
    cell: Three

    def __post_init__(self) -> None:
        for low, high, size, cells in zip(self.min, self.max, self.cell, self.shape, strict=True):
            if not (size > 0 and cells > 0 and math.isclose(low + cells * size, high, abs_tol=1e-4)):
                raise ValueError(f"{self}: max - min is not a whole number of cells on every axis")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Cells along x, y and z."""
        axes = zip(self.min, self.max, self.cell, strict=True)
        x, y, z = (round((high - low) / size) if size > 0 else 0 for low, high, size in axes)
        return x, y, z

    def index(self, points: Tensor, rounding: Literal["floor", "trunc"] = "floor") -> tuple[Tensor, Tensor]:
        """Cell [..., 2 or 3] of points [..., 2 or 3], int64, and whether it is one of the grid's, bool [...].

        Outside, and for points that are not finite, the index is 0. `trunc` rounds toward zero as BEVFusion's released
        weights expect, which puts points up to a cell below the lower bound into cell 0.
        """
        low, size, shape = (
            points.new_tensor(v[: points.shape[-1]]) for v in (self.min, self.cell, self.shape)
        )
        place = (points - low) / size
        place = place.floor() if rounding == "floor" else place.trunc()
        inside = ((place >= 0) & (place < shape)).all(-1)
        return torch.where(inside[..., None], place, 0.0).long(), inside

    def centre(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Centre of cells [..., 2 or 3], in metres."""
        place = index.to(dtype) + 0.5
        low, size = (place.new_tensor(v[: index.shape[-1]]) for v in (self.min, self.cell))
        return low + place * size

    def normalised(self, points: Tensor) -> Tensor:
        """Points [..., 2 or 3] with the grid's bounds at -1 and 1, in the order x, y[, z]."""
        low, high = (points.new_tensor(v[: points.shape[-1]]) for v in (self.min, self.max))
        return 2 * (points - low) / (high - low) - 1


def bev_sample(bev: Tensor, xy: Tensor, grid: Grid) -> Tensor:
    """Features [B, N, C] of a map [B, C, X, Y] at `xy` [B, N, 2], bilinear between cell centres, zero beyond the map.

    The map covers the grid's bounds with cells of any size; half precision is sampled in float32.
    """
    bev = bev if bev.dtype == torch.float64 else bev.float()
    # grid_sample addresses the last axis first, and that is y.
    place = grid.normalised(xy.to(bev.dtype)).flip(-1)[:, None]
    return grid_sample(bev, place, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0].mT


def transform(points: Tensor, matrix: Tensor) -> Tensor:
    """Points [..., N, 3] under matrices [..., 4, 4] (or 3x3), in the points' dtype."""
    rows = matrix.to(points.dtype)[..., None, :3, :]
    x, y, z = points.split(1, -1)
    moved = x * rows[..., 0] + y * rows[..., 1] + z * rows[..., 2]
    return moved + rows[..., 3] if matrix.shape[-1] == 4 else moved


def frustum(
    image_size: Sequence[int],
    feature_size: Sequence[int],
    depth_bins: Sequence[float],
    pixel_grid: Literal["corner", "center"] = "corner",
) -> Tensor:
    """Pixel and depth (u, v, d) of every feature and depth bin: [D, h, w, 3].

    Sizes are (rows, columns), `depth_bins` (first, end, step) with the end left out. `corner` spreads the features from
    the first to the last pixel, as BEVFusion does; `center` takes the middle of the patch that a feature stands for.
    """
    first, end, step = depth_bins
    depth = first + float(step) * torch.arange(math.ceil((end - first) / step - 1e-6))
    v, u = (
        torch.linspace(0, size - 1, count)
        if pixel_grid == "corner"
        else (torch.arange(count) + 0.5) * (size / count) - 0.5
        for size, count in zip(image_size, feature_size, strict=True)
    )
    d, v, u = torch.meshgrid(depth, v, u, indexing="ij")
    return torch.stack([u, v, d], -1)


def lift_points(
    pixels: Tensor,
    intrinsics: Tensor,
    cam2lidar: Tensor,
    img_aug: Tensor | None = None,
    lidar_aug: Tensor | None = None,
) -> Tensor:
    """Points [B, V, N, 3] of the bird's-eye map's frame for (u, v, depth) [B or 1, V or 1, N, 3] of the network's images.

    lidar_aug cam2lidar K^-1 [u d, v d, d, 1] after img_aug^-1. `intrinsics` [B, V, 3, 3], `cam2lidar` and `img_aug`
    [B, V, 4, 4], `lidar_aug` [B, 4, 4].
    """
    if img_aug is not None:
        pixels = transform(pixels, _inverse(img_aug))
    rays = torch.cat([pixels[..., :2] * pixels[..., 2:], pixels[..., 2:]], -1)
    to_bev = _product(cam2lidar, _square(_inverse(intrinsics)))
    if lidar_aug is not None:
        to_bev = _product(lidar_aug[:, None], to_bev)
    return transform(rays, to_bev)


def project(
    points: Tensor,
    lidar2cam: Tensor,
    intrinsics: Tensor,
    img_aug: Tensor | None = None,
    lidar_aug: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pixels [B, V, N, 2] and depths [B, V, N] of points [B, N, 3] of the map's frame: `lift_points` undone.

    Points behind a camera have a depth of at most 0, and pixels without meaning.
    """
    to_camera = lidar2cam if lidar_aug is None else _product(lidar2cam, _inverse(lidar_aug)[:, None])
    seen = transform(points[:, None], _product(_square(intrinsics), to_camera))
    depth = seen[..., 2:]
    tiny = torch.finfo(depth.dtype).tiny
    pixels = torch.cat([seen[..., :2] / torch.where(depth.abs() > tiny, depth, tiny), depth], -1)
    if img_aug is not None:
        pixels = transform(pixels, img_aug)
    return pixels[..., :2], depth[..., 0]


def in_image(pixels: Tensor, depth: Tensor, image_size: tuple[int, int], nearest: float = 0.0) -> Tensor:
    """Whether pixels [..., 2] lie in an image of (rows, columns), further than `nearest` in front of its camera."""
    u, v = pixels.unbind(-1)
    return (depth > nearest) & (u >= 0) & (u < image_size[1]) & (v >= 0) & (v < image_size[0])


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix.double())


def _product(first: Tensor, second: Tensor) -> Tensor:
    """In float64: a chain of matrices in float32 moves pixels by more than a thousandth."""
    return first.double() @ second.double()


def _square(matrix: Tensor) -> Tensor:
    """3x3 as 4x4."""
    square = torch.eye(4, dtype=torch.float64, device=matrix.device).repeat(*matrix.shape[:-2], 1, 1)
    square[..., :3, :3] = matrix
    return square


def lidar_augmentation(
    yaw: float = 0.0,
    scale: float = 1.0,
    flip_x: bool = False,
    flip_y: bool = False,
    shift: Three = (0.0, 0.0, 0.0),
) -> Tensor:
    """float64 [4, 4]: flips (`flip_x` changes the sign of x), then rotation about z, scale, shift."""
    cos, sin = scale * math.cos(yaw), scale * math.sin(yaw)
    x, y, z = shift
    matrix = [[cos, -sin, 0, x], [sin, cos, 0, y], [0, 0, scale, z], [0, 0, 0, 1]]
    flips = [-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0, 1.0, 1.0]
    return torch.tensor(matrix, dtype=torch.float64) @ torch.tensor(flips, dtype=torch.float64).diag()


def image_augmentation(
    resize: float, crop: tuple[int, int], size: tuple[int, int], flip: bool = False, angle: float = 0.0
) -> Tensor:
    """float64 [4, 4] from a file's pixel (u, v, d) to the network's: resize, crop at (left, top), flip, rotate.

    `size` is (rows, columns) after the crop; the rotation, clockwise on the screen for a negative `angle`, is about
    its middle.
    """
    height, width = size
    matrix = torch.diag(torch.tensor([resize, resize, 1, 1], dtype=torch.float64))
    matrix[:2, 3] = -torch.tensor(crop, dtype=torch.float64)
    if flip:
        matrix[0] = width * matrix[3] - matrix[0]
    turn, middle = lidar_augmentation(-angle), torch.tensor([width / 2, height / 2], dtype=torch.float64)
    turn[:2, 3] = middle - turn[:2, :2] @ middle
    return turn @ matrix


def wrap_yaw(yaw: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return torch.remainder(yaw + math.pi, 2 * math.pi) - math.pi


def box_corners(boxes: Any) -> Tensor:
    """Corners [..., 8, 3] of boxes [..., >= 7], a tensor or an array.

    The bottom's front left, front right, back right, back left; then the top's.
    """
    boxes = torch.as_tensor(boxes)
    signs = [[1, 1], [1, -1], [-1, -1], [-1, 1]]
    unit = 0.5 * boxes.new_tensor([[x, y, z] for z in (-1, 1) for x, y in signs])
    local = unit * boxes[..., None, 3:6]
    cos, sin = boxes[..., 6, None].cos(), boxes[..., 6, None].sin()
    x, y, z = local.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1) + boxes[..., None, :3]


def points_in_boxes(points: Any, boxes: Any) -> Tensor:
    """Whether points [N, >= 3] lie in boxes [K, >= 7], faces included: bool [N, K], of tensors or arrays."""
    points, boxes = torch.as_tensor(points), torch.as_tensor(boxes)
    inside = torch.empty((len(points), len(boxes)), dtype=torch.bool, device=points.device)
    for column, box in enumerate(boxes):  # all at once would be eight arrays [N, K] of float64
        x, y, z = (points[:, :3] - box[:3]).unbind(-1)
        cos, sin = box[6].cos(), box[6].sin()
        along, across = (cos * x + sin * y).abs(), (cos * y - sin * x).abs()
        inside[:, column] = (along <= box[3] / 2) & (across <= box[4] / 2) & (z.abs() <= box[5] / 2)
    return inside


def transform_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Boxes [K, 7 or 9] under one matrix [4, 4] of `lidar_augmentation`; headings and velocities turn along."""
    linear, flat = matrix[:3, :3].to(boxes.dtype), torch.zeros_like(boxes[:, :1])
    size = boxes[:, 3:6] * (linear.double().det().abs() ** (1 / 3)).to(boxes.dtype)
    heading = transform(torch.cat([boxes[:, 6:7].cos(), boxes[:, 6:7].sin(), flat], 1), linear)
    parts = [transform(boxes[:, :3], matrix), size, torch.atan2(heading[:, 1:2], heading[:, :1])]
    if boxes.shape[1] == 9:
        parts.append(transform(torch.cat([boxes[:, 7:9], flat], 1), linear)[:, :2])
    return torch.cat(parts, 1)


def boxes_from_old_mmdet(boxes: Tensor, z: Literal["gravity", "bottom"] = "gravity") -> Tensor:
    """Boxes (x, y, z, w, l, h, yaw'[, vx, vy]) of BEVFusion and mmdetection3d before 1.0 in our convention.

    Their yaw' is -yaw - pi/2; info files hold the gravity centre, box tensors of mmdetection3d the bottom. Undoes itself
    with z="gravity".
    """
    ours = boxes.clone()
    ours[:, 3:5] = boxes[:, [4, 3]]
    ours[:, 6] = wrap_yaw(-boxes[:, 6] - math.pi / 2)
    if z == "bottom":
        ours[:, 2] += boxes[:, 5] / 2
    return ours


def boxes_from_kitti(boxes: Tensor, cam2lidar: Tensor) -> Tensor:
    """Boxes (x, y, z, l, h, w, ry) of KITTI's camera frame, (x, y, z) the middle of the bottom, in the LiDAR's."""
    x, y, z, length, height, width, ry = boxes.unbind(-1)
    centre = transform(torch.stack([x, y, z], -1), cam2lidar)
    centre[..., 2] += height / 2  # as mmdetection3d does, whose counts of points this reproduces
    heading = transform(torch.stack([ry.cos(), torch.zeros_like(ry), -ry.sin()], -1), cam2lidar[:3, :3])
    yaw = torch.atan2(heading[:, 1], heading[:, 0])
    return torch.cat([centre, torch.stack([length, width, height, yaw], -1)], -1)


def pose(quaternion: Any, translation: Any) -> Tensor:
    """float64 [4, 4] of a rotation (w, x, y, z), of any length above 0, and a translation."""
    matrix = torch.eye(4, dtype=torch.float64)
    rotation = Rotation.from_quat(np.roll(np.asarray(quaternion, np.float64), -1))
    matrix[:3, :3] = torch.from_numpy(rotation.as_matrix())
    matrix[:3, 3] = torch.as_tensor(translation, dtype=torch.float64)
    return matrix
