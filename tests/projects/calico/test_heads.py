"""Detection and map heads: targets, losses and decoding against loops, exact polygons and brute-force matching."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import ConvexHull, HalfspaceIntersection
from torch import Tensor

from projects.calico.geometry import Grid, bev_sample, box_corners, wrap_yaw
from projects.calico.model_config import TASKS, HeadConfig
from projects.calico.networks import heads
from projects.calico.networks.boxes import (
    circle_nms,
    code_loss,
    decode,
    encode,
    focal_loss,
    gaussian_focal_loss,
    gaussian_radius,
    heat_map,
    overlaps,
    rotated_nms,
)
from projects.calico.networks.heads import CenterHead, QueryOutput, SegHead, TaskOutput, TransFusionHead
from vlmkd.errors import UserError

GRID = Grid((-12.8, -9.6, -5.0), (12.8, 9.6, 3.0), (0.8, 0.8, 8.0))
CLASSES = ("truck", "car", "pedestrian", "bus", "traffic_cone")


def boxes(count: int, seed: int = 0, reach: float = 1.0) -> Tensor:
    """Boxes of many sizes in the grid (times `reach`)."""
    make = torch.Generator().manual_seed(seed)
    found = torch.rand(count, 9, generator=make)
    found[:, :2] = (2 * found[:, :2] - 1) * torch.tensor([12.7, 9.5]) * reach
    found[:, 2] = -1.5 + found[:, 2]
    found[:, 3:6] = 0.4 + 4 * found[:, 3:6]
    found[:, 6] = (2 * found[:, 6] - 1) * math.pi
    found[:, 7:] = 4 * found[:, 7:] - 2
    return found


def apart(count: int, seed: int = 0) -> Tensor:
    """Boxes no two of whose centres are in neighbouring cells."""
    found: list[Tensor] = []
    for box in boxes(20 * count, seed, reach=0.9):
        if all((box[:2] - other[:2]).abs().max() > 2.5 for other in found):
            found.append(box)
    return torch.stack(found[:count])


def same_boxes(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got[:, [0, 1, 2, 3, 4, 5, 7, 8]], expected[:, [0, 1, 2, 3, 4, 5, 7, 8]], rtol=1e-4, atol=1e-4
    )
    assert wrap_yaw(got[:, 6] - expected[:, 6]).abs().max() < 1e-4


def test_a_code_is_undone() -> None:
    given = boxes(20)
    same_boxes(decode(encode(given, GRID), GRID), given)
    assert encode(given[:, :7], GRID)[:, 8:].isnan().all()
    assert encode(torch.tensor([[-12.8, -9.6, 0, 1, 1, 1, 0, 0, 0]]), GRID)[0, :3].tolist() == [0, 0, 0]


def test_code_loss_is_a_weighted_l1_that_skips_unknown_velocities() -> None:
    code, target = torch.zeros(2, 10, requires_grad=True), torch.ones(2, 10)
    target[1, 8:] = torch.nan
    loss = code_loss(code, target)
    assert loss.item() == pytest.approx(8 + 0.4 + 8)
    loss.backward()
    assert code.grad[1].tolist() == [-1] * 8 + [0, 0]


def reference_radius(height: float, width: float, overlap: float) -> float:
    """mmdetection3d's `gaussian_radius`."""
    b1, c1 = height + width, width * height * (1 - overlap) / (1 + overlap)
    b2, c2 = 2 * (height + width), (1 - overlap) * width * height
    a3, b3, c3 = 4 * overlap, -2 * overlap * (height + width), (overlap - 1) * width * height
    r1 = (b1 + math.sqrt(b1**2 - 4 * c1)) / 2
    r2 = (b2 + math.sqrt(b2**2 - 4 * 4 * c2)) / 2
    r3 = (b3 + math.sqrt(b3**2 - 4 * a3 * c3)) / 2
    return min(r1, r2, r3)


