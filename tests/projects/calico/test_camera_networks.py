"""The camera branch: pooling against a dense one-hot product in float64, geometry, timm's backbones, the pyramid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.calico.geometry import Grid, image_augmentation, lidar_augmentation, project
from projects.calico.model_config import CameraConfig
from projects.calico.networks.lss import (
    CameraInput,
    LidarInput,
    LssFpn,
    LSSTransform,
    TimmBackbone,
    TinyBackbone,
    bev_pool,
    depth_images,
)

GRID = Grid((-8.0, -6.0, -10.0), (8.0, 6.0, 10.0), (0.5, 0.5, 20.0))
FORWARD = torch.tensor([[0.0, 0, 1, 0.5], [-1, 0, 0, 0], [0, -1, 0, 0.2], [0, 0, 0, 1]], dtype=torch.float64)
"""A camera that looks along +x, half a metre ahead of the LiDAR and 0.2 m above it."""


def cameras(
    frames: int = 1, size: tuple[int, int] = (40, 80), views: int = 2, lidar_aug: Tensor | None = None
) -> CameraInput:
    """`views` cameras around the car, with images that are resized, cropped and mirrored."""
    poses = [lidar_augmentation(yaw=2 * torch.pi * n / views) @ FORWARD for n in range(views)]
    intrinsics = torch.tensor([[80.0, 0, 100], [0, 80, 60], [0, 0, 1]], dtype=torch.float64)
    aug = image_augmentation(0.5, (10, 8), size, flip=True, angle=0.05)
    return CameraInput(
        torch.randn(frames, views, 3, *size, generator=torch.Generator().manual_seed(0)),
        intrinsics.expand(frames, views, 3, 3),
        torch.stack(poses).expand(frames, views, 4, 4),
        aug.expand(frames, views, 4, 4),
        (torch.eye(4, dtype=torch.float64) if lidar_aug is None else lidar_aug).expand(frames, 4, 4),
    )


def view_of(grid: Grid = GRID, **fields: Any) -> LSSTransform:
    """From maps [8, 5, 10] of images 40 x 80 to 4 channels by 14 bins."""
    given = {"image_size": [40, 80], "neck": 8, "channels": 4, "depth": [1.0, 8.0, 0.5], **fields}
    return LSSTransform(CameraConfig(**given), 8, grid)


@pytest.mark.parametrize("deterministic", [False, True])
def test_pooling_equals_a_dense_one_hot_product(deterministic: bool) -> None:
    make = torch.Generator().manual_seed(0)
    depth = torch.rand(23, 7, generator=make, dtype=torch.float64).requires_grad_()
    context = torch.randn(23, 5, generator=make, dtype=torch.float64).requires_grad_()
    cell = torch.randint(-1, 11, (23, 7), generator=make)
    hot = F.one_hot(cell + 1, 12).double()[..., 1:]
    expected = torch.einsum("pdk,pd,pc->kc", hot, depth, context)
    out = bev_pool(depth, context, cell, 11, deterministic)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    seed = torch.randn(11, 5, generator=make, dtype=torch.float64)
    got, wanted = (torch.autograd.grad((o * seed).sum(), (depth, context)) for o in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    none = bev_pool(depth, context, torch.full_like(cell, -1), 11, deterministic)
    assert none.shape == (11, 5) and not none.any()


def test_what_lies_where_a_pixel_looks_falls_into_that_cell() -> None:
    """Features one by one: the cell of pixel and depth is that of the point which projects there."""
    aug = lidar_augmentation(yaw=0.4, scale=1.05, flip_y=True, shift=(0.3, -0.2, 0.0))
    given = cameras(lidar_aug=aug)
    view = view_of(downsample=1)
    cells = view.cells(given)
    assert cells.shape == (1, 2, 14, 5, 10) and (cells >= 0).float().mean() > 0.5
    x, y, _ = GRID.shape
    for v, d, row, column in [(0, 3, 2, 5), (1, 7, 4, 1), (0, 13, 1, 9)]:
        u_v_d = view.frustum[d, row, column]
        ray = torch.linalg.inv(given.img_aug[0, v]) @ torch.cat([u_v_d.double(), torch.ones(1)])
        camera = torch.linalg.inv(given.intrinsics[0, v]) @ torch.cat(
            [ray[:2] * u_v_d[2], u_v_d[2:].double()]
        )
        point = (aug @ given.cam2lidar[0, v] @ torch.cat([camera, torch.ones(1)]))[None, None, :3]
        back, depth = project(
            point, torch.linalg.inv(given.cam2lidar), given.intrinsics, given.img_aug, given.lidar_aug
        )
        torch.testing.assert_close(back[0, v, 0].float(), u_v_d[:2], rtol=0, atol=1e-3)
        (i, j), inside = (part[0, 0] for part in GRID.index(point[..., :2]))
        expected = i * y + j if inside else torch.tensor(-1)
        assert cells[0, v, d, row, column] == expected
        # A feature that is 1 at this pixel and certain of this depth has its only mass in this cell.
        hot, context = torch.zeros(2, 14, 5, 10), torch.zeros(2, 4, 5, 10)
        hot[v, d, row, column] = context[v, 2, row, column] = 1
        bev = view.splat(hot, context, given)
        assert bev.shape == (1, 4, x, y) and bev.sum() == (1.0 if inside else 0.0)
        if inside:
            assert bev[0, 2, i, j] == 1
    second = CameraInput(*(torch.cat([part, part]) for part in given))
    assert torch.equal(view.cells(second)[1], torch.where(cells[0] >= 0, cells[0] + x * y, -1))


def test_a_view_transform_trains_and_leaves_geometry_in_float32() -> None:
    given = cameras(2)
    view = view_of()
    features = torch.randn(4, 8, 5, 10, requires_grad=True)
    bev = view(features, given)
    assert bev.shape == (2, 4, 16, 12)
    bev.square().sum().backward()
    assert features.grad.abs().sum() > 0 and all(p.grad.isfinite().all() for p in view.parameters())
    cells = view.cells(given)
    half = view.bfloat16()
    assert torch.equal(half.cells(given), cells)
    assert half(features.bfloat16(), given).dtype == torch.bfloat16
    # Truncation keeps what lies up to a cell below the bound: with 20 m along z, all down to -30 m.
    low = Grid((-8.0, -6.0, 2.0), (8.0, 6.0, 22.0), (0.5, 0.5, 20.0))
    floor, trunc = (view_of(low, rounding=r).cells(given) for r in ("floor", "trunc"))
    assert (floor >= 0).sum() < (trunc >= 0).sum()


def test_the_depth_image_holds_the_nearest_point_of_a_pixel() -> None:
    given = cameras(2, views=1)
    view = view_of(view="depth_lss", downsample=1)
    # On the optical axis, 3 and 5 m from the camera; a third beside it; one behind; the fourth belongs to frame 1.
    points = torch.tensor([[5.5, 0, 0.2], [3.5, 0, 0.2], [4.5, 1, 0.2], [-5, 0, 0], [4.5, 0, 0.2]])
    lidar = LidarInput(points, torch.tensor([0, 0, 0, 0, 1]), 2)
    depth = depth_images(lidar, given)
    assert depth.shape == (2, 1, 1, 40, 80)
    assert sorted(depth[0][depth[0] > 0].tolist()) == pytest.approx([3, 4], abs=1e-5)
    (v, u) = (depth[1, 0, 0] > 0).nonzero()[0].tolist()
    assert depth[1].sum().item() == pytest.approx(4, abs=1e-5)
    centre = given.img_aug[0, 0] @ torch.tensor([100.0, 60, 4, 1], dtype=torch.float64)
    assert (u, v) == (int(centre[0]), int(centre[1])) and depth[0, 0, 0, v, u].item() == pytest.approx(
        3, abs=1e-5
    )
    features = torch.randn(2, 8, 5, 10)
    assert view(features, given, lidar).shape == (2, 4, 32, 24)
    nothing = LidarInput(points[:0], lidar.frame[:0], 2)
    assert not torch.equal(view.eval()(features, given, lidar), view(features, given, nothing))


@pytest.mark.parametrize(
    ("name", "stages", "channels"),
    [
        ("swin_tiny_patch4_window7_224", (1, 2, 3), [192, 384, 768]),
        ("resnet50", (2, 3, 4), [512, 1024, 2048]),
    ],
)
def test_timm_backbones_give_maps_of_the_paper(
    name: str, stages: tuple[int, ...], channels: list[int]
) -> None:
    backbone = TimmBackbone(
        CameraConfig(encoder=name, pretrained=False, image_size=[64, 96], stages=list(stages))
    ).eval()
    neck = LssFpn(backbone.channels, 256).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(2, 3, 64, 96))
        assert [list(m.shape) for m in maps] == [
            [2, c, 64 // s, 96 // s] for c, s in zip(channels, (8, 16, 32), strict=True)
        ]
        assert backbone.channels == channels and backbone.strides == [8, 16, 32]
        assert neck(maps).shape == (2, 256, 8, 12)


def test_the_pyramid_reads_all_levels_and_the_tiny_backbone_two() -> None:
    backbone = TinyBackbone((4, 8, 16))
    maps = backbone(torch.randn(2, 3, 40, 80))
    assert [list(m.shape) for m in maps] == [[2, 8, 10, 20], [2, 16, 5, 10]]
    assert backbone.channels == [8, 16] and backbone.strides == [4, 8]
    neck = LssFpn((3, 4, 5), 6)
    # BEVFusion's lateral convolutions: 3 + 6 and 4 + 5 channels.
    assert [lateral[0].in_channels for lateral in neck.laterals] == [9, 9]
    levels = [torch.randn(1, c, 2**s, 2**s, requires_grad=True) for c, s in ((3, 4), (4, 3), (5, 2))]
    out = neck(levels)
    out.sum().backward()
    assert out.shape == (1, 6, 16, 16) and all(level.grad.abs().sum() > 0 for level in levels)
