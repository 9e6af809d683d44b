"""Semantic pooling: regions of one sweep that likely are objects, found without labels (docs/papers/calico.md).

Ground removal, DBSCAN in the plane, and filters; once per key sweep, kept in a cache (`region_cache`). numpy and
scipy only, and the same answer for the same points on every machine. Letters: n points, m points off the ground, R
regions.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, QhullError, cKDTree

from projects.calico.scenes import DRIVING_AXIS, SENSOR_HEIGHT, Axis, Frame, FrameKind
from vlmkd.errors import UserError, did_you_mean
from vlmkd.files import new_file, one_line, unreadable

_VERSION = 1
"""Of the algorithm: with another one, cached regions are refused."""
_STRIP, _LOWEST, _ROUNDS = 10.0, 50, 5
"""Of GPF: metres of a strip; points that tell its lowest level, and below which it is left out; planes fitted."""
_CELL = 0.4
"""Side of DBSCAN's cells over eps: below 0.7, so that a cell's points are neighbours; this is fast on real sweeps."""
_EGO = 1.5
"""Metres around the car that `Preset.ego` speaks of."""
_SEED, _ABOVE = 0.5, 0.2
"""Of GPF: metres above the lowest level that seeds may have; above the plane that ground may have."""


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


def gpf(points: np.ndarray, sensor_height: float, axis: Axis = "y", extent: float = 54.0) -> np.ndarray:
    """Ground-plane fitting (Zermas et al., ICRA 2017): whether each of the points [n, >= 3] is ground, bool [n].

    A plane for every strip of 10 m along `axis`, the one that the car drives along. Strips of fewer than 50 points,
    and points beyond `extent`, have no ground. What lies below a plane is ground too.
    """
    ground = np.zeros(len(points), bool)
    xyz = points[:, :3].astype(np.float64)
    strip = np.floor((xyz[:, "xy".index(axis)] + extent) / _STRIP)
    strip[(np.abs(xyz[:, :2]) > extent).any(1)] = -1
    order = np.argsort(strip, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(strip[order])) + 1):
        if len(rows) >= _LOWEST and strip[rows[0]] >= 0:
            ground[rows] = _strip_ground(xyz[rows], sensor_height)
    return ground


def _strip_ground(xyz: np.ndarray, sensor_height: float) -> np.ndarray:
    z = xyz[:, 2]
    heights = z[z >= -sensor_height - 0.5]  # reflections from below the road do not count
    if not len(heights):
        return np.ones(len(z), bool)
    lowest = np.sort(heights)[:_LOWEST].mean()
    seeds = z < lowest + _SEED
    for _ in range(_ROUNDS):
        some = xyz[seeds]
        if len(some) < 3:
            break
        mean = some.mean(0)
        values, vectors = np.linalg.eigh(np.cov(some.T))
        normal = vectors[:, 0]
        if (
            values[1] < 1e-9 or abs(normal[2]) < 1e-3
        ):  # points on a line, or a wall, carry no plane to stand on
            break
        normal = normal * np.sign(normal[2])  # an eigenvector has no sign of its own
        seeds = (xyz - mean) @ normal < _ABOVE
    return seeds


def ransac_ground(
    points: np.ndarray, rng: np.random.Generator, *, threshold: float = 0.05, iterations: int = 1000
) -> np.ndarray:
    """The plane with the most points within `threshold`: whether points [n, >= 3] are within 0.2 m of it, bool [n]."""
    xyz = points[:, :3].astype(np.float64)
    if len(xyz) < 3:
        return np.zeros(len(xyz), bool)
    best, most = None, 0
    some = xyz[rng.permutation(len(xyz))[:5000]]  # enough to compare planes by
    for triple in rng.integers(len(xyz), size=(iterations, 3)):
        a, b, c = xyz[triple]
        normal = np.cross(b - a, c - a)
        length = np.linalg.norm(normal)
        if length < 1e-9 or abs(normal[2]) < 0.7 * length:  # steeper than 45 degrees
            continue
        count = int((np.abs((some - a) @ normal) < threshold * length).sum())
        if count > most:
            best, most = (normal / length, a), count
    if best is None:
        return np.zeros(len(xyz), bool)
    return np.abs((xyz - best[1]) @ best[0]) < _ABOVE


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
    bound = np.nextafter(eps, np.inf)
    if len(loose):
        tree = cKDTree(xy, balanced_tree=False, compact_nodes=False)
        near, who = tree.query(xy[loose], k=np.arange(1, min_samples + 1), distance_upper_bound=bound)
        dense[loose] = np.isfinite(near[:, -1])
    if not dense.any():
        return label
    core = np.flatnonzero(dense)
    order = core[np.argsort(owner[core], kind="stable")]
    start = np.flatnonzero(np.diff(owner[order], prepend=-1))  # of each cell's dense points in `order`
    length = np.diff(start, append=len(order))
    part = _linked(xy[order], start, length, eps, eps + 2 * math.sqrt(2) * size)
    label[order] = np.repeat(part, length)
    label[core] = _by_first(label[core])
    if len(loose):
        # Those that are not dense know all that are within eps; the first cluster to reach one has it.
        reached = np.append(np.where(dense, label, len(xy)), len(xy))[who].min(1)
        edge = ~dense[loose] & (reached < len(xy))
        label[loose[edge]] = reached[edge]
    return label


def _linked(xy: np.ndarray, start: np.ndarray, length: np.ndarray, eps: float, reach: float) -> np.ndarray:
    """The part [c] that each cell is of: cells are linked where points xy[start : start + length] of them are within eps."""
    first = xy[start]
    pairs = cKDTree(first).query_pairs(reach, output_type="ndarray")
    near = ((first[pairs[:, 0]] - first[pairs[:, 1]]) ** 2).sum(1) <= eps * eps
    links, part = pairs[near], _parts(pairs[near], len(first))
    pairs = pairs[part[pairs[:, 0]] != part[pairs[:, 1]]]
    low, high = np.minimum.reduceat(xy, start), np.maximum.reduceat(xy, start)
    a, b = pairs.T
    gap = np.maximum(np.maximum(low[a] - high[b], low[b] - high[a]), 0)
    pairs = pairs[(gap**2).sum(1) <= eps * eps]
    products = length[pairs[:, 0]] * length[pairs[:, 1]]
    blocks = np.cumsum(products) // 2_000_000  # comparisons at a time
    for some in np.split(pairs, np.flatnonzero(np.diff(blocks)) + 1):
        a, b = some.T
        total = length[a] * length[b]
        pair = np.repeat(np.arange(len(some)), total)
        number = np.arange(len(pair)) - np.repeat(np.cumsum(total) - total, total)
        one, other = start[a][pair] + number // length[b][pair], start[b][pair] + number % length[b][pair]
        touch = pair[((xy[one] - xy[other]) ** 2).sum(1) <= eps * eps]
        links = np.concatenate([links, some[np.unique(touch)]])
    return _parts(links, len(first))


def _parts(links: np.ndarray, nodes: int) -> np.ndarray:
    graph = coo_array((np.ones(len(links), bool), links.T), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1]


def _by_first(label: np.ndarray) -> np.ndarray:
    """Labels [m] as 0, 1, ... in the order in which they first come."""
    _, first, dense = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[dense]


def hull_area(xy: np.ndarray) -> float:
    """Area of the convex hull of points [m, 2]; 0 for points on a line."""
    hull = _hull(xy)
    return 0.0 if hull is None else float(hull.volume)


def thinness(xy: np.ndarray) -> float:
    """Short side over long side of the rectangle of least area around points [m, 2]; 0 for points on a line."""
    hull = _hull(xy)
    if hull is None:
        return 0.0
    corners = xy[hull.vertices]
    edges = np.roll(corners, -1, 0) - corners
    edges = edges / np.linalg.norm(edges, axis=1, keepdims=True)  # one side of it lies on an edge of the hull
    sides = np.stack([np.ptp(corners @ axis.T, axis=0) for axis in (edges, edges[:, ::-1] * [-1, 1])])
    short, long = np.sort(sides[:, sides.prod(0).argmin()])
    return float(short / long)


def _hull(xy: np.ndarray) -> ConvexHull | None:
    try:
        return ConvexHull(xy)
    except (QhullError, ValueError):
        return None


def filter_regions(points: np.ndarray, label: np.ndarray, preset: Preset, sensor_height: float) -> np.ndarray:
    """`label` [m] of clusters of points [m, 3], with -1 for those that the preset refuses."""
    label = label.copy()
    order = np.argsort(label, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        if len(rows) and label[rows[0]] >= 0 and not _keeps(points[rows], preset, sensor_height):
            label[rows] = -1
    return label


def _keeps(cluster: np.ndarray, preset: Preset, sensor_height: float) -> bool:
    top = float(cluster[:, 2].max()) + sensor_height
    xy = cluster[:, :2].astype(np.float64)
    if not preset.top[0] <= top <= preset.top[1]:
        return False
    if preset.ego == "inside" and (np.abs(xy) < _EGO).all():
        return False
    if preset.ego == "cross" and (np.abs(xy) < _EGO).all(0).any():
        return False
    if not preset.area[0] <= hull_area(xy) <= preset.area[1]:
        return False
    return preset.thinness <= 0 or thinness(xy) >= preset.thinness


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
    xyz = points[:, :3]
    usable = np.isfinite(xyz).all(1) & (np.abs(xyz[:, :2]) <= preset.extent).all(1)
    rows = usable.nonzero()[0]
    ground = np.zeros(len(points), bool)
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
    kept = label >= 0
    region[rows[kept]] = _by_first(label[kept])
    return Regions(region, ground, clusters)


def preset_of(name: str) -> Preset:
    """The preset of a name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        known = f"there are {', '.join(PRESETS)}"
        raise UserError(f"regions preset {name!r} does not exist; {did_you_mean(name, PRESETS, known)}")
    return PRESETS[name]