def test_heat_maps_equal_the_references_one_by_one() -> None:
    given, labels = boxes(12), torch.arange(12) % 3
    x, y, _ = GRID.shape
    expected = np.zeros((4, x, y))
    for box, label in zip(given.tolist(), labels.tolist(), strict=True):
        length, width = box[3] / 0.8, box[4] / 0.8
        assert gaussian_radius(torch.tensor(length), torch.tensor(width)).item() == pytest.approx(
            reference_radius(length, width, 0.1), rel=1e-5
        )
        radius = max(2, int(reference_radius(length, width, 0.1)))
        i, j, sigma = int((box[0] + 12.8) / 0.8), int((box[1] + 9.6) / 0.8), (2 * radius + 1) / 6
        for a in range(max(i - radius, 0), min(i + radius + 1, x)):
            for b in range(max(j - radius, 0), min(j + radius + 1, y)):
                value = math.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * sigma**2))
                expected[label, a, b] = max(expected[label, a, b], value)
    heat = heat_map(given, labels, 4, GRID)
    np.testing.assert_allclose(heat.numpy(), expected, atol=1e-6)
    assert not heat_map(given[:0], labels[:0], 4, GRID).any()


def test_focal_losses_equal_loops() -> None:
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=make, dtype=torch.float64) * 3
    target = torch.rand(2, 3, 4, generator=make, dtype=torch.float64)
    target[0, 0, 0] = target[1, 2, 1] = 1
    pairs = list(zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    total = 0.0
    for x, t in pairs:
        p = sigmoid(x)
        total -= math.log(p) * (1 - p) ** 2 if t == 1 else math.log(1 - p) * p**2 * (1 - t) ** 4
    assert gaussian_focal_loss(logits, target).item() == pytest.approx(total / 2, rel=1e-5)
    assert gaussian_focal_loss(torch.full((3,), -90.0), torch.zeros(3)) == 0
    hot = (target > 0.5).double()
    for alpha in (0.25, None):
        rows = focal_loss(logits, hot, alpha).flatten().tolist()
        for row, (x, t) in zip(
            rows, zip(logits.flatten().tolist(), hot.flatten().tolist(), strict=True), strict=True
        ):
            p = sigmoid(x) if t else 1 - sigmoid(x)
            share = 1 if alpha is None else alpha if t else 1 - alpha
            assert row == pytest.approx(-share * (1 - p) ** 2 * math.log(p), rel=1e-4)


def polygon_overlap(a: Tensor, b: Tensor) -> float:
    """Exact area by half planes: scipy's own geometry."""
    planes = []
    for box in (a, b):
        cos, sin = math.cos(box[6]), math.sin(box[6])
        for nx, ny, half in ((cos, sin, box[3] / 2), (-sin, cos, box[4] / 2)):
            for sign in (1, -1):
                planes.append([sign * nx, sign * ny, -(sign * (nx * box[0] + ny * box[1]) + half)])
    planes = np.array([[float(v) for v in plane] for plane in planes])
    # A point inside both: the middle of a fine sample of them.
    steps = np.linspace(-0.5, 0.5, 41)
    u, v = np.meshgrid(steps * float(a[3]), steps * float(a[4]))
    cos, sin = math.cos(a[6]), math.sin(a[6])
    sample = np.stack([float(a[0]) + cos * u - sin * v, float(a[1]) + sin * u + cos * v], -1).reshape(-1, 2)
    inside = (sample @ planes[:, :2].T + planes[:, 2] < -1e-6).all(1)
    if not inside.any():
        return 0.0
    return float(ConvexHull(HalfspaceIntersection(planes, sample[inside].mean(0)).intersections).volume)


def test_overlaps_equal_exact_polygons() -> None:
    first, second = boxes(12, 1, reach=0.2).double(), boxes(12, 2, reach=0.2).double()
    second[0] = first[0]  # the same box, and one turned by a quarter, whose edges are parallel
    second[1] = first[0] + torch.tensor([0, 0, 0, 0, 0, 0, math.pi / 2, 0, 0])
    footprint, volume = overlaps(first, second), overlaps(first, second, height=True)
    met = 0
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            area = polygon_overlap(a, b)
            areas = [float(c[3] * c[4]) for c in (a, b)]
            expected = area / (sum(areas) - area)
            if area > 0.01 or footprint[i, j] > 0.01:  # the sample misses slivers
                met += 1
                assert footprint[i, j].item() == pytest.approx(expected, abs=1e-6)
            tops = [float(c[2] + c[5] / 2) for c in (a, b)]
            lows = [float(c[2] - c[5] / 2) for c in (a, b)]
            common = area * max(0, min(tops) - max(lows))
            volumes = sum(areas[n] * float(c[5]) for n, c in enumerate((a, b)))
            assert volume[i, j].item() == pytest.approx(common / (volumes - common), abs=2e-3)
    assert met > 60 and footprint[0, 0].item() == pytest.approx(1, abs=1e-9)
    far = boxes(3, 3) + torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0, 0])
    assert not overlaps(far, boxes(3, 3)).any() and overlaps(far[:0], far).shape == (0, 3)
    # Corners of a box go clockwise seen from above: what `overlap_area` relies on.
    corner = box_corners(torch.tensor([[0.0, 0, 0, 2, 1, 1, 0]]))[0, :4, :2]
    assert corner.tolist() == [[1, 0.5], [1, -0.5], [-1, -0.5], [-1, 0.5]]


