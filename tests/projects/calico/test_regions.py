"""Semantic pooling against scikit-learn, brute force, and what the real frames are known to hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from projects.calico import regions as pool
from projects.calico.frames import open_frames
from projects.calico.geometry import points_in_boxes
from projects.calico.region_cache import RegionCache
from projects.calico.regions import PRESETS, Preset, Regions
from projects.calico.scenes import Frame
from tests.projects.calico.frames import FRAMES, needs_frames
from vlmkd.errors import UserError


def nuscenes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points [n, 5], boxes [k, 7] and the counts that the data set states [k]."""
    info = json.loads((FRAMES / "nuscenes/info.json").read_text())["data_list"][0]["instances"]
    points = np.fromfile(FRAMES / "nuscenes/LIDAR_TOP.pcd.bin", np.float32).reshape(-1, 5)
    return points, np.array([i["bbox_3d"] for i in info]), np.array([i["num_lidar_pts"] for i in info])


def best_ious(region: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """For each column of bool [n, k], the greatest point-IoU with a region."""
    best = np.zeros(inside.shape[1])
    for k, own in enumerate(inside.T):
        for r in set(region[own]) - {-1}:
            best[k] = max(best[k], (own & (region == r)).sum() / (own | (region == r)).sum())
    return best


# ---------------------------------------------------------------------------------------------------------- clusters


def brute_dbscan(xy: np.ndarray, eps: float, least: int) -> np.ndarray:
    """The textbook's: grow each cluster from its first dense point; a border point belongs to the first to reach it."""
    near = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) <= eps
    dense = near.sum(1) >= least
    label, clusters = np.full(len(xy), -1), 0
    for start in np.flatnonzero(dense):
        if label[start] < 0:
            todo = [start]
            while todo:
                point = todo.pop()
                fresh = np.flatnonzero(near[point] & (label < 0)) if dense[point] else []
                for other in [point, *fresh] if label[point] < 0 else fresh:
                    label[other] = clusters
                    todo.append(other)
            clusters += 1
    return label


@pytest.mark.parametrize("seed", range(6))
def test_dbscan_is_the_textbooks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    xy = rng.normal(size=(12, 1, 2)) * 4 + rng.normal(size=(12, 25, 2)) * rng.uniform(0.05, 1, (12, 1, 1))
    xy = xy.reshape(-1, 2)[rng.permutation(300)]
    found = 0
    for eps in (0.3, 0.5, 1.0):
        for least in (1, 2, 5, 9):
            mine = pool.dbscan2d(xy, eps, least)
            assert np.array_equal(mine, brute_dbscan(xy, eps, least))
            found += mine.max() + 1
    assert found > 100


def test_clusters_that_nearly_touch_are_told_apart() -> None:
    """Crowded cells whose first points are far apart, and one pair of whose points is within eps or just is not."""
    rng = np.random.default_rng(0)
    for gap, clusters in ((0.4999, 1), (0.5001, 2)):
        left = np.concatenate([rng.uniform([-0.19, 0], [-0.1, 0.19], (60, 2)), [[0, 0.1]]])
        right = np.concatenate([rng.uniform([gap + 0.1, 0], [gap + 0.19, 0.19], (60, 2)), [[gap, 0.1]]])
        assert pool.dbscan2d(np.concatenate([left, right]), 0.5, 5).max() + 1 == clusters


@pytest.mark.parametrize("name", ["grid", "line", "twins", "one", "none", "two", "far line"])
def test_dbscan_of_points_that_span_no_triangles(name: str) -> None:
    steps = np.arange(30) * 0.5
    xy = {
        "grid": np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2),  # four points on every circle
        "line": np.stack([steps[::-1], 2 * steps[::-1]], 1),
        "twins": np.repeat([[1.0, 2], [3, 4], [1.2, 2]], 9, 0),
        "one": np.ones((1, 2)),
        "none": np.empty((0, 2)),
        "two": np.array([[0.0, 0], [0.5, 0]]),
        "far line": np.stack([np.full(30, 1e4), steps**1.5], 1),
    }[name]
    for eps in (0.5, 0.75, 1.2):
        for least in (1, 2, 5):
            expected = brute_dbscan(xy, eps, least)
            assert np.array_equal(pool.dbscan2d(xy, eps, least), expected), (eps, least)


@needs_frames
def test_dbscan_equals_scikit_learn_on_a_sweep() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    points, _, _ = nuscenes()
    points = points[~pool.gpf(points, 1.841) & (np.abs(points[:, :2]) <= 25).all(1)]
    theirs = cluster.DBSCAN(eps=0.75, min_samples=5).fit_predict(points[:, :2])
    assert np.array_equal(pool.dbscan2d(points[:, :2], 0.75, 5), theirs) and theirs.max() > 50


