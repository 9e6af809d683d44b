"""Geometry against numbers worked out by hand, brute force in float64, and the classic mistakes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from projects.calico import geometry as geo
from projects.calico.geometry import Grid
from tests.projects.calico.frames import FRAMES, needs_frames

GRID = Grid((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (0.8, 0.8, 8.0))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rig(cameras: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Intrinsics [1, V, 3, 3] and cam2lidar [1, V, 4, 4] of level cameras in a circle, float64."""
    intrinsics = torch.tensor([[1266.0, 0, 816], [0, 1266, 491], [0, 0, 1]], dtype=torch.float64)
    poses = []
    for camera in range(cameras):
        yaw = 2 * math.pi * camera / cameras
        turn = geo.lidar_augmentation(yaw)
        level = torch.eye(4, dtype=torch.float64)
        level[:3, :3] = torch.tensor([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], dtype=torch.float64)
        level[:3, 3] = torch.tensor([0.5, 0.1, -0.3])
        poses.append(turn @ level)
    return intrinsics.repeat(1, cameras, 1, 1), torch.stack(poses)[None]


def test_cells_of_known_places() -> None:
    points = torch.tensor([[-51.2, -51.2, -5], [51.19, -0.01, 2.9], [0.1, 0.9, 0]])
    index, inside = GRID.index(points)
    assert index.tolist() == [[0, 0, 0], [127, 63, 0], [64, 65, 0]]
    assert inside.all() and GRID.shape == (128, 128, 1)
    torch.testing.assert_close(GRID.centre(torch.tensor([64, 65])), torch.tensor([0.4, 1.2]))
    torch.testing.assert_close(
        GRID.normalised(torch.tensor([[-51.2, 51.2, -1.0]])), torch.tensor([[-1.0, 1, 0]])
    )
    every = torch.cartesian_prod(*(torch.arange(n) for n in GRID.shape))
    assert GRID.index(GRID.centre(every))[0].equal(every)


def test_one_cell_outside_is_outside_on_every_side() -> None:
    middle = torch.tensor([0.4, 0.4, -1.0])
    for axis in range(3):
        for bound, sign in ((GRID.min[axis], -1), (GRID.max[axis], 1)):
            for share, kept in ((-0.5, True), (0.5, False), (0.001, False), (1.5, False)):
                point = middle.clone()
                point[axis] = bound + sign * share * GRID.cell[axis]
                assert bool(GRID.index(point)[1]) is kept, (axis, sign, share)
    leaked = middle.clone()
    leaked[0] = GRID.min[0] - 0.4
    assert bool(GRID.index(leaked, "trunc")[1])  # what BEVFusion's weights expect
    assert not GRID.index(torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0]]))[1].any()


def test_a_grid_of_broken_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        Grid((0, 0, 0), (1, 1, 1), (0.3, 0.5, 1))
    with pytest.raises(ValueError, match="whole number"):
        Grid((0, 0, 0), (1, -1, 1), (0.5, 0.5, 1))


@pytest.mark.parametrize("cell", [0.4, 0.8, 1.6])
def test_a_delta_is_sampled_where_it_stands(cell: float) -> None:
    """x and y are not swapped, cell centres are exact, whatever the map's stride."""
    fine = Grid(GRID.min, GRID.max, (cell, cell, 8.0))
    bev = torch.zeros(2, 3, *fine.shape[:2])
    place = torch.tensor([[10.3, -20.7]])
    (x, y), _ = fine.index(place[0])
    bev[1, 2, x, y] = 1
    centre = fine.centre(torch.stack([x, y]))
    offsets = torch.tensor([[0, 0], [cell / 2, 0], [0, -cell / 4], [cell, 0], [0, cell]])
    sampled = geo.bev_sample(bev, (centre + offsets).expand(2, -1, -1), GRID)
    torch.testing.assert_close(sampled[1, :, 2], torch.tensor([1, 0.5, 0.75, 0, 0]), atol=1e-4, rtol=0)
    assert sampled[0].eq(0).all() and sampled[1, :, :2].eq(0).all()
    swapped = geo.bev_sample(bev, centre.flip(-1).expand(2, 1, -1), GRID)
    assert swapped.eq(0).all()