def test_suppression_equals_the_plain_loop() -> None:
    given, scores = boxes(60, 4, reach=0.4), torch.rand(60, generator=torch.Generator().manual_seed(5))
    iou = overlaps(given, given)

    def plain(near: Any) -> list[int]:
        kept: list[int] = []
        for row in scores.argsort(descending=True).tolist():
            if not any(near(row, other) for other in kept):
                kept.append(row)
        return kept

    expected = plain(lambda a, b: iou[a, b] > 0.2)
    assert rotated_nms(given, scores, 0.2).tolist() == expected and len(expected) < 60
    assert rotated_nms(given, scores, 0.2, after=3).tolist() == expected[:3]
    near = plain(lambda a, b: ((given[a, :2] - given[b, :2]) ** 2).sum() <= 4)
    assert circle_nms(given, scores, 4.0).tolist() == near and len(near) < 60
    assert (
        circle_nms(given[:0], scores[:0], 4.0).tolist()
        == rotated_nms(given[:0], scores[:0], 0.2).tolist()
        == []
    )


def center_head(**kwargs: Any) -> CenterHead:
    cfg = HeadConfig(tasks=["car+pedestrian", "truck+bus", "traffic_cone"], width=8, **kwargs)
    return CenterHead(8, GRID, CLASSES, cfg)


def query_head(**kwargs: Any) -> TransFusionHead:
    return TransFusionHead(4, GRID, CLASSES, HeadConfig(width=16, queries=6, hidden=32, **kwargs))


def perfect(head: CenterHead, given: Tensor, labels: Tensor) -> list[TaskOutput]:
    """Maps whose decoding must give the boxes back."""
    outputs = []
    for heat, cell, code in head.targets(given, labels):
        maps = torch.zeros(1, 10, *GRID.shape[:2])
        maps[0, :, cell[:, 0], cell[:, 1]] = code.nan_to_num().T
        outputs.append(TaskOutput(heat[None].clamp(1e-4, 1 - 1e-4).logit(), maps))
    return outputs


@pytest.mark.parametrize(
    ("nms", "kwargs"), [("none", {}), ("circle", {"circles": [1.0, 1.0, 1.0]}), ("rotated", {})]
)
def test_boxes_go_through_center_targets_and_decoding(nms: Any, kwargs: Any) -> None:
    head = center_head(nms=nms, least_score=0.9, **kwargs)
    given, labels = apart(9), torch.arange(9) % 5
    given[:, 3:5] = given[:, 3:5].clamp(max=2)  # so that `rotated` suppresses none
    (found,) = head.decode(perfect(head, given, labels))
    order = found.boxes[:, 0].argsort()
    wanted = given[:, 0].argsort()
    same_boxes(found.boxes[order], given[wanted])
    assert torch.equal(found.labels[order], labels[wanted])
    assert (found.scores.diff() <= 0).all()
    # A box beyond the map is no target, and an empty frame has neither peaks nor boxes.
    beyond = torch.cat([given, given[:1] + 40])
    assert sum(len(cell) for _, cell, _ in head.targets(beyond, F.pad(labels, (0, 1)))) == 9
    empty = head.targets(given[:0], labels[:0])
    assert all(not heat.any() and not len(cell) for heat, cell, _ in empty)
    (nothing,) = head.decode(perfect(head, given[:0], labels[:0]))
    assert len(nothing.boxes) == 0 and nothing.boxes.shape[1] == 9