def test_clusters_do_not_depend_on_the_order_of_points() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(10, 1, 3)) * [8, 8, 0.1] + rng.normal(size=(10, 60, 3)) * 0.3
    points = points.reshape(-1, 3).astype(np.float32)
    order = rng.permutation(len(points))
    preset = replace(PRESETS["default"], area=(0.0, 100.0))
    one, other = (pool.propose(p, preset, 1.841).region for p in (points, points[order]))
    pairs = {(a, b) for a, b in zip(one[order], other, strict=True)}
    assert len(pairs) == len(set(one)) == len(set(other)) > 3  # the same parts under other numbers
    for region in (one, other):
        first = [np.flatnonzero(region == r)[0] for r in range(region.max() + 1)]
        assert first == sorted(first)


# ------------------------------------------------------------------------------------------------------------ ground


def road(rng: np.random.Generator, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """A road that rises by 2 % along y, with boxes of points on it; bool [n] tells the road."""
    xy = rng.uniform(-50, 50, (count, 2))
    flat = np.column_stack([xy, -1.8 + 0.02 * xy[:, 1] + rng.normal(0, 0.02, count)])
    things = np.column_stack([rng.uniform(-50, 50, (count // 4, 2)), rng.uniform(-0.3, 2, count // 4)])
    things[:, 2] += 0.02 * things[:, 1]
    return np.concatenate([flat, things]).astype(np.float32), np.arange(count + count // 4) < count


def test_a_sloping_road_is_ground() -> None:
    rng = np.random.default_rng(0)
    points, truth = road(rng)
    for ground in (pool.gpf(points, 1.8), pool.ransac_ground(points, rng)):
        assert (ground & truth).sum() / (ground | truth).sum() > 0.98


def test_ground_survives_what_a_sweep_can_be() -> None:
    rng = np.random.default_rng(1)
    line = np.column_stack([np.zeros(200), np.linspace(0, 9, 200), np.full(200, -1.8)])
    wall = np.column_stack([np.full(300, 5.0), rng.uniform(0, 9, 300), rng.uniform(-1.8, 4, 300)])
    below = np.column_stack([rng.uniform(0, 9, (200, 2)), np.full(200, -9.0)])
    for points in (
        np.empty((0, 3)),
        line[:10],
        line,
        wall,
        below,
        np.concatenate([line, wall]),
        np.ones((80, 3)),
    ):
        ground = pool.gpf(points, 1.8)
        assert ground.shape == (len(points),) and ground.dtype == bool
        assert pool.ransac_ground(points, rng, iterations=20).shape == (len(points),)
    assert pool.gpf(line, 1.8).all() and pool.gpf(below, 1.8).all()
    assert not pool.gpf(line[:10], 1.8).any()  # too few points for a plane
    far, _ = road(rng)
    assert not pool.gpf(far + np.float32([200, 0, 0]), 1.8).any()


@needs_frames
@pytest.mark.parametrize(("axis", "least"), [("x", (0.86, 0.998, 0.86)), ("y", (0.91, 0.97, 0.93))])
def test_ground_of_argoverse(axis: pool.Axis, least: tuple[float, float, float]) -> None:
    frame = open_frames(FRAMES / "av2").read(0, labels=True)
    assert frame.labels is not None and frame.labels.ground is not None
    near = (np.abs(frame.points[:, :2]) <= 50).all(1)
    found, truth = pool.gpf(frame.points, 0.33, axis)[near], frame.labels.ground[near]
    both = (found & truth).sum()
    measured = both / (found | truth).sum(), both / found.sum(), both / truth.sum()
    assert measured > least and all(m >= floor for m, floor in zip(measured, least, strict=True))


# ----------------------------------------------------------------------------------------------------------- filters


def test_areas_and_thinness_of_rectangles() -> None:
    corners = np.array([[0, 0], [4, 0], [4, 1], [0, 1], [2, 0.5]], float)
    for angle in (0, 0.3, 1.2, 2.9):
        cos, sin = np.cos(angle), np.sin(angle)
        turned = corners @ np.array([[cos, sin], [-sin, cos]]) + 30
        assert pool.footprint(turned) == pytest.approx((4, 0.25))
    for line in (corners[:2], np.array([[0.0, 0], [1, 1], [2, 2], [3, 3]]), corners[:1]):
        assert pool.footprint(line) == pytest.approx((0, 0), abs=1e-9)


def cluster(x: float, y: float, size: tuple[float, float], top: float) -> np.ndarray:
    """A filled block of points whose highest is `top` above the ground, for a sensor 1.8 m high."""
    u, v, w = np.meshgrid(*(np.linspace(-0.5, 0.5, 5),) * 2, np.linspace(0, 1, 3))
    block = np.stack([x + size[0] * u, y + size[1] * v, -1.8 + top * w], -1)
    return block.reshape(-1, 3).astype(np.float32)


@pytest.mark.parametrize(
    ("where", "default", "prototype"),
    [
        (cluster(10, 5, (4.4, 1.8), 1.5), True, True),  # a car
        (cluster(10, 5, (0.4, 0.4), 1.7), True, False),  # somebody: 0.16 square metres
        (cluster(10, 5, (3.0, 0.2), 1.5), True, False),  # a thin side
        (cluster(10, 5, (0.1, 0.1), 1.0), False, False),
        (cluster(10, 5, (5.0, 5.0), 1.5), True, False),
        (cluster(10, 5, (6.0, 6.0), 1.5), False, False),
        (cluster(10, 5, (2.0, 2.0), 0.2), False, False),  # a kerb
        (cluster(10, 5, (2.0, 2.0), 5.0), True, False),  # a tree
        (cluster(0, 0, (2.0, 2.0), 1.5), False, False),  # the car itself
        (cluster(0, 20, (1.8, 2.5), 1.5), True, False),  # straight ahead
        (cluster(0, 20, (4.4, 1.8), 1.5), True, True),
    ],
)
def test_what_the_presets_keep(where: np.ndarray, default: bool, prototype: bool) -> None:
    label = np.zeros(len(where), int)
    for name, kept in (("default", default), ("prototype", prototype)):
        assert bool(pool.filter_regions(where, label, PRESETS[name], 1.8).max() == 0) is kept, name


def test_a_canopy_does_not_bridge_clusters_in_the_default() -> None:
    rng = np.random.default_rng(0)
    flat, _ = road(rng, 2000)
    below = [cluster(10, 5, (2.0, 2.0), 1.5), cluster(10, 9, (2.0, 2.0), 1.5)]
    canopy = np.column_stack([rng.uniform([8, 3], [12, 11], (500, 2)), rng.uniform(2.5, 5, 500)])
    points = np.concatenate([flat[:2000], *below, canopy]).astype(np.float32)
    default = pool.propose(points, PRESETS["default"], 1.8)
    assert default.count == 2 and (default.region[2000:2150] >= 0).mean() > 0.6
    assert pool.propose(points, PRESETS["prototype"], 1.8).count == 0


def test_rows_that_are_not_finite_and_far_ones_have_no_region() -> None:
    rng = np.random.default_rng(0)
    flat, _ = road(rng, 2000)
    points = np.concatenate([flat[:2000], cluster(10, 5, (2.0, 2.0), 1.5), cluster(70, 5, (2.0, 2.0), 1.5)])
    clean = pool.propose(points, PRESETS["default"], 1.8)
    holes = np.insert(points, [0, 2010], np.nan, axis=0)
    found = pool.propose(holes, PRESETS["default"], 1.8)
    assert np.array_equal(np.delete(found.region, [0, 2011]), clean.region) and clean.count == 1
    assert (found.region[np.isnan(holes[:, 0])] == -1).all() and (clean.region[-75:] == -1).all()
    assert pool.propose(np.empty((0, 5), np.float32), PRESETS["default"], 1.8).count == 0


# ------------------------------------------------------------------------------------------------------- real frames


@needs_frames
@pytest.mark.parametrize("axis", ["x", "y"])
def test_regions_of_the_nuscenes_frame(axis: pool.Axis) -> None:
    """32 beams in a dense street: what is found is little, and known."""
    points, boxes, stated = nuscenes()
    inside = points_in_boxes(points[:, :3].astype(np.float64), boxes).numpy()
    counted = inside.sum(0)
    assert (counted == stated).mean() >= 0.85 and np.abs(counted - stated).max() <= 16
    some = inside[:, counted >= 5]
    assert some.shape[1] == 29
    found = pool.propose(points, PRESETS["default"], 1.841, axis)
    assert 55 <= found.count <= 95 and (best_ious(found.region, some) > 0.3).mean() >= 0.35
    assert 0.55 < (found.region[inside.any(1)] >= 0).mean() < 0.75  # of points in boxes are in a region
    assert 0.1 < inside.any(1)[found.region >= 0].mean() < 0.22  # of points in regions are in a box
    old = pool.propose(points, PRESETS["prototype"], 1.841, axis)
    assert 15 <= old.count <= 30 and (best_ious(old.region, some) > 0.3).mean() < 0.2
    closer = pool.propose(points, replace(PRESETS["default"], eps=0.5), 1.841, axis)
    assert (best_ious(closer.region, some) > 0.3).mean() >= 0.45


@needs_frames
@pytest.mark.parametrize("preset", list(PRESETS))
def test_regions_of_the_kitti_frame(preset: str) -> None:
    frame = open_frames(FRAMES / "kitti").read(0, labels=True)
    assert frame.labels is not None
    inside = points_in_boxes(frame.points, frame.labels.boxes).numpy()
    found = pool.regions_of(frame, PRESETS[preset])
    assert (best_ious(found.region, inside) > 0.3).tolist() == [True] * 6


# ------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    cache = RegionCache(tmp_path / "regions", PRESETS["default"])
    region = np.array([-1, 0, 0, 1], np.int16)
    cache.write("a", "nuscenes", Regions(region, np.zeros(4, bool), 3))
    assert np.array_equal(cache.read("a", "nuscenes", 4), region)
    assert [path.name for path in cache.folder.iterdir()] == ["a.npz"]
    with pytest.raises(UserError, match="is of a sweep of 4 points, and this one has 5"):
        cache.read("a", "nuscenes", 5)
    with pytest.raises(UserError, match="b.npz does not exist; run .*region_cache"):
        cache.read("b", "nuscenes", 4)


def test_a_cache_of_another_preset_is_refused(tmp_path: Path) -> None:
    cache = RegionCache(tmp_path, PRESETS["default"])
    cache.write("a", "nuscenes", Regions(np.zeros(4, np.int16), np.zeros(4, bool), 1))
    closer = RegionCache(tmp_path, replace(PRESETS["default"], eps=0.5))
    with pytest.raises(UserError, match=r"another preset: eps 0\.75 and not 0\.5; set regions\.preset"):
        closer.read("a", "nuscenes", 4)
    with pytest.raises(UserError, match="sensor_height 1.841 and not 1.73, driving_axis y and not x"):
        cache.read("a", "kitti", 4)
    assert (
        len(
            {RegionCache(tmp_path, p).digest("nuscenes") for p in PRESETS.values()}
            | {closer.digest("nuscenes")}
        )
        == 3
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"text"])
def test_a_damaged_cache_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="region cache .*a.npz is damaged .*delete it"):
        RegionCache(tmp_path, Preset()).read("a", "nuscenes", 4)


def test_a_cache_without_its_preset_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", region=np.zeros(4))
    with pytest.raises(UserError, match="region cache .*a.npz has no made; delete it"):
        RegionCache(tmp_path, Preset()).read("a", "nuscenes", 4)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match="'protoype' does not exist; did you mean prototype"):
        pool.preset_of("protoype")


class TwoFrames:
    """Frames of a row of blocks, and how often each was read."""

    kind = "synthdrive"
    tokens = ("one", "two", "three")

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        assert not labels and not cameras
        self.reads.append(index)
        points = np.concatenate([cluster(10, 5 * n, (2.0, 2.0), 1.5) for n in range(index + 1)])
        points = np.pad(points, ((0, 0), (0, 2)))
        return Frame(self.tokens[index], "s", "synthdrive", points, np.ones(len(points), bool))


def test_the_builder_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from projects.calico import region_cache

    frames = TwoFrames()
    monkeypatch.setattr(region_cache, "open_frames", lambda path, root, sweeps: frames)
    assert region_cache.main(["data", str(tmp_path)]) == 0
    assert "3 sweeps; each has 2.0 clusters" in capsys.readouterr().out and frames.reads == [0, 1, 2]
    (tmp_path / "two.npz").unlink()
    assert region_cache.main(["data", str(tmp_path)]) == 0
    assert "1 sweeps" in capsys.readouterr().out and frames.reads == [0, 1, 2, 0, 1]
    assert region_cache.main(["data", str(tmp_path)]) == 0
    assert "nothing was missing" in capsys.readouterr().out
    with pytest.raises(UserError, match="another preset"):
        region_cache.main(["data", str(tmp_path), "--preset", "prototype"])


@pytest.mark.slow  # two interpreters start
@needs_frames
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    from projects.calico import region_cache

    for workers in ("1", "2"):
        region_cache.main([str(FRAMES / "av2"), str(tmp_path / workers), "--workers", workers])
    for token in ("sweep_0", "sweep_1"):
        one, two = (
            RegionCache(tmp_path / w, PRESETS["default"]).read(token, "av2", n)
            for w, n in zip("12", ({"sweep_0": 99229, "sweep_1": 99466}[token],) * 2, strict=True)
        )
        assert np.array_equal(one, two) and one.max() > 50
