"""Pillars and sparse voxels against loops, dense convolutions and spconv; SECOND's sizes; the projectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.model_config import DecoderConfig, LidarConfig, SecondConfig
from projects.calico.networks import lidar as lidar_networks
from projects.calico.networks.fuser import BoxProjector, ConvFuser, PointProjector, region_boxes
from projects.calico.networks.lidar import (
    PillarEncoder,
    SparseBlock,
    SparseConv,
    SparseMap,
    VoxelEncoder,
    pairs,
    place_in_group,
    scatter_max,
    scatter_mean,
    voxelise,
)
from projects.calico.networks.parts import RowNorm, SecondWithFpn, share_norms
from vlmkd.errors import UserError

GRID = Grid((-4.0, -2.0, -3.0), (4.0, 2.0, 1.0), (0.5, 0.5, 4.0))


def cloud(seed: int, points: int = 300, frames: int = 2) -> tuple[Tensor, Tensor]:
    """Points over the grid of pillars and a little beyond, some of one pillar, and their frames in order."""
    make = torch.Generator().manual_seed(seed)
    xyz = (torch.rand(points, 3, generator=make) - 0.5) * torch.tensor([9.0, 5.0, 5.0])
    xyz[: points // 5] = torch.tensor([1.1, 0.6, -1.0]) + 0.3 * torch.rand(points // 5, 3, generator=make)
    frame = torch.randint(frames, (points,), generator=make).sort().values
    return torch.cat([xyz, torch.rand(points, 2, generator=make)], 1), frame


def trained(module: nn.Module, seed: int = 0) -> Any:
    """The module in eval mode with norms that do something."""
    make = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.5, generator=make)
            norm.running_var.uniform_(0.5, 2, generator=make)
            nn.init.normal_(norm.bias, 0.0, 0.5, generator=make)
    return module.eval()


def pillar_loop(encoder: PillarEncoder, points: Tensor, frame: Tensor, padded: bool) -> Tensor:
    """The reference PFN, pillar by pillar; `padded`: each to 20 rows with zeros, as mmdetection3d does."""
    x, y, _ = GRID.shape
    out = torch.zeros(2, encoder.out_channels, x, y)
    index, inside = GRID.index(points[:, :3])
    for b, i, j in torch.cat([frame[:, None], index[:, :2]], 1)[inside].unique(dim=0).tolist():
        mine = points[inside & (frame == b) & (index[:, 0] == i) & (index[:, 1] == j)]
        mine = mine[:20] if padded else mine
        centre = torch.tensor([GRID.min[0] + 0.5 * (i + 0.5), GRID.min[1] + 0.5 * (j + 0.5)])
        rows = torch.cat([mine, mine[:, :3] - mine[:, :3].mean(0), mine[:, :2] - centre], 1)
        if padded:
            rows = F.pad(rows, (0, 0, 0, 20 - len(rows)))
        for layer, (linear, norm) in enumerate(zip(encoder.linears, encoder.norms, strict=True)):
            rows = norm(linear(rows)).relu()
            if layer == 0:
                rows = torch.cat([rows, rows.amax(0).expand_as(rows)], 1)
        out[b, :, i, j] = rows.amax(0)
    return out


@pytest.mark.parametrize("mode", ["dynamic", "hard"])
def test_pillars_equal_the_reference_one_by_one(mode: Any) -> None:
    """`hard` is the reference with padded rows of zeros, though it adds only one to a pillar that is not full."""
    encoder = trained(PillarEncoder(GRID, LidarConfig(channels=[16, 16], mode=mode, max_points=20)))
    points, frame = cloud(0)
    with torch.no_grad():
        got, expected = encoder(points, frame, 2), pillar_loop(encoder, points, frame, mode == "hard")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got != pillar_loop(encoder, points, frame, mode != "hard")).any()


def test_pillars_do_not_know_the_order_of_points_nor_those_outside() -> None:
    encoder = trained(PillarEncoder(GRID, LidarConfig(channels=[16, 16])))
    points, frame = cloud(1)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        once = encoder(points, frame, 2)
        torch.testing.assert_close(encoder(points[order], frame[order], 2), once, rtol=0, atol=2e-6)
        # One cell beyond each of the four sides and above and below, and rows that are not finite.
        beyond = [
            [-4.25, 0, 0],
            [4.25, 0, 0],
            [0, -2.25, 0],
            [0, 2.25, 0],
            [0, 0, -3.1],
            [0, 0, 1.1],
            [0, torch.nan, 0],
        ]
        more = torch.cat([points, F.pad(torch.tensor(beyond), (0, 2), value=1.0)])
        assert torch.equal(encoder(more, F.pad(frame, (0, 7)), 2), once)
        assert not encoder(points[:0], frame[:0], 2).any()
    encoder.train()
    encoder(points[:0], frame[:0], 2).sum().backward()  # an empty sweep trains nothing, and does not fail
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


def test_hard_pillars_pad_the_statistics_and_keep_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lidar_networks, "MOST_PILLARS", (2, 99))
    encoder = PillarEncoder(GRID, LidarConfig(channels=[8], mode="hard", max_points=3))
    xyz = torch.tensor([[0.1, 0.1, 0.0]] * 5 + [[1.1, 0.1, 0.0]] + [[2.1, 0.1, 0.0]] * 2)
    points = torch.cat([xyz, torch.arange(8.0)[:, None], torch.zeros(8, 1)], 1)
    out = encoder.train()(points, torch.zeros(8, dtype=torch.long), 1)
    # Pillars of 3 (five, capped) and 1 point (two rows of zeros): six rows; the third pillar comes too late.
    kept = torch.cat([points[[0, 1, 2, 5]], torch.zeros(4, 3), torch.tensor([[-0.15, -0.15]] * 4)], 1)
    rows = F.pad(kept, (0, 0, 0, 2)) @ encoder.linears[0].weight.T
    mean = encoder.norms[0].running_mean / encoder.norms[0].momentum
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    assert (out.abs().sum(1) > 0).sum() <= 2
    assert (encoder.eval()(points, torch.zeros(8, dtype=torch.long), 1).abs().sum(1) > 0).sum() == 3


def test_scatter_and_places() -> None:
    rows = torch.tensor([[-1.0, 2], [-3, 5], [4, 4], [-2, 5]], dtype=torch.float64, requires_grad=True)
    cell = torch.tensor([2, 2, 0, 2])
    assert scatter_max(rows, cell, 4).tolist() == [[4, 4], [0, 0], [-1, 5], [0, 0]]
    assert scatter_mean(rows, cell, 4).tolist() == [[4, 4], [0, 0], [-2, 4], [0, 0]]
    scatter_max(rows, cell, 4).sum().backward()
    assert rows.grad.tolist() == [[1, 0], [0, 0.5], [1, 1], [0, 0.5]]
    assert place_in_group(torch.tensor([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_maxima_are_those_of_scatter_reduce(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 3, generator=generator).mul(2).round().relu().to(dtype)  # with many equal maxima
    cell = torch.randint(20, (600,), generator=generator)
    weights = torch.randn(25, 3, generator=generator, dtype=torch.float64)
    ours, theirs = rows.clone().requires_grad_(), rows.double().requires_grad_()
    (scatter_max(ours, cell, 25) * weights.to(dtype)).sum().backward()
    found = theirs.new_zeros(25, 3).scatter_reduce(
        0, cell[:, None].expand(-1, 3), theirs, "amax", include_self=False
    )
    (found * weights.to(dtype).double()).sum().backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )


VOXELS = Grid((-4.0, -2.0, -3.0), (4.0, 2.0, 1.0), (0.5, 0.5, 0.25))


def sites(seed: int, channels: int) -> SparseMap:
    voxels = voxelise(*cloud(seed, 120), 2, VOXELS)
    rows = torch.randn(
        len(voxels.rows), channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return voxels.with_rows(rows)


def masked_conv(given: SparseMap, layer: SparseConv) -> tuple[Tensor, Tensor]:
    """The dense form: Conv3d, and the mask of what is occupied afterwards."""
    kernel, stride, padding = layer.shape
    weight = layer.weight.permute(2, 1, 0).reshape(layer.weight.shape[2], layer.weight.shape[1], *kernel)
    mask = given.with_rows(torch.ones_like(given.rows[:, :1])).dense()
    out = F.conv3d(given.dense(), weight, stride=stride, padding=padding)
    if stride != (1, 1, 1):
        mask = (
            F.conv3d(mask, torch.ones(1, 1, *kernel, dtype=mask.dtype), stride=stride, padding=padding) > 0.5
        ).double()
    return out * mask, mask


@pytest.mark.parametrize(
    "shape",
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (1, 1, 0)),
        ((1, 1, 3), (1, 1, 2), (0, 0, 0)),
    ],
)
def test_sparse_convolutions_equal_masked_dense_ones(shape: Any) -> None:
    layer = SparseConv(3, 4, *shape).double()
    given = sites(0, 3)
    given = given.with_rows(given.rows.requires_grad_())
    expected, mask = masked_conv(given, layer)
    rows = expected.permute(0, 2, 3, 4, 1)[mask[:, 0] > 0]
    expected_out = F.relu(F.batch_norm(rows, None, None, layer.norm.weight, layer.norm.bias, True, eps=1e-3))
    out = layer(given)
    torch.testing.assert_close(out.rows, expected_out, rtol=1e-9, atol=1e-9)
    assert torch.equal(out.with_rows(torch.ones_like(out.rows[:, :1])).dense(), mask)
    seed = torch.randn_like(expected_out)
    leaves = (given.rows, layer.weight)
    got, wanted = (torch.autograd.grad((o * seed).sum(), leaves) for o in (out.rows, expected_out))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_spconv_gives_the_same() -> None:
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    for shape in [((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((3, 3, 3), (2, 2, 2), (1, 1, 0))]:
        layer = trained(SparseConv(3, 4, *shape))
        given = sites(1, 3)
        given = given.with_rows(given.rows.float())
        with torch.no_grad():
            ours = layer(given)
            layer.backend = "spconv"
            theirs = layer(given)
        assert torch.equal(ours.coords, theirs.coords) and ours.shape == theirs.shape
        torch.testing.assert_close(theirs.rows, ours.rows, rtol=1e-4, atol=1e-4)


def test_voxels_are_means_and_the_encoder_reaches_the_map() -> None:
    points, frame = cloud(0)
    voxels = voxelise(points, frame, 2, VOXELS)
    index, inside = VOXELS.index(points[:, :3])
    for row, (b, *place) in list(zip(voxels.rows, voxels.coords.tolist(), strict=True))[::7]:
        mine = inside & (frame == b) & (index == torch.tensor(place)).all(1)
        torch.testing.assert_close(row, points[mine].mean(0), rtol=1e-5, atol=1e-5)
    assert (voxels.key.diff() > 0).all()
    first = voxelise(points, frame, 2, VOXELS, max_points=1)
    heads = torch.stack(
        [
            points[inside & (frame == b) & (index == torch.tensor(p)).all(1)][0]
            for b, *p in first.coords.tolist()
        ]
    )
    assert torch.equal(first.rows, heads)
    cfg = LidarConfig(encoder="voxels", channels=[4, 16])
    encoder = VoxelEncoder(Grid(VOXELS.min, VOXELS.max, (0.5, 0.5, 0.125)), cfg)
    bev = encoder(points, frame, 2)
    assert bev.shape == (2, encoder.out_channels, 2, 1) and encoder.stride == 8 and encoder.out_channels == 16
    bev.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert not encoder.eval()(points[:0], frame[:0], 2).any()
    with pytest.raises(UserError, match="model.lidar.cell .*too few for 4 stages"):
        VoxelEncoder(VOXELS, cfg)
    paper = Grid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.075, 0.075, 0.2))
    full = VoxelEncoder(paper, LidarConfig(encoder="voxels", channels=[16, 128]))
    assert paper.shape == (1440, 1440, 40) and full.out_channels == 256 and full.stride == 8
    # The first, eight blocks of two, three that halve the size, the last.
    assert sum(isinstance(m, SparseConv) for m in full.modules()) == 1 + 16 + 3 + 1
    block = SparseBlock(3).double()
    given = sites(2, 3)
    inner = block.second(block.first(given)).rows
    assert torch.equal(block(given).rows, (inner + given.rows).relu())
    assert len(pairs(given, (3, 3, 3), (1, 1, 1), (1, 1, 1))[1]) == 27


def test_the_first_layer_of_voxels_reads_whole_metres() -> None:
    """In half precision 50.13 m are 50.25, and a voxel is 0.1 m."""
    torch.manual_seed(0)
    grid = Grid((48.0, -1.6, -1.0), (51.2, 1.6, 1.4), (0.1, 0.1, 0.1))
    cfg = LidarConfig(encoder="voxels", cell=[0.1, 0.1, 0.1], channels=[8, 16])
    encoder = VoxelEncoder(grid, cfg).eval()
    layer, seen = encoder.layers[0], []
    layer.register_forward_hook(lambda _, given, out: seen.append(out.rows))
    layer.weight.data.zero_()[13, 0, 0] = 1  # its x, as it is
    points = torch.tensor([[50.13, 0.0, 0, 0, 0], [50.22, 0, 0, 0, 0]])
    layer.norm.running_mean[0] = 50.0
    share_norms(encoder).bfloat16()  # as a run in half precision has it
    encoder(points, torch.zeros(2, dtype=torch.long), 1)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0][:, 0].tolist() == pytest.approx([0.13, 0.22], abs=2e-3)


def test_second_has_the_sizes_of_the_paper() -> None:
    pillars = SecondWithFpn(64, SecondConfig())
    assert pillars.out_channels == 384 and pillars.stride == 4
    assert pillars.eval()(torch.zeros(1, 64, 32, 24)).shape == (1, 384, 8, 6)
    assert [len(stage) for stage in pillars.backbone["stages"]] == [4, 6, 6]
    decoder = SecondWithFpn(256, DecoderConfig())
    assert decoder.out_channels == 512 and decoder.stride == 1
    # As BEVFusion's config counts them: 3x3 convolutions, (transposed) convolutions of the pyramid, norms.
    convs = 9 * (256 * 128 + 5 * 128**2 + 128 * 256 + 5 * 256**2) + 128 * 256 + 4 * 256 * 256
    norms = 2 * (6 * 128 + 6 * 256 + 2 * 256)
    assert sum(p.numel() for p in decoder.parameters()) == convs + norms


def test_fuser_and_projectors() -> None:
    fuser = ConvFuser((2, 3), 8)
    assert fuser([torch.ones(1, 2, 4, 4), torch.ones(1, 3, 4, 4)]).shape == (1, 8, 4, 4)
    assert fuser.conv[0].bias is None
    projector = PointProjector(6)
    out = projector(torch.randn(5, 6))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))
    for rows in (0, 1):  # too few for statistics: the running ones
        projector(torch.randn(rows, 6)).sum().backward()
    assert RowNorm(3)(torch.ones(1, 3)).tolist() == [pytest.approx([1, 1, 1], abs=1e-4)]


def test_boxes_of_regions_crop_their_own_cells() -> None:
    xy = torch.tensor([[0.0, 1.0], [2.0, -1.0], [1.0, 0.5], [3.0, 1.5], [9, 9], [-3, -1]])
    region = torch.tensor([0, 0, 3, 3, -1, 60])
    assert region_boxes(xy, region).tolist() == [[0, -1, 2, 1], [1, 0.5, 3, 1.5]]
    torch.manual_seed(0)
    projector, grid = BoxProjector(2), GRID
    bev = torch.zeros(1, 2, *grid.shape[:2])
    bev[0, :, 8:12, 2:6] = 1.0  # x in [0, 2), y in [-1, 1)
    inside, aside = (
        projector(bev, [torch.tensor([box])], grid) for box in ([0.5, -0.5, 1.5, 0.5], [-3.0, -1, -1, 1])
    )
    full = projector(torch.ones_like(bev), [torch.tensor([[0.5, -0.5, 1.5, 0.5]])], grid)
    empty = projector(torch.zeros_like(bev), [torch.tensor([[0.5, -0.5, 1.5, 0.5]])], grid)
    torch.testing.assert_close(inside, full)
    torch.testing.assert_close(aside, empty)
    assert (full - empty).abs().max() > 1e-3
    assert projector(bev, [torch.zeros(0, 4)], grid).shape == (0, 64)