def test_center_loss_equals_its_parts() -> None:
    head = center_head()
    given, labels = [apart(7), apart(7)[:0]], [torch.arange(7) % 5, torch.arange(0)]
    given[0][2, 7:] = torch.nan
    outputs = head(torch.randn(2, 8, *GRID.shape[:2], generator=torch.Generator().manual_seed(0)))
    losses = head.loss(outputs, given, labels)
    heat, box = 0.0, 0.0
    for output, target in zip(outputs, head.targets(given[0], labels[0]), strict=True):
        both = torch.stack([target[0], torch.zeros_like(target[0])])
        heat += gaussian_focal_loss(output.heat, both).item()
        rows = torch.stack([output.code[0, :, i, j] for i, j in target[1].tolist()])
        box += 0.25 * code_loss(rows, target[2]).item() / (len(rows) + 1e-4)
    assert losses["heat"].item() == pytest.approx(heat, rel=1e-5)
    assert losses["box"].item() == pytest.approx(box, rel=1e-5)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert torch.sigmoid(head.tasks[0]["heat"][1].bias).tolist() == pytest.approx([0.1] * 2, abs=1e-3)
    # A loss with targets of its own making is smallest there.
    exact = head.loss(
        [TaskOutput(*(torch.cat([p, p]) for p in o)) for o in perfect(head, given[0], labels[0])],
        [given[0]] * 2,
        [labels[0]] * 2,
    )
    assert exact["box"] < 1e-6


