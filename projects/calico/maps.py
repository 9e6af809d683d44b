"""Vector maps drawn into bird's-eye cells: nuScenes' map expansion.

A cell belongs to an area when its centre does (even-odd rule); that is exact, where drawing tools round corners to whole
pixels. Letters: M layers, X, Y cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from projects.calico.geometry import Grid
from projects.calico.scenes import Frame
from vlmkd.errors import UserError
from vlmkd.files import read_object

Floats = NDArray[np.float64]
LAYERS = ("drivable_area", "ped_crossing", "walkway", "stop_line", "carpark_area", "divider")
LOCATIONS = ("boston-seaport", "singapore-hollandvillage", "singapore-onenorth", "singapore-queenstown")
_LINE_WIDTH = 3.0
"""Cells: so wide the devkit draws dividers."""


class VectorMap(NamedTuple):
    """Areas and lines in the world, metres."""

    areas: Mapping[str, Sequence[Sequence[Floats]]]
    """Layer -> areas, each its rings [n,2], the outer one and holes in any order."""
    lines: Mapping[str, Sequence[Floats]]
    """Layer -> lines, [n,2]."""


def map_file(root: Path, location: str) -> Path:
    """Where nuScenes keeps the vector map of a location."""
    return root / "maps" / "expansion" / f"{location}.json"


def missing_maps(root: Path, locations: Iterable[str] = LOCATIONS) -> list[str]:
    """Vector maps that are not there, below `root`."""
    files = [map_file(root, location) for location in sorted(locations)]
    return [str(file.relative_to(root)) for file in files if not file.is_file()]


def read_map(root: Path, location: str) -> VectorMap:
    """The vector map of a nuScenes location.

    Raises:
        UserError: the file is missing, of a version before 1.3, or names a node or polygon that it lacks.
    """
    path = map_file(root, location)
    if not path.is_file():
        told = f"map segmentation needs {', '.join(missing_maps(root))} below {root}"
        raise UserError(f"{told}; fetch nuScenes' map expansion (v1.3) into maps/expansion")
    content = read_object(path, "vector map")
    version = content.get("version", "1.0")
    if str(version) < "1.3":
        raise UserError(f"vector map {path} is of version {version}; fetch map expansion v1.3")
    try:
        node = {one["token"]: (one["x"], one["y"]) for one in content["node"]}
        polygon = {one["token"]: one for one in content["polygon"]}
        line = {one["token"]: one["node_tokens"] for one in content["line"]}

        def ring(tokens: Iterable[str]) -> Floats:
            return np.array([node[token] for token in tokens], np.float64).reshape(-1, 2)

        def area(token: str) -> list[Floats]:
            holes = [hole["node_tokens"] for hole in polygon[token]["holes"]]
            return [ring(tokens) for tokens in (polygon[token]["exterior_node_tokens"], *holes)]

        areas = {
            layer: [
                area(token)
                for row in content[layer]
                for token in (row["polygon_tokens"] if layer == "drivable_area" else [row["polygon_token"]])
            ]
            for layer in LAYERS[:-1]
        }
        dividers = [*content["road_divider"], *content["lane_divider"]]
        return VectorMap(areas, {"divider": [ring(line[row["line_token"]]) for row in dividers]})
    except (KeyError, TypeError) as error:
        raise UserError(f"vector map {path} lacks {error}; fetch the map expansion again") from None


def of_frame(
    world: VectorMap, frame: Frame, grid: Grid, lidar_aug: Floats | None = None
) -> NDArray[np.bool_]:
    """[M,X,Y] in the cells of a frame, augmented by `lidar_aug` [4,4]; the ground is as high as the car stands."""
    to_bev = np.linalg.inv(frame.ego2global @ frame.lidar2ego)
    to_bev = to_bev if lidar_aug is None else lidar_aug @ to_bev
    return rasterise(world, to_bev, grid, ground=float(frame.ego2global[2, 3]))


def rasterise(
    world: VectorMap, to_bev: Floats, grid: Grid, *, ground: float = 0.0, layers: Sequence[str] = LAYERS
) -> NDArray[np.bool_]:
    """[M,X,Y]: the cells of the grid in which a layer is.

    Args:
        to_bev: [4,4] from the world to the frame of the grid, the whole matrix, so that turned, flipped and scaled frames keep
            their map.
        ground: height of the ground in the world.
    """
    shape = grid.shape[:2]

    def cells(points: Floats) -> Floats:
        placed = points @ to_bev[:2, :2].T + to_bev[:2, 2] * ground + to_bev[:2, 3]
        return (placed - grid.min[:2]) / grid.cell[:2]

    masks = np.zeros((len(layers), *shape), bool)
    for mask, layer in zip(masks, layers, strict=True):
        for rings in world.areas.get(layer, ()):
            placed = [cells(ring) for ring in rings]
            if placed[0].size:
                low = np.clip(np.floor(placed[0].min(0)), 0, shape).astype(int)
                high = np.clip(np.ceil(placed[0].max(0)), 0, shape).astype(int)
                if (low < high).all():
                    own = mask[low[0] : high[0], low[1] : high[1]]
                    own |= fill([ring - low for ring in placed], own.shape)
        for line in world.lines.get(layer, ()):
            draw_line(mask, cells(line), _LINE_WIDTH / 2)
    return masks


def fill(rings: Sequence[Floats], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Cells [X,Y] whose centres (i + 0.5, j + 0.5) lie within rings [n,2] by the even-odd rule."""
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, 0) for ring in rings])
    low, high = (
        np.clip(np.ceil(side(start[:, 0], end[:, 0]) - 0.5), 0, shape[0]).astype(int)
        for side in (np.minimum, np.maximum)
    )
    edge = np.repeat(np.arange(len(start)), high - low)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(high - low) - high, high - low)
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    crossing = y0 + (row + 0.5 - x0) * (y1 - y0) / (x1 - x0)
    column = np.clip(np.ceil(crossing - 0.5), 0, shape[1]).astype(int)
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    np.add.at(crossings, (row, column), 1)
    return np.cumsum(crossings, 1)[:, :-1] % 2 == 1


def draw_line(mask: NDArray[np.bool_], line: Floats, reach: float) -> None:
    """Set the cells of `mask` [X,Y] whose centres are at most `reach` cells from a line [n,2] in cells."""
    for start, end in zip(line[:-1], line[1:], strict=True):
        low = np.clip(np.floor(np.minimum(start, end) - reach), 0, mask.shape).astype(int)
        high = np.clip(np.ceil(np.maximum(start, end) + reach), 0, mask.shape).astype(int)
        x, y = np.ogrid[low[0] : high[0], low[1] : high[1]]
        (dx, dy), px, py = end - start, x + 0.5 - start[0], y + 0.5 - start[1]
        along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
        mask[low[0] : high[0], low[1] : high[1]] |= np.hypot(px - along * dx, py - along * dy) <= reach