def test_sampling_is_bilinear_zero_outside_and_in_float32_for_half() -> None:
    grid = Grid((-4, -2, 0), (4, 2, 1), (1, 1, 1))
    bev = random(1, 2, 8, 4)
    xy = torch.tensor([[[0.7, -0.2], [-3.9, 1.9], [9.0, 0.0]]], dtype=torch.float64)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for n, (x, y) in enumerate(xy[0].tolist()):
        for i in range(8):
            for j in range(4):
                weight = max(0, 1 - abs(x - (i - 3.5))) * max(0, 1 - abs(y - (j - 1.5)))
                expected[n] += weight * bev[0, :, i, j]
    torch.testing.assert_close(geo.bev_sample(bev, xy, grid)[0], expected)
    assert geo.bev_sample(bev.bfloat16(), xy, grid).dtype == torch.float32
    assert expected[2].eq(0).all()


def test_frustum() -> None:
    corner = geo.frustum((256, 704), (32, 88), (1, 60, 0.5))
    assert corner.shape == (118, 32, 88, 3)
    assert corner[0, 0, 0].tolist() == [0, 0, 1] and corner[-1, -1, -1].tolist() == [703, 255, 59.5]
    assert corner[3, 0, 1].tolist() == pytest.approx([703 / 87, 0, 2.5])
    centre = geo.frustum((256, 704), (32, 88), (1, 60, 0.5), "center")
    assert centre[0, 0, 0].tolist() == [3.5, 3.5, 1] and centre[0, -1, -1].tolist() == [699.5, 251.5, 1]


@pytest.mark.parametrize("seed", range(4))
def test_pixels_return_under_any_augmentation(seed: int) -> None:
    intrinsics, cam2lidar = (m.float() for m in rig())
    draw = random(8, seed=seed).tolist()
    img_aug = geo.image_augmentation(
        0.38 + 0.17 * draw[0], (int(90 * draw[1]), 120), (256, 704), draw[2] > 0.5, draw[3] * 0.2 - 0.1
    ).repeat(1, 3, 1, 1)
    lidar_aug = geo.lidar_augmentation(
        6.28 * draw[4], 0.9 + 0.2 * draw[5], draw[6] > 0.5, draw[7] > 0.5, (0.5, -0.3, 0.1)
    )[None]
    pixels = geo.frustum((256, 704), (8, 22), (1, 60, 5))
    points = geo.lift_points(
        pixels.reshape(1, 1, -1, 3), intrinsics, cam2lidar, img_aug.float(), lidar_aug.float()
    )
    assert points.shape == (1, 3, 12 * 8 * 22, 3) and points.dtype == torch.float32
    lidar2cam = torch.linalg.inv(cam2lidar.double()).float()
    for camera in range(3):
        uv, depth = geo.project(points[:, camera], lidar2cam, intrinsics, img_aug.float(), lidar_aug.float())
        assert (uv[0, camera] - pixels[..., :2].reshape(-1, 2)).abs().max() < 1e-3
        torch.testing.assert_close(depth[0, camera], pixels[..., 2].flatten(), atol=1e-4, rtol=0)
        other = geo.in_image(uv[0], depth[0], (256, 704), 0.5)[camera - 1]
        assert other.float().mean() < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_an_object_lands_in_one_cell_for_lidar_and_cameras(seed: int) -> None:
    """Its point and its pixels, through both augmentations; without lidar_aug they would part."""
    draw = random(6, seed=seed + 10).tolist()
    lidar_aug = geo.lidar_augmentation(6.28 * draw[0], 0.9 + 0.2 * draw[1], draw[2] > 0.5, draw[3] > 0.5)
    img_aug = geo.image_augmentation(0.48, (32, 176), (256, 704), draw[4] > 0.5, 0.08).repeat(1, 3, 1, 1)
    intrinsics, cam2lidar = rig()
    spot = torch.tensor([[12.3, 5.1, 0.4]], dtype=torch.float64)
    moved = geo.transform(spot, lidar_aug)
    uv, depth = geo.project(moved[None], torch.linalg.inv(cam2lidar), intrinsics, img_aug, lidar_aug[None])
    seen = geo.in_image(uv, depth, (256, 704))[0, :, 0]
    assert seen.tolist() == [True, False, False]
    pixels = torch.cat([uv, depth[..., None]], -1)
    back = geo.lift_points(pixels, intrinsics, cam2lidar, img_aug, lidar_aug[None])[0, 0]
    assert GRID.index(back)[0].equal(GRID.index(moved)[0])
    without = geo.lift_points(pixels, intrinsics, cam2lidar, img_aug)[0, 0]
    assert not GRID.index(without)[0].equal(GRID.index(moved)[0])