def test_center_heads_are_checked() -> None:
    names = sorted("+".join(TASKS).split("+"))
    members = CenterHead(8, GRID, names, HeadConfig(nms="circle")).members
    assert [len(task) for task in members] == [1, 2, 2, 1, 2, 2]
    assert CenterHead(8, GRID, CLASSES, HeadConfig(tasks=[])).members == [[0, 1, 2, 3, 4]]
    with pytest.raises(UserError, match="model.head.tasks has the classes car, but"):
        CenterHead(8, GRID, CLASSES, HeadConfig(tasks=["car"]))
    with pytest.raises(UserError, match="model.head.circles has 6 numbers for 3 tasks"):
        center_head(nms="circle")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CenterHead, {"width": 8, "tasks": [], "least_score": 0.1}),
        (TransFusionHead, {"width": 16, "queries": 20, "hidden": 32}),
    ],
)
def test_a_head_learns_one_frame(kind: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that tells where the boxes are: after a minute's fraction the head gives them back."""
    torch.manual_seed(0)
    monkeypatch.setattr(heads, "DROPOUT", 0.0)
    head = kind(8, GRID, CLASSES, HeadConfig(**fields))
    given, labels = apart(5), torch.tensor([1, 1, 2, 0, 4])
    bev = torch.randn(1, 8, *GRID.shape[:2])
    optimiser = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(80):
        loss = torch.stack(list(head.loss(head(bev), [given], [labels]).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    (found,) = head.decode(head(bev))  # in train mode: the statistics of this one map
    for box, label in zip(given, labels, strict=True):
        near = (found.boxes[:, :2] - box[:2]).norm(dim=1) < 0.5
        assert (near & (found.labels == label) & (found.scores > 0.3)).any()


def test_queries_start_from_local_maxima() -> None:
    head = query_head()
    heat = torch.full((1, 5, *GRID.shape[:2]), -9.0)
    heat[0, 1, 3, 4], heat[0, 1, 3, 5] = 3.0, 2.0  # cars: the second is not a maximum of its neighbourhood
    heat[0, 2, 8, 8], heat[0, 2, 8, 9] = 1.0, 0.5  # pedestrians may be neighbours
    heat[0, 3, 0, 0] = 0.1  # a corner
    peak, label, cell = head.peaks(heat)
    y = GRID.shape[1]
    assert label[0, :4].tolist() == [1, 2, 2, 3] and cell[0, :4].tolist() == [
        3 * y + 4,
        8 * y + 8,
        8 * y + 9,
        0,
    ]
    assert peak[0, :4].tolist() == pytest.approx([1 / (1 + math.exp(-v)) for v in (3, 1, 0.5, 0.1)], abs=1e-6)


def test_the_assignment_is_the_cheapest() -> None:
    head = query_head()
    given, labels = boxes(3, 6, reach=0.3), torch.tensor([1, 0, 1])
    make = torch.Generator().manual_seed(0)
    score = torch.randn(5, 5, generator=make)
    code = encode(boxes(5, 7, reach=0.3), GRID)
    rows, columns = head.assign(score, code, given, labels)
    found, p = decode(code, GRID), score.sigmoid()
    iou = overlaps(found, given, height=True)

    def cost(i: int, j: int) -> float:
        q = p[i, labels[j]].item()
        focal = -0.25 * (1 - q) ** 2 * math.log(q) + 0.75 * q**2 * math.log(1 - q)
        away = (found[i, :2] - given[j, :2]).abs() / torch.tensor([25.6, 19.2])
        return 0.15 * focal + 0.25 * away.sum().item() - 0.25 * iou[i, j].item()

    best = min(permutations(range(5), 3), key=lambda chosen: sum(cost(i, j) for j, i in enumerate(chosen)))
    assert {(int(j), int(i)) for i, j in zip(rows, columns, strict=True)} == set(enumerate(best))
    none = head.assign(score, code, given[:0], labels[:0])
    assert len(none[0]) == len(none[1]) == 0


def test_transfusion_loss_and_decoding_give_boxes_back() -> None:
    head = query_head()
    given, labels = apart(4), torch.tensor([1, 2, 0, 4])
    code = torch.cat([encode(given, GRID), encode(boxes(2, 9), GRID)])[None]
    label = torch.cat([labels, torch.tensor([3, 3])])[None]
    score = torch.full((1, 6, 5), -20.0)
    score[0, torch.arange(4), labels] = 20.0
    peak = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    heat = heat_map(given, labels, 5, GRID)[None].clamp(1e-6, 1 - 1e-6).logit()
    output = QueryOutput(heat, label, peak, score, code)
    losses = head.loss(output, [given], [labels])
    assert losses["box"] < 1e-6 and losses["score"] < 1e-6
    # Another class for the last box: a missed and a wrong logit of 20 each, focal weights 0.25 and 0.75, over 4 boxes.
    wrong = head.loss(output, [given], [torch.tensor([1, 2, 0, 3])])
    assert wrong["score"].item() == pytest.approx((0.25 * 20 + 0.75 * 20) / 4, rel=1e-3)
    (found,) = head.decode(output)
    assert found.scores[:4].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6], abs=1e-5)
    same_boxes(found.boxes[:4], given)
    assert torch.equal(found.labels[:4], labels) and found.scores[4:].max() < 1e-6
    unknown = given.clone()
    unknown[:, 7:] = torch.nan
    assert head.loss(output, [unknown], [labels])["box"] < 1e-6
    assert head.loss(output, [given[:0]], [labels[:0]])["box"] == 0


def test_what_the_map_head_reads_is_grid_sample_also_beyond_the_map() -> None:
    grid = Grid((-12.8, -9.6, -5.0), (12.8, 9.6, 3.0), (0.8, 1.6, 8.0))
    labels = Grid((-15.0, -9.0, -5.0), (9.0, 12.0, 3.0), (0.5, 0.7, 8.0))
    head = SegHead(3, grid, 2, labels)
    bev = torch.randn(2, 3, *grid.shape[:2], generator=torch.Generator().manual_seed(0))
    places = labels.centre(torch.cartesian_prod(torch.arange(48), torch.arange(30)))
    wanted = bev_sample(bev, places.expand(2, -1, -1), grid).mT.reshape(2, 3, 48, 30)
    torch.testing.assert_close(head.sampled(bev), wanted, rtol=0, atol=1e-4)
    assert (wanted == 0).any() and wanted.abs().mean() > 0.1


def test_maps_are_read_at_the_labels_cells() -> None:
    grid = Grid((-12.8, -9.6, -5.0), (12.8, 9.6, 3.0), (0.8, 0.8, 8.0))
    labels = Grid((-8.0, -4.0, -5.0), (8.0, 4.0, 3.0), (0.4, 0.4, 8.0))
    head = SegHead(3, grid, 2, labels)
    seen: list[Tensor] = []
    head.convs.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    index = torch.cartesian_prod(torch.arange(32), torch.arange(24))
    ramp = torch.cat([grid.centre(index).T, torch.ones(1, 768)]).reshape(1, 3, 32, 24)  # x and y themselves
    logits = head(ramp)
    assert logits.shape == (1, 2, 40, 20)
    places = labels.centre(torch.cartesian_prod(torch.arange(40), torch.arange(20))).T.reshape(2, 40, 20)
    torch.testing.assert_close(seen[0][0, :2], places, rtol=0, atol=1e-4)
    masks = (places > 0).float()[None]
    p = logits.double().sigmoid()
    p = torch.where(masks > 0, p, 1 - p)
    loss = head.loss(logits, masks)["map"]
    assert loss.item() == pytest.approx((-((1 - p) ** 2) * p.log()).mean().item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in head.parameters())
    torch.testing.assert_close(head.decode(logits), logits.sigmoid())
