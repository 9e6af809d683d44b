"""CALICO's losses against float64 loops, and the acceptance checks of its specification (b.4, b.5, i.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.calico.losses import (
    box_clip_loss,
    centre_weights,
    feature_mse,
    joined_regions,
    plrc_loss,
    pointcontrast_loss,
    prc_loss,
    rad_loss,
    rapc_loss,
    region_weights,
)

REGION = torch.tensor([0, 0, 2, 1, 1, 1, -1, -1, -1])


def vectors(seed: int, rows: int = 9, width: int = 5) -> Tensor:
    noise = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(noise, dim=1)


def dots(z: Tensor, z2: Tensor, tau: float) -> list[list[float]]:
    rows, columns = z.tolist(), z2.tolist()
    return [[math.exp(sum(a * b for a, b in zip(x, y, strict=True)) / tau) for y in columns] for x in rows]


def plrc_loop(z: Tensor, z2: Tensor, region: list[int], tau: float) -> float:
    e, anchors = dots(z, z2, tau), [i for i, r in enumerate(region) if r >= 0]
    total = 0.0
    for i in anchors:
        positives = [j for j in anchors if region[j] == region[i]]
        total += sum(-math.log(e[i][j] / sum(e[i])) for j in positives) / len(positives)
    return total / len(anchors)


def rapc_loop(
    z: Tensor, z2: Tensor, region: list[int], tau: float, weights: list[float] | None = None
) -> float:
    e, anchors = dots(z, z2, tau), [i for i, r in enumerate(region) if r >= 0]
    share = weights or [1 / len(anchors) if r >= 0 else 0 for r in region]
    total = 0.0
    for i in anchors:
        negatives = sum(e[i][k] for k in range(len(region)) if region[k] != region[i])
        total -= share[i] * math.log(e[i][i] / (e[i][i] + negatives))
    return total


@pytest.mark.parametrize(("loss", "loop"), [(plrc_loss, plrc_loop), (rapc_loss, rapc_loop)])
def test_equal_loops(loss: Callable, loop: Callable) -> None:
    z, z2, region = vectors(0), vectors(1), REGION.tolist()
    one_way, _ = loss(z, z2, REGION, 0.3, symmetric=False)
    both, stats = loss(z, z2, REGION, 0.3)
    there, back = loop(z, z2, region, 0.3), loop(z2, z, region, 0.3)
    assert one_way.item() == pytest.approx(there, abs=1e-12)
    assert both.item() == pytest.approx((there + back) / 2, abs=1e-12)
    negatives = [sum(r != own for r in region) for own in region if own >= 0]
    chance = math.log(9) if loss is plrc_loss else sum(math.log(1 + n) for n in negatives) / len(negatives)
    assert stats["chance"].item() == pytest.approx(chance, abs=1e-12)
    z, z2 = z.requires_grad_(), z2.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, REGION, 0.3)[0], (z, z2))


def test_rows_in_any_order_and_regions_under_any_name() -> None:
    z, z2, order = vectors(0), vectors(1), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    renamed = torch.tensor([7, 3, 4, -1])[REGION]  # 0, 1, 2 and the last, -1
    for loss in (plrc_loss, rapc_loss, rad_loss):
        value = loss(z, z2, REGION)[0].item()
        assert loss(z[order], z2[order], REGION[order])[0].item() == pytest.approx(value, abs=1e-12)
        assert loss(z.float()[order], z2.float()[order], REGION[order])[0].item() == pytest.approx(
            value, abs=1e-5
        )
        assert loss(z, z2, renamed)[0].item() == pytest.approx(value, abs=1e-12)
        with pytest.raises(ValueError, match="8 regions"):
            loss(z, z2, REGION[:8])


def test_the_bounds_of_plrc_and_rapc() -> None:
    """b.4: one region alone gives log N at equality of similarities; identical orthonormal views give a closed form."""
    one = torch.zeros(6, dtype=torch.long)
    assert plrc_loss(vectors(0, 6), vectors(1, 6), one)[0] > math.log(6) + 1e-3
    same = vectors(0, 1).expand(6, -1)
    assert plrc_loss(same, same, one)[0].item() == pytest.approx(math.log(6), abs=1e-12)
    z, region = torch.eye(9, dtype=torch.float64), REGION
    expected = [math.log(1 + n * math.exp(-10)) for n in (7, 7, 8, 6, 6, 6)]
    value, stats = rapc_loss(z, z, region)
    assert value.item() == pytest.approx(sum(expected) / 6, abs=1e-12)
    assert stats["alignment"] == 0 and stats["positive_rank"] == 1
    assert stats["uniformity"].item() == pytest.approx(-4, abs=1e-12)  # squared distance 2 between all
    collapsed = rapc_loss(same, same, torch.tensor([0, 1, 2, 3, -1, -1]))
    assert collapsed[0].item() == pytest.approx(collapsed[1]["chance"].item(), abs=1e-12)
    assert collapsed[1]["positive_rank"] == 3.5  # among six
    assert collapsed[1]["uniformity"].item() == pytest.approx(0, abs=1e-12)


def test_prc_mixes_its_terms_and_arms_leave_one_out() -> None:
    point, scene = (vectors(0), vectors(1)), (vectors(2), vectors(3))
    first, second = plrc_loss(*point, REGION)[0], rapc_loss(*scene, REGION)[0]
    value, stats = prc_loss(point, scene, REGION, alpha=0.3)
    assert value.item() == pytest.approx(0.3 * first.item() + 0.7 * second.item(), abs=1e-12)
    assert stats["plrc"] == first and stats["rapc"] == second and stats["plrc_skipped"] == 0
    assert prc_loss(point, None, REGION, alpha=1)[0] == first
    assert prc_loss(None, scene, REGION, alpha=0)[0] == second
    with pytest.raises(ValueError, match="vectors of rapc are missing"):
        prc_loss(point, None, REGION)


@pytest.mark.parametrize("region", [[], [-1] * 4, [3, 3, -1, -1]])
def test_fewer_than_two_regions_give_zero_and_zero_gradient(region: list[int]) -> None:
    rows = len(region)
    z, z2 = vectors(0, 4)[:rows].requires_grad_(), vectors(1, 4)[:rows].requires_grad_()
    value, stats = prc_loss((z, z2), (z, z2), torch.tensor(region, dtype=torch.long))
    value = value + rad_loss(z, z2, torch.tensor(region, dtype=torch.long))[0]
    value.backward()
    assert value == 0 and stats["rapc_skipped"] == 1
    assert not z.grad.any() and not z2.grad.any() and z.grad.shape == (rows, 5)


def test_rad_counts_each_region_the_same() -> None:
    z, z2, region = vectors(0), vectors(1), REGION.tolist()
    by_region = [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9, 0, 0, 0]
    assert region_weights(REGION).tolist() == pytest.approx(by_region, abs=1e-7)
    value = rad_loss(z, z2, REGION, 0.3)[0].item()
    assert value == pytest.approx(rapc_loop(z, z2, region, 0.3, by_region), abs=1e-6)
    uniform = rad_loss(z, z2, REGION, 0.3, weight="uniform")[0].item()
    assert uniform == pytest.approx(rapc_loop(z, z2, region, 0.3), abs=1e-12)
    own = [0.5, 0, 1, 0.25, 0, 0, 9, 9, 9]  # the last three have no region and do not count
    given = rad_loss(z, z2, REGION, 0.3, weight=torch.tensor(own))[0].item()
    assert given == pytest.approx(rapc_loop(z, z2, region, 0.3, [w / 1.75 for w in own]), abs=1e-12)
    both = rad_loss(z, z2, REGION, 0.3, weight="uniform", direction="symmetric")[0].item()
    assert both == pytest.approx((uniform + rapc_loop(z2, z, region, 0.3)) / 2, abs=1e-12)


def test_a_regions_share_does_not_depend_on_its_size() -> None:
    """b.5: twice the samples of a region of 900 do not change what one of 10 adds to the gradient."""
    axis = F.one_hot(torch.tensor(0), 5).double()

    def share(large: int, weight: Literal["region", "uniform"]) -> float:
        # The small region's positives lie so far off that its rows' gradient does not feel how many negatives there are.
        camera = axis.repeat(large + 10, 1).requires_grad_()
        lidar = torch.cat([axis.expand(large, -1), -axis.expand(10, -1)])
        region = torch.tensor([0] * large + [1] * 10)
        (grad,) = torch.autograd.grad(rad_loss(camera, lidar, region, weight=weight)[0], camera)
        return grad[large:].norm(dim=1).sum().item()

    assert share(900, "region") == pytest.approx(0.5 * 2 / 0.1, abs=1e-5)  # |s| = 2, and a step of 2 / tau
    assert share(1800, "region") == pytest.approx(share(900, "region"), abs=1e-5)
    assert share(1800, "uniform") == pytest.approx(share(900, "uniform") * 910 / 1810, abs=1e-5)


def test_pointcontrast_is_infonce_both_ways() -> None:
    z, z2 = vectors(0), vectors(1)
    logits = z @ z2.T / 0.1
    expected = (F.cross_entropy(logits, torch.arange(9)) + F.cross_entropy(logits.T, torch.arange(9))) / 2
    assert pointcontrast_loss(z, z2)[0].item() == pytest.approx(expected.item(), abs=1e-12)
    assert pointcontrast_loss(z[:0], z2[:0])[0] == 0
    scaled = F.cross_entropy(10 * z @ z2.T, torch.arange(9)) + F.cross_entropy(10 * z2 @ z.T, torch.arange(9))
    assert box_clip_loss(z, z2).item() == pytest.approx(scaled.item() / 2, abs=1e-12)
    assert box_clip_loss(z[:1], z2[:1]) == 0


def test_feature_mse_and_centre_weights() -> None:
    student, teacher = vectors(0).requires_grad_(), vectors(1).requires_grad_()
    squared = (student - teacher).detach().square().mean(1).tolist()
    assert feature_mse(student, teacher).item() == pytest.approx(sum(squared) / 9, abs=1e-12)
    shares = [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9]
    expected = sum(w * s for w, s in zip(shares, squared, strict=False))
    value = feature_mse(student, teacher, REGION)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    value.backward()
    assert teacher.grad is None and student.grad[:6].all() and not student.grad[6:].any()
    # A box of 4 x 2 m that heads along y: 2 m ahead is one half length, 1 m aside one half width.
    box = torch.tensor([[10.0, 5, 0, 4, 2, 1, math.pi / 2, 0, 0]])
    xy = torch.tensor([[10.0, 5], [10, 7], [9, 5], [11, 3]])
    assert centre_weights(xy, box).tolist() == pytest.approx(
        [1, *[math.exp(-0.5)] * 2, math.exp(-1)], abs=1e-6
    )
    assert centre_weights(xy, box[:0]).tolist() == [0] * 4


def test_negatives_may_come_from_the_whole_batch() -> None:
    frames = [
        torch.tensor([0, 1, -1]),
        torch.tensor([], dtype=torch.long),
        torch.tensor([-1]),
        torch.tensor([1, 0]),
    ]
    region = joined_regions(frames)
    assert region.tolist() == [0, 1, -1, -1, 3, 2]
    z, z2 = vectors(0, 6), vectors(1, 6)
    expected = (rapc_loop(z, z2, region.tolist(), 0.1) + rapc_loop(z2, z, region.tolist(), 0.1)) / 2
    assert rapc_loss(z, z2, region)[0].item() == pytest.approx(expected, abs=1e-12)


def test_half_precision_vectors_are_compared_in_float32() -> None:
    z, z2 = vectors(0).bfloat16(), vectors(1).bfloat16()
    value, _ = rapc_loss(z, z2, REGION)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(rapc_loss(z.double(), z2.double(), REGION)[0].item(), abs=1e-5)