def test_geometry_stays_in_float32_under_autocast() -> None:
    intrinsics, cam2lidar = (m.float() for m in rig())
    pixels = geo.frustum((256, 704), (4, 4), (1, 60, 20)).reshape(1, 1, -1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = geo.lift_points(pixels, intrinsics, cam2lidar)
    assert half.equal(geo.lift_points(pixels, intrinsics, cam2lidar))


def test_image_augmentation_by_hand() -> None:
    matrix = geo.image_augmentation(0.5, (10, 20), (100, 200))
    pixel = torch.tensor([[40.0, 60, 7]], dtype=torch.float64)
    assert geo.transform(pixel, matrix).tolist() == [[10, 10, 7]]
    flipped = geo.image_augmentation(0.5, (10, 20), (100, 200), flip=True)
    assert geo.transform(pixel, flipped).tolist() == [[190, 10, 7]]
    turned = geo.image_augmentation(1, (0, 0), (100, 200), angle=math.pi / 2)
    middle = torch.tensor([[100.0, 50, 1], [110, 50, 1]], dtype=torch.float64)
    torch.testing.assert_close(
        geo.transform(middle, turned), torch.tensor([[100.0, 50, 1], [100, 40, 1]], dtype=torch.float64)
    )


def test_yaw_wraps_into_one_turn() -> None:
    yaw = torch.linspace(-20, 20, 401, dtype=torch.float64)
    wrapped = geo.wrap_yaw(yaw)
    assert wrapped.min() >= -math.pi and wrapped.max() < math.pi
    torch.testing.assert_close(wrapped.cos(), yaw.cos())
    torch.testing.assert_close(wrapped.sin(), yaw.sin())
    assert geo.wrap_yaw(torch.tensor(math.pi, dtype=torch.float64)).item() == -math.pi


def cloud(count: int, seed: int) -> torch.Tensor:
    """float64 [N, 3] where `boxes` are."""
    half = torch.tensor([20.0, 20, 3], dtype=torch.float64)
    return half * (2 * random(count, 3, seed=seed) - 1)


def boxes(count: int = 20, seed: int = 0) -> torch.Tensor:
    """float64 [K, 9]."""
    draw = random(count, 9, seed=seed)
    low = torch.tensor([-20.0, -20, -2, 0.5, 0.5, 0.5, -4, -5, -5], dtype=torch.float64)
    high = torch.tensor([20.0, 20, 1, 8, 3, 3, 4, 5, 5], dtype=torch.float64)
    return low + draw * (high - low)


def test_corners_and_the_inside_of_boxes() -> None:
    one = torch.tensor([[1.0, 2, 3, 4, 2, 6, math.pi / 2]], dtype=torch.float64)
    corners = geo.box_corners(one)[0]
    torch.testing.assert_close(corners[0], torch.tensor([0.0, 4, 0], dtype=torch.float64))  # front left
    torch.testing.assert_close(corners[6], torch.tensor([2.0, 0, 6], dtype=torch.float64))  # back right
    many = boxes()
    points = cloud(3000, seed=1)
    inside = geo.points_in_boxes(points.numpy(), many.numpy())
    expected = np.zeros((3000, 20), dtype=bool)
    for k, corner in enumerate(geo.box_corners(many).numpy()):  # from the back left corner along three edges
        edges = np.stack([corner[0], corner[2], corner[7]]) - corner[3]
        shares = (points.numpy() - corner[3]) @ edges.T / (edges**2).sum(1)
        expected[:, k] = ((shares >= 0) & (shares <= 1)).all(1)
    assert inside.numpy().sum() > 50
    assert np.array_equal(inside.numpy(), expected)


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_boxes_move_with_their_points(flips: tuple[bool, bool]) -> None:
    matrix = geo.lidar_augmentation(0.7, 1.1, *flips, shift=(1, 2, 0.3))
    before = boxes()
    after = geo.transform_boxes(before, matrix)
    points = cloud(4000, seed=2)
    moved = geo.transform(points, matrix)
    assert geo.points_in_boxes(moved, after).equal(geo.points_in_boxes(points, before))
    # heading and velocity: the middle of the front face, and where the box is a second later
    nose = before[:, :3].clone()
    nose[:, 0] += before[:, 3] / 2 * before[:, 6].cos()
    nose[:, 1] += before[:, 3] / 2 * before[:, 6].sin()
    front = after[:, :2] + after[:, 3:4] / 2 * torch.stack([after[:, 6].cos(), after[:, 6].sin()], 1)
    torch.testing.assert_close(geo.transform(nose, matrix)[:, :2], front)
    later = before.clone()
    later[:, :2] += before[:, 7:]
    torch.testing.assert_close(
        geo.transform_boxes(later, matrix)[:, :2], after[:, :2] + after[:, 7:], atol=1e-9, rtol=0
    )


def test_old_mmdet_boxes() -> None:
    """A car that heads along +x stood in the old files as w, l with yaw' = -pi/2."""
    old = torch.tensor([[1.0, 2, 3, 1.8, 4.4, 1.5, -math.pi / 2]], dtype=torch.float64)
    ours = geo.boxes_from_old_mmdet(old)
    torch.testing.assert_close(ours, torch.tensor([[1.0, 2, 3, 4.4, 1.8, 1.5, 0]], dtype=torch.float64))
    assert geo.boxes_from_old_mmdet(old, z="bottom")[0, 2] == 3.75
    many = boxes()
    back = geo.boxes_from_old_mmdet(geo.boxes_from_old_mmdet(many))
    torch.testing.assert_close(back[:, :6], many[:, :6])
    torch.testing.assert_close(back[:, 6].sin(), many[:, 6].sin())


def test_pose_of_a_quaternion() -> None:
    half = math.pi / 6
    matrix = geo.pose([2 * math.cos(half), 0, 0, 2 * math.sin(half)], [1, 2, 3])
    expected = geo.lidar_augmentation(2 * half, shift=(1, 2, 3))
    torch.testing.assert_close(matrix, expected)
    skew = geo.pose([0.3, -0.4, 0.5, 0.7], [0, 0, 0])[:3, :3]
    torch.testing.assert_close(skew @ skew.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(skew).item() == pytest.approx(1)


@needs_frames
def test_kitti_boxes_hold_their_points_in_the_lidar_frame() -> None:
    info = json.loads((FRAMES / "kitti/info.json").read_text())["data_list"][0]
    lidar2cam = torch.tensor(info["images"]["CAM2"]["lidar2cam"], dtype=torch.float64)
    cars = [i for i in info["instances"] if i["bbox_3d"][0] > -500]
    camera = torch.tensor([i["bbox_3d"] for i in cars], dtype=torch.float64)
    points = np.fromfile(FRAMES / "kitti/000008.bin", np.float32).reshape(-1, 4)
    counted = geo.points_in_boxes(points, geo.boxes_from_kitti(camera, torch.linalg.inv(lidar2cam))).sum(0)
    stated = np.array([i["num_lidar_pts"] for i in cars])
    assert stated.tolist() == [1325, 1900, 881, 659, 55, 162]
    assert np.abs(counted.numpy() - stated).max() <= 1  # a point on a face: the heading differs by 1e-4
