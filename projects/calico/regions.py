"""Semantic pooling: regions of one sweep that likely are objects, found without labels (docs/papers/calico.md).

Ground removal, DBSCAN in the plane, and filters; once per key sweep, kept in a cache (`region_cache`). numpy and
scipy only, and the same answer for the same points on every machine. Letters: n points, m points off the ground, R
regions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, QhullError, cKDTree
from scipy.spatial.distance import cdist

from projects.calico.scenes import DRIVING_AXIS, SENSOR_HEIGHT, Axis, Frame
from vlmkd.errors import UserError, did_you_mean

_STRIP, _LOWEST, _ROUNDS = 10.0, 50, 5
"""Of GPF: metres of a strip; points that tell its lowest level, and below which it is left out; planes fitted."""
_SEED, _ABOVE = 0.5, 0.2
"""Metres above the lowest level that GPF's seeds may have; above the plane that ground may have."""
_CELL = 0.4
"""Side of DBSCAN's cells over eps: below 0.7, so that a cell's points are neighbours; this is fast on real sweeps."""
_EGO = 1.5
"""Metres around the car that `Preset.ego` speaks of."""


@dataclass(frozen=True)
class Preset:
    """Every number that a region depends on. Metres and square metres in the frame of the points."""

    eps: float = 0.75
    """Radius of DBSCAN's neighbourhood."""
    min_samples: int = 5
    """Points in it, with the point itself, that make it dense."""
    extent: float = 54.0
    """Points with |x| or |y| beyond belong to no region."""
    ground: Literal["gpf", "ransac"] = "gpf"
    """How the ground is found."""
    crop_above_ground: float | None = 2.841
    """Points higher than this over the ground are left out before clustering, so that canopies do not bridge it."""
    area: tuple[float, float] = (0.02, 30.0)
    """Least and greatest area of the convex hull."""
    thinness: float = 0.0
    """Least ratio of the short to the long side of the smallest rectangle around it."""
    top: tuple[float, float] = (0.25, float("inf"))
    """Least and greatest height of the highest point over the ground."""
    ego: Literal["inside", "cross"] = "inside"
    """Clusters that count as the car itself: all points with |x| < 1.5 and |y| < 1.5; the prototype wrote "or"."""


PRESETS = {
    "default": Preset(),
    "prototype": Preset(
        crop_above_ground=None, area=(0.25, 20.0), thinness=0.1, top=(0.25, 4.841), ego="cross"
    ),
}


def preset_of(name: str) -> Preset:
    """The preset of a name."""
    if name not in PRESETS:
        known = f"there are {', '.join(PRESETS)}"
        raise UserError(f"regions preset {name!r} does not exist; {did_you_mean(name, PRESETS, known)}")
    return PRESETS[name]


def gpf(points: np.ndarray, sensor_height: float, axis: Axis = "y", extent: float = 54.0) -> np.ndarray:
    """Ground-plane fitting (Zermas et al., ICRA 2017): whether each of the points [n, >= 3] is ground, bool [n].

    A plane for every strip of 10 m along `axis`, the one that the car drives along. Strips of fewer than 50 points,
    and points beyond `extent`, have no ground. What lies below a plane is ground too.
    """
    ground = np.zeros(len(points), bool)
    xyz = points[:, :3].astype(np.float64)
    strip = np.floor((xyz[:, "xy".index(axis)] + extent) / _STRIP)
    strip[(np.abs(xyz[:, :2]) > extent).any(1)] = -1
    for rows in _groups(strip):
        if len(rows) >= _LOWEST:
            ground[rows] = _strip_ground(xyz[rows], sensor_height)
    return ground


def _groups(label: np.ndarray) -> list[np.ndarray]:
    """Rows of each label that is not negative, in the order of the labels."""
    order = np.argsort(label, kind="stable")
    order = order[label[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(label[order])) + 1) if len(order) else []


