"""Coordinates of points, boxes, bird's-eye cells and pixels: one convention for everything in this folder.

Letters: B batch, V cameras, N points, K boxes, C channels, X, Y, Z cells along the axes, D depth bins, H, W rows and
columns of an image, h, w those of a feature map.

- Lengths are metres in the LiDAR frame of the data set, angles are radians. Nothing here turns one data set's axes
  into another's.
- A box is (x, y, z, l, w, h, yaw[, vx, vy]): gravity centre, yaw counter-clockwise about +z from +x, heading along l.
- A bird's-eye map is [B, C, X, Y]; cell i covers [min + i * cell, min + (i + 1) * cell).
- A pixel is (u, v), column and row; the image holds 0 <= u < W and 0 <= v < H.
- Matrices are 4x4 and act from the left. `lidar_aug` takes a point of the sweep to the augmented frame, in which the
  bird's-eye map lies; `img_aug` takes a pixel (u, v, depth) of the camera's file to the network's image.

Everything is computed as sums of products, not as matrix products, so that autocast leaves it in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

Rounding = Literal["floor", "trunc"]
PixelGrid = Literal["corner", "center"]


@dataclass(frozen=True)
class Grid:
    """Cells between two corners, each three numbers (x, y, z)."""

    min: tuple[float, float, float]
    max: tuple[float, float, float]
    cell: tuple[float, float, float]

    def __post_init__(self) -> None:
        for low, high, size, cells in zip(self.min, self.max, self.cell, self.shape, strict=True):
            if not (size > 0 and cells > 0 and math.isclose(low + cells * size, high, abs_tol=1e-4)):
                raise ValueError(f"{self}: max - min is not a whole number of cells on every axis")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Cells along x, y and z."""
        x, y, z = (
            round((high - low) / size) if size > 0 else 0
            for low, high, size in zip(self.min, self.max, self.cell, strict=True)
        )
        return x, y, z

    def index(self, points: Tensor, rounding: Rounding = "floor") -> tuple[Tensor, Tensor]:
        """Cell [..., 2 or 3] of points [..., 2 or 3], int64, and whether it is one of the grid's, bool [...].

        Outside the grid, and for points that are not finite, the index is 0. `trunc` rounds toward zero as BEVFusion
        does, which puts points up to a cell below the lower bound into cell 0; it is for its released weights only.
        """
        axes = points.shape[-1]
        low, size = self._axis(points, self.min, axes), self._axis(points, self.cell, axes)
        place = (points - low) / size
        place = place.floor() if rounding == "floor" else place.trunc()
        inside = ((place >= 0) & (place < place.new_tensor(self.shape[:axes]))).all(-1)
        return torch.where(inside[..., None], place, 0.0).long(), inside

    def centre(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Centre of cells [..., 2 or 3], in metres."""
        place = index.to(dtype) + 0.5
        axes = index.shape[-1]
        return self._axis(place, self.min, axes) + place * self._axis(place, self.cell, axes)

    def normalised(self, points: Tensor) -> Tensor:
        """Points [..., 2 or 3] with the grid's bounds at -1 and 1, in the order x, y[, z]."""
        axes = points.shape[-1]
        low, high = self._axis(points, self.min, axes), self._axis(points, self.max, axes)
        return 2 * (points - low) / (high - low) - 1

    @staticmethod
    def _axis(like: Tensor, values: tuple[float, float, float], axes: int) -> Tensor:
        return like.new_tensor(values[:axes])


def bev_sample(bev: Tensor, xy: Tensor, grid: Grid) -> Tensor:
    """Features [B, N, C] of a map [B, C, X, Y] at `xy` [B, N, 2], bilinear between cell centres, zero beyond the map.

    The map covers the grid's bounds with cells of any size. Half precision is sampled in float32.
    """
    bev = bev if bev.dtype == torch.float64 else bev.float()
    # grid_sample addresses the last axis first, and that is y.
    place = grid.normalised(xy.to(bev.dtype)).flip(-1)[:, None]
    return grid_sample(bev, place, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0].mT


def transform(points: Tensor, matrix: Tensor) -> Tensor:
    """Points [..., N, 3] under matrices [..., 4, 4] (or 3x3), in the points' dtype."""
    rows = matrix.to(points.dtype)[..., None, :3, :]
    moved = (
        points[..., 0:1] * rows[..., 0] + points[..., 1:2] * rows[..., 1] + points[..., 2:3] * rows[..., 2]
    )
    return moved + rows[..., 3] if matrix.shape[-1] == 4 else moved


def frustum(
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    depth_bins: tuple[float, float, float],
    pixel_grid: PixelGrid = "corner",
) -> Tensor:
    """Pixel and depth (u, v, d) of every feature and depth bin: [D, h, w, 3].

    `image_size` and `feature_size` are (rows, columns), `depth_bins` (first, end, step) with the end left out.
    `corner` spreads the features from the first to the last pixel, as BEVFusion does; `center` takes the middle of
    the patch of pixels that a feature stands for.
    """
    first, end, step = depth_bins
    depth = first + float(step) * torch.arange(math.ceil((end - first) / step - 1e-6))

    def pixels(size: int, features: int) -> Tensor:
        if pixel_grid == "corner":
            return torch.linspace(0, size - 1, features)
        return (torch.arange(features) + 0.5) * (size / features) - 0.5

    v, u = pixels(image_size[0], feature_size[0]), pixels(image_size[1], feature_size[1])
    d, v, u = torch.meshgrid(depth, v, u, indexing="ij")
    return torch.stack([u, v, d], -1)


def unproject(
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


def lift_points(
    pixels: Tensor,
    intrinsics: Tensor,
    cam2lidar: Tensor,
    img_aug: Tensor | None = None,
    lidar_aug: Tensor | None = None,
) -> Tensor:
    """`unproject` of a `frustum` [D, h, w, 3], the same for every camera: [B, V, D, h, w, 3]."""
    points = unproject(pixels.reshape(1, 1, -1, 3), intrinsics, cam2lidar, img_aug, lidar_aug)
    return points.reshape(*cam2lidar.shape[:2], *pixels.shape)


def project(
    points: Tensor,
    lidar2cam: Tensor,
    intrinsics: Tensor,
    img_aug: Tensor | None = None,
    lidar_aug: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pixels [B, V, N, 2] and depths [B, V, N] of points [B, N, 3] of the bird's-eye map's frame: `unproject` undone.

    Points behind a camera have a depth of at most 0, and pixels without meaning.
    """
    to_camera = lidar2cam
    if lidar_aug is not None:
        to_camera = _product(lidar2cam, _inverse(lidar_aug)[:, None])
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
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Tensor:
    """float64 [4, 4]: flips (`flip_x` changes the sign of x), then rotation about z, scale, shift."""
    cos, sin = scale * math.cos(yaw), scale * math.sin(yaw)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    matrix[2, 2] = scale
    matrix[:3, 3] = torch.tensor(shift, dtype=torch.float64)
    flips = [-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0, 1.0, 1.0]
    return matrix @ torch.diag(torch.tensor(flips, dtype=torch.float64))


def image_augmentation(
    resize: float, crop: tuple[int, int], size: tuple[int, int], flip: bool = False, angle: float = 0.0
) -> Tensor:
    """float64 [4, 4] from a file's pixel (u, v, d) to the network's: resize, crop at (left, top), flip, rotate.

    `size` is (rows, columns) after the crop; the rotation, clockwise on the screen for a negative `angle`, is about
    its middle.
    """
    height, width = size
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, 0] = matrix[1, 1] = resize
    matrix[:2, 3] = -torch.tensor(crop, dtype=torch.float64)
    if flip:
        mirror = torch.eye(4, dtype=torch.float64)
        mirror[0, 0], mirror[0, 3] = -1, width
        matrix = mirror @ matrix
    turn = torch.eye(4, dtype=torch.float64)
    cos, sin = math.cos(angle), math.sin(angle)
    turn[:2, :2] = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    turn[:2, 3] = middle - turn[:2, :2] @ middle
    return turn @ matrix


def wrap_yaw(yaw: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return torch.remainder(yaw + math.pi, 2 * math.pi) - math.pi


def box_corners(boxes: Any) -> Tensor:
    """Corners [..., 8, 3] of boxes [..., >= 7], a tensor or an array.

    Corners 0-3 are the bottom: front left, front right, back right, back left; 4-7 the top in the same order.
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
    """Boxes [K, 7 or 9] under one matrix [4, 4] that keeps z upright: rotation, flips, even scale and shift.

    The velocity turns and scales along. A flip turns the heading, as it turns the points.
    """
    linear = matrix[:3, :3].to(boxes.dtype)
    scale = linear.double().det().abs() ** (1 / 3)
    heading = torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin(), torch.zeros_like(boxes[:, 6])], -1)
    heading = transform(heading, linear)
    parts = [
        transform(boxes[:, :3], matrix),
        boxes[:, 3:6] * scale.to(boxes.dtype),
        torch.atan2(heading[:, 1], heading[:, 0])[:, None],
    ]
    if boxes.shape[1] == 9:
        velocity = torch.cat([boxes[:, 7:9], torch.zeros_like(boxes[:, :1])], 1)
        parts.append(transform(velocity, linear)[:, :2])
    return torch.cat(parts, 1)


def boxes_from_old_mmdet(boxes: Tensor, z: Literal["gravity", "bottom"] = "gravity") -> Tensor:
    """Boxes (x, y, z, w, l, h, yaw'[, vx, vy]) of BEVFusion and mmdetection3d before 1.0 in our convention.

    Their yaw' is -yaw - pi/2. Info files hold the gravity centre; box tensors of mmdetection3d hold the bottom.
    The function undoes itself with z="gravity".
    """
    ours = boxes.clone()
    ours[:, 3], ours[:, 4] = boxes[:, 4], boxes[:, 3]
    ours[:, 6] = wrap_yaw(-boxes[:, 6] - math.pi / 2)
    if z == "bottom":
        ours[:, 2] += boxes[:, 5] / 2
    return ours


def boxes_from_kitti(boxes: Tensor, cam2lidar: Tensor) -> Tensor:
    """Boxes (x, y, z, l, h, w, ry) of KITTI's camera frame, (x, y, z) the middle of the bottom, in the LiDAR's.

    In the camera frame y points down, and ry turns about it from +x.
    """
    x, y, z, length, height, width, ry = boxes.unbind(-1)
    centre = transform(torch.stack([x, y, z], -1), cam2lidar)
    centre[..., 2] += height / 2  # as mmdetection3d does, whose counts of points this reproduces
    heading = transform(torch.stack([ry.cos(), torch.zeros_like(ry), -ry.sin()], -1), cam2lidar[:3, :3])
    yaw = torch.atan2(heading[:, 1], heading[:, 0])
    return torch.cat([centre, torch.stack([length, width, height, yaw], -1)], -1)


def pose(quaternion: Any, translation: Any) -> Tensor:
    """float64 [4, 4] of a rotation (w, x, y, z), of any length above 0, and a translation."""
    w, x, y, z = (torch.as_tensor(quaternion, dtype=torch.float64) / math.hypot(*quaternion)).tolist()
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    matrix[:3, 3] = torch.as_tensor(translation, dtype=torch.float64)
    return matrix