def regions_of(frame: Frame, preset: Preset) -> Regions:
    """Regions of the points `frame.points[frame.key]`."""
    return propose(frame.points[frame.key], preset, SENSOR_HEIGHT[frame.frame], DRIVING_AXIS[frame.frame])


@dataclass(frozen=True)
class RegionCache:
    """A folder with a file for each key sweep, written by `python -m projects.calico.region_cache`."""

    folder: Path
    preset: Preset

    def told(self, kind: FrameKind) -> dict[str, Any]:
        """Everything that the regions of a sweep depend on, beside its points."""
        return {
            **json.loads(json.dumps(asdict(self.preset))),
            "sensor_height": SENSOR_HEIGHT[kind],
            "driving_axis": DRIVING_AXIS[kind],
            "version": _VERSION,
        }

    def digest(self, kind: FrameKind) -> str:
        """The preset's hash: 16 hex digits of `told`."""
        return hashlib.sha256(json.dumps(self.told(kind), sort_keys=True).encode()).hexdigest()[:16]

    def path(self, token: str) -> Path:
        """The file of a frame."""
        return self.folder / f"{token}.npz"

    def write(self, token: str, kind: FrameKind, regions: Regions) -> None:
        """Keep the regions of a frame."""
        made = json.dumps(
            {"digest": self.digest(kind), "clusters": regions.clusters, "preset": self.told(kind)}
        )
        with new_file(self.path(token), "region cache") as partial, partial.open("wb") as file:
            np.savez_compressed(file, region=regions.region, made=np.array(made))

    def read(self, token: str, kind: FrameKind, points: int) -> np.ndarray:
        """int16 [n] of a frame with `points` points in its key sweep.

        Raises:
            UserError: no such file, a damaged one, or one of another preset or another sweep.
        """
        path = self.path(token)
        mend = f"run `python -m projects.calico.region_cache` into {self.folder} again"
        try:
            with np.load(path) as content:
                region, made = content["region"], json.loads(str(content["made"]))
        except OSError as error:
            raise unreadable(error, path, "region cache", mend) from None
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"region cache {path} is damaged ({one_line(error)}); delete it, and {mend}"
            ) from None
        if made["digest"] != self.digest(kind):
            now, then = self.told(kind), made["preset"]
            parts = [
                f"{key} {then.get(key)} and not {value}"
                for key, value in now.items()
                if then.get(key) != value
            ]
            raise UserError(
                f"region cache {path} was made with another preset: {', '.join(parts)}; set regions.preset to that one, or"
                " name another folder for this one"
            )
        if region.shape != (points,):
            raise UserError(
                f"region cache {path} is of a sweep of {len(region)} points, and this one has {points}; {mend}"
            )
        return region