def _strip_ground(xyz: np.ndarray, sensor_height: float) -> np.ndarray:
    z = xyz[:, 2]
    heights = z[z >= -sensor_height - 0.5]  # reflections from below the road do not count
    if not len(heights):
        return np.ones(len(z), bool)
    seeds = z < np.sort(heights)[:_LOWEST].mean() + _SEED
    for _ in range(_ROUNDS):
        some = xyz[seeds]
        if len(some) < 3:
            break
        values, vectors = np.linalg.eigh(np.cov(some.T))
        normal = vectors[:, 0]
        if values[1] < 1e-9 or abs(normal[2]) < 1e-3:  # on a line or a wall there is no plane to stand on
            break
        normal = normal * np.sign(normal[2])  # an eigenvector has no sign of its own
        seeds = (xyz - some.mean(0)) @ normal < _ABOVE
    return seeds


def ransac_ground(
    points: np.ndarray, rng: np.random.Generator, *, threshold: float = 0.05, iterations: int = 1000
) -> np.ndarray:
    """The plane with the most points within `threshold`: whether points [n, >= 3] are within 0.2 m of it, bool [n]."""
    xyz = points[:, :3].astype(np.float64)
    ground, most = np.zeros(len(xyz), bool), 0
    if len(xyz) < 3:
        return ground
    some = xyz[rng.permutation(len(xyz))[:5000]]  # enough to compare planes by
    for triple in rng.integers(len(xyz), size=(iterations, 3)):
        a, b, c = xyz[triple]
        normal = np.cross(b - a, c - a)
        length = np.linalg.norm(normal)
        if length < 1e-9 or abs(normal[2]) < 0.7 * length:  # steeper than 45 degrees
            continue
        count = int((np.abs((some - a) @ normal) < threshold * length).sum())
        if count > most:
            ground, most = np.abs((xyz - a) @ (normal / length)) < _ABOVE, count
    return ground


def dbscan2d(xy: np.ndarray, eps: float, min_samples: int) -> np.ndarray:
    """Clusters of points [m, 2], int [m], -1 for noise; numbered by their first dense point.

    What scikit-learn's DBSCAN gives, without its lists of neighbours, of which stacked points have thousands: all
    points of a small cell are neighbours. A crowded cell is dense as it is; the others ask for their few nearest
    points. Clusters are parts of a graph of cells, linked where their first dense points are within eps; only between
    cells of different parts that lie a little further apart are all their points compared.
    """
    xy = xy.astype(np.float64)
    label = np.full(len(xy), -1)
    size = _CELL * eps
    cells = np.floor(xy / size).astype(np.int64)
    _, owner, count = np.unique(
        cells[:, 0] * (1 << 32) + cells[:, 1], return_inverse=True, return_counts=True
    )
    loose = np.flatnonzero(count[owner] < min_samples)
    dense = np.ones(len(xy), bool)
    if len(loose):
        tree = cKDTree(xy, balanced_tree=False, compact_nodes=False)
        bound = np.nextafter(eps, np.inf)
        near, who = tree.query(xy[loose], k=np.arange(1, min_samples + 1), distance_upper_bound=bound)
        dense[loose] = np.isfinite(near[:, -1])
    if not dense.any():
        return label
    core = np.flatnonzero(dense)
    order = core[np.argsort(owner[core], kind="stable")]
    start = np.flatnonzero(np.diff(owner[order], prepend=-1))  # of each cell's dense points in `order`
    part = _linked(xy[order], start, eps, eps + 2 * math.sqrt(2) * size)
    label[order] = np.repeat(part, np.diff(start, append=len(order)))
    label[core] = _by_first(label[core])
    if len(loose):
        # Those that are not dense know all that are within eps; the first cluster to reach one has it.
        reached = np.append(np.where(dense, label, len(xy)), len(xy))[who].min(1)
        edge = ~dense[loose] & (reached < len(xy))
        label[loose[edge]] = reached[edge]
    return label


def _linked(xy: np.ndarray, start: np.ndarray, eps: float, reach: float) -> np.ndarray:
    """The part [c] that each cell is of: cells are linked where points of them, from xy[start] on, are within eps."""
    first, low, high = xy[start], np.minimum.reduceat(xy, start), np.maximum.reduceat(xy, start)
    pairs = cKDTree(first).query_pairs(reach, output_type="ndarray")

    def parts(links: np.ndarray) -> np.ndarray:
        graph = coo_array((np.ones(len(links), bool), links.T), shape=(len(first), len(first)))
        return connected_components(graph, directed=False)[1]

    links = pairs[((first[pairs[:, 0]] - first[pairs[:, 1]]) ** 2).sum(1) <= eps * eps]
    part = parts(links)
    a, b = pairs[part[pairs[:, 0]] != part[pairs[:, 1]]].T
    gap = np.maximum(np.maximum(low[a] - high[b], low[b] - high[a]), 0)
    points = np.split(xy, start[1:])
    touching = [
        (one, other)
        for one, other in np.stack([a, b], 1)[(gap**2).sum(1) <= eps * eps]  # a few dozen of a sweep
        if cdist(points[one], points[other], "sqeuclidean").min() <= eps * eps
    ]
    return parts(np.concatenate([links, np.array(touching, links.dtype).reshape(-1, 2)]))


def _by_first(label: np.ndarray) -> np.ndarray:
    """Labels [m] as 0, 1, ... in the order in which they first come."""
    _, first, dense = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[dense]


def footprint(xy: np.ndarray) -> tuple[float, float]:
    """Area of the convex hull of points [m, 2], and short over long side of the rectangle of least area around them.

    Both are 0 for points on a line.
    """
    try:
        hull = ConvexHull(xy)
    except (QhullError, ValueError):
        return 0.0, 0.0
    corners = xy[hull.vertices]
    edges = np.roll(corners, -1, 0) - corners
    edges = edges / np.linalg.norm(edges, axis=1, keepdims=True)  # one side of it lies on an edge of the hull
    sides = np.stack([np.ptp(corners @ axis.T, axis=0) for axis in (edges, edges[:, ::-1] * [-1, 1])])
    short, long = np.sort(sides[:, sides.prod(0).argmin()])
    return float(hull.volume), float(short / long)


def filter_regions(points: np.ndarray, label: np.ndarray, preset: Preset, sensor_height: float) -> np.ndarray:
    """`label` [m] of clusters of points [m, 3], with -1 for those that the preset refuses."""
    label = label.copy()
    for rows in _groups(label):
        if not _keeps(points[rows], preset, sensor_height):
            label[rows] = -1
    return label


def _keeps(cluster: np.ndarray, preset: Preset, sensor_height: float) -> bool:
    near = np.abs(cluster[:, :2]) < _EGO
    is_ego = near.all() if preset.ego == "inside" else near.all(0).any()
    low, high = preset.top
    if is_ego or not low <= float(cluster[:, 2].max()) + sensor_height <= high:
        return False
    area, thinness = footprint(cluster[:, :2].astype(np.float64))
    return preset.area[0] <= area <= preset.area[1] and thinness >= preset.thinness


@dataclass(frozen=True)
class Regions:
    """The regions of one sweep."""

    region: np.ndarray
    """int16 [n]: -1, or 0 .. R-1 in the order of their first points."""
    ground: np.ndarray
    """bool [n]."""
    clusters: int
    """How many there were before the filters."""

    @property
    def count(self) -> int:
        """R."""
        return int(self.region.max(initial=-1)) + 1


def propose(points: np.ndarray, preset: Preset, sensor_height: float, axis: Axis = "y") -> Regions:
    """Regions of the points [n, >= 3] of one key sweep; rows that are not finite belong to none."""
    xyz, ground = points[:, :3], np.zeros(len(points), bool)
    rows = np.flatnonzero(np.isfinite(xyz).all(1) & (np.abs(xyz[:, :2]) <= preset.extent).all(1))
    if preset.ground == "gpf":
        ground[rows] = gpf(xyz[rows], sensor_height, axis, preset.extent)
    else:
        ground[rows] = ransac_ground(xyz[rows], np.random.default_rng(len(rows)))
    rows = rows[~ground[rows]]
    if preset.crop_above_ground is not None:
        rows = rows[xyz[rows, 2] <= preset.crop_above_ground - sensor_height]
    label = dbscan2d(xyz[rows, :2], preset.eps, preset.min_samples)
    clusters = int(label.max(initial=-1)) + 1
    label = filter_regions(xyz[rows], label, preset, sensor_height)
    region = np.full(len(points), -1, np.int16)
    region[rows[label >= 0]] = _by_first(label[label >= 0])
    return Regions(region, ground, clusters)


def regions_of(frame: Frame, preset: Preset) -> Regions:
    """Regions of the points `frame.points[frame.key]`."""
    return propose(frame.points[frame.key], preset, SENSOR_HEIGHT[frame.frame], DRIVING_AXIS[frame.frame])
