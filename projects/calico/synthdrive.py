"""A small world of boxes on a sloping ground, seen by one ray caster as LiDAR and as four cameras; and data sets of it.

    python -m projects.calico.synthdrive OUT --scenes 400 --first 0 --workers 2

A scene is a function of its number alone: the same bytes on every run and with any number of workers. OUT gets one file a
scene; a call that was interrupted goes on where it stopped, and one with more scenes adds them. Take other numbers
(`--first`) for scenes to test on.

Letters: n points, s solids (labelled objects first, then walls, poles, bushes), R rays. x forward and y left from the
LiDAR, which may stand at any angle to the road; the car drives along the road.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from projects.calico.parallel import each
from projects.calico.readers.files import read_arrays
from projects.calico.scenes import Camera, Frame, Frames, Labels, checked
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.files import new_file, new_folder, one_line, read_object, write_json

VERSION = 1
_ARRAYS = (
    "points", "key", "lidar2ego", "boxes", "names", "num_points", "instance", "ground", "masks",
)  # fmt: skip
HEIGHT = 1.8
"""Metres from the ground to the LiDAR."""
HALF_RANGE, MAP_CELL = 19.2, 0.4
"""Objects stand, and maps are drawn, where |x| and |y| are below it; metres of a map's cell."""
BEAMS, AZIMUTHS, LOWEST, HIGHEST, FARTHEST = 32, 240, -30.0, 10.0, 60.0
"""Rays of a sweep: elevations in degrees, metres."""
RANGE_NOISE, BUSH_NOISE, DROPPED = 0.02, 0.25, 0.05
FIELD_OF_VIEW = 95.0
"""Degrees across a picture."""
LAG = 0.1
"""Seconds between the key sweep and the one before it."""
GAP, CLEAR = 0.6, 3.0
"""Metres between two solids, and around the car."""
CAMERAS = ("FRONT", "LEFT", "BACK", "RIGHT")
MAP_LAYERS = ("road", "crossing", "walkway")


class Kind(NamedTuple):
    """One kind of solid."""

    share: float
    """Of the labelled objects; 0 for what has no label."""
    size: tuple[float, float, float]
    """Mean length, width, height."""
    colour: tuple[float, float, float]
    reflects: float
    """Mean intensity."""
    speed: float = 0.0
    """Greatest."""
    clearance: float = 0.0
    """Metres between the ground and what rays meet of it: its label reaches down to the ground."""


KINDS = {
    "car": Kind(0.42, (4.4, 1.85, 1.55), (0.75, 0.2, 0.2), 0.45, 10.0, 0.2),
    "truck": Kind(0.12, (7.5, 2.5, 3.0), (0.85, 0.7, 0.2), 0.5, 8.0, 0.3),
    "pedestrian": Kind(0.20, (0.6, 0.6, 1.7), (0.2, 0.3, 0.8), 0.3, 1.5),
    "cyclist": Kind(0.12, (1.8, 0.65, 1.65), (0.2, 0.75, 0.7), 0.35, 5.0),
    "barrier": Kind(0.14, (2.2, 0.5, 1.0), (0.9, 0.45, 0.1), 0.6),
    "wall": Kind(0, (12.0, 4.0, 6.0), (0.6, 0.55, 0.5), 0.5),
    "pole": Kind(0, (0.25, 0.25, 4.5), (0.35, 0.35, 0.4), 0.45),
    "bush": Kind(0, (1.6, 1.4, 1.2), (0.2, 0.45, 0.15), 0.3),
}
CLASSES = tuple(name for name, kind in KINDS.items() if kind.share)
# Of open ground, road, crossing, walkway.
_COLOURS = np.array([[0.45, 0.5, 0.35], [0.3, 0.3, 0.32], [0.85, 0.85, 0.85], [0.6, 0.55, 0.55]])
_INTENSITIES = np.array([0.2, 0.12, 0.55, 0.3])
_ROAD, _WALKWAY, _CROSSING = 4.0, 2.5, 1.5
"""Metres: half the road, a walkway beside it, half a crossing."""
_WORLD, _LIDAR, _CAMERA = range(3)
"""Purposes of random numbers."""


def _generator(scene: int, purpose: int, part: int = 0) -> np.random.Generator:
    return np.random.default_rng([scene, purpose, part, VERSION])


class World(NamedTuple):
    """What stands where at the time of the key sweep, in its LiDAR frame."""

    slope: np.ndarray
    """[2]: the ground is z = -1.8 + slope . (x, y)."""
    road: tuple[float, float, float]
    """Direction, metres of its middle to the left of the LiDAR, and of its crossing ahead."""
    speed: float
    """Of the car, along the road."""
    kinds: tuple[str, ...]
    """[s]."""
    boxes: np.ndarray
    """float64 [s, 9]."""
    tints: np.ndarray
    """[s, 3], added to the kinds' colours."""

    @property
    def labelled(self) -> int:
        """Solids with a label; they come first."""
        return sum(kind in CLASSES for kind in self.kinds)

    def of(self, name: str) -> np.ndarray:
        """[s, ...]: a field of the solids' kinds."""
        return np.array([getattr(KINDS[kind], name) for kind in self.kinds])

    def surface(self, xy: np.ndarray) -> np.ndarray:
        """int [...] of places [..., 2]: 0 open ground, 1 road, 2 crossing, 3 walkway."""
        yaw, left, ahead = self.road
        along, across = np.moveaxis(np.abs(_turn(xy, -yaw) - [ahead, left]), -1, 0)
        on_road = np.where(along < _CROSSING, 2, 1)
        return np.where(across < _ROAD, on_road, np.where(across < _ROAD + _WALKWAY, 3, 0))

    def masks(self) -> dict[str, np.ndarray]:
        """Map layers, bool [X, Y]; the road has the crossing."""
        centres = np.arange(-HALF_RANGE + MAP_CELL / 2, HALF_RANGE, MAP_CELL)
        surface = self.surface(np.stack(np.meshgrid(centres, centres, indexing="ij"), -1))
        return {"road": (surface == 1) | (surface == 2), "crossing": surface == 2, "walkway": surface == 3}

    def bodies(self, seconds: float = 0.0) -> np.ndarray:
        """Boxes [s, 9] that rays meet that time before the key sweep, in its frame."""
        boxes, clearance = self.boxes.copy(), self.of("clearance")
        boxes[:, 2] += clearance / 2
        boxes[:, 5] -= clearance
        boxes[:, :2] -= seconds * boxes[:, 7:]
        boxes[:, 2] -= seconds * boxes[:, 7:] @ self.slope
        return boxes

    def car(self, seconds: float) -> np.ndarray:
        """[3]: where the LiDAR was that time before; it does not turn, and keeps its height above the ground."""
        yaw = self.road[0]
        xy = -seconds * self.speed * np.array([math.cos(yaw), math.sin(yaw)])
        return np.append(xy, xy @ self.slope)


def build_world(scene: int) -> World:
    """The world of a scene's number."""
    rng = _generator(scene, _WORLD)
    slope = rng.uniform(-0.02, 0.02, 2)
    yaw = float(rng.uniform(-math.pi, math.pi))
    road = (yaw, rng.uniform(-2.5, 2.5), rng.uniform(-15, 15))
    speed = rng.uniform(0, 10)
    names = rng.choice(CLASSES, rng.integers(6, 14), p=[KINDS[name].share for name in CLASSES]).tolist()
    counts = {"wall": rng.integers(1, 4), "pole": rng.integers(3, 8), "bush": rng.integers(2, 6)}
    names += [name for name, count in counts.items() for _ in range(count)]
    kinds: list[str] = []
    placed: list[np.ndarray] = []
    for name in names:
        for _ in range(40):  # a full street leaves some out
            box = _draw(rng, name, road)
            if _is_free(box, placed):
                box[2] = -HEIGHT + box[:2] @ slope + box[5] / 2
                kinds.append(name)
                placed.append(box)
                break
    return World(slope, road, speed, tuple(kinds), np.stack(placed), rng.normal(0, 0.12, (len(placed), 3)))


def _draw(rng: np.random.Generator, name: str, road: tuple[float, float, float]) -> np.ndarray:
    kind, (yaw, left, _) = KINDS[name], road
    size = np.array(kind.size) * np.exp(rng.normal(0, 0.08, 3))
    xy = rng.uniform(-HALF_RANGE + 1, HALF_RANGE - 1, 2)
    turned = yaw + math.pi * int(rng.integers(2))
    if kind.share and rng.random() > 0.7:
        turned = float(rng.uniform(-math.pi, math.pi))
    if name == "wall":  # houses stand beside the road
        size = rng.uniform([5, 1, 3], [18, 6, 8])
        aside = _ROAD + _WALKWAY + 0.5 + size[1] / 2 + rng.uniform(0, 5)
        along, across = rng.uniform(-18, 18), left + aside * rng.choice([-1, 1])
        xy = _turn(np.array([along, across]), yaw)
    speed = kind.speed * max(0.0, rng.uniform(-0.5, 1))  # a third stands still
    turned = (turned + math.pi) % (2 * math.pi) - math.pi
    return np.array([*xy, 0.0, *size, turned, speed * math.cos(turned), speed * math.sin(turned)])


def _is_free(box: np.ndarray, placed: list[np.ndarray]) -> bool:
    """Whether a footprint keeps away from the car and from those already there: by separating axes of rectangles."""
    outside = np.maximum(np.abs(_turn(box[:2], -box[6])) - box[3:5] / 2, 0)
    if np.hypot(*outside) < CLEAR:
        return False
    if not placed:
        return True
    others = np.stack(placed)
    gap, half, other_half = others[:, :2] - box[:2], box[3:5] / 2 + GAP, others[:, 3:5] / 2
    turn = others[:, 6, None] - box[6]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    mine, theirs = np.abs(_turn(gap, -box[6])), np.abs(_turn(gap, -others[:, 6]))
    reach, back = (cos * size + sin * size[..., ::-1] for size in (other_half, half))
    return bool(((mine > half + reach) | (theirs > other_half + back)).any(1).all())


def _turn(xy: np.ndarray, yaw: np.ndarray | float) -> np.ndarray:
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.stack([cos * xy[..., 0] - sin * xy[..., 1], sin * xy[..., 0] + cos * xy[..., 1]], -1)


SKY, GROUND = -2, -1


def cast(
    origin: np.ndarray, rays: np.ndarray, boxes: np.ndarray, slope: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What rays [R, 3] from `origin` [3] meet first: distance [R], solid (or SKY, GROUND) [R], and its face [R].

    Distances are in lengths of the rays, infinite for the sky. Faces are 0, 1, 2 for a box's ends, sides and top or
    bottom. A box is entered where the last of its three pairs of planes is.
    """
    start = origin - boxes[:, :3]
    start[:, :2] = _turn(start[:, :2], -boxes[:, 6])
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    enter = np.full((len(rays), len(boxes)), -np.inf)
    leave = np.full_like(enter, np.inf)
    x, y, z = rays.T[:, :, None]
    entered = []
    for axis, along in enumerate((x * cos + y * sin, y * cos - x * sin, z)):
        along = np.where(along == 0, 1e-12, along)
        middle, half = -start[:, axis] / along, np.abs(boxes[:, 3 + axis] / 2 / along)
        entered.append(middle - half)
        np.maximum(enter, entered[-1], out=enter)
        np.minimum(leave, middle + half, out=leave)
    enter[(enter > leave) | (enter <= 0)] = np.inf
    solid = enter.argmin(1)
    rows = np.arange(len(rays))
    distance = enter[rows, solid]
    face = np.stack([pair[rows, solid] for pair in entered], 1).argmax(1)
    drop = rays[:, 2] - rays[:, :2] @ slope
    height = origin[2] - (-HEIGHT + origin[:2] @ slope)
    ground = np.where(drop < -1e-9, -height / np.minimum(drop, -1e-9), np.inf)
    below = ground < distance
    distance = np.where(below, ground, distance)
    solid = np.where(below, GROUND, np.where(np.isinf(distance), SKY, solid))
    return distance, solid, face


def sweep(world: World, scene: int, seconds: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [n, 5] of the sweep that time before the key sweep, in the key sweep's frame; and solids [n].

    A point's last number is `seconds`. Of the ground the solid is GROUND.
    """
    rng = _generator(scene, _LIDAR, round(seconds / LAG))
    elevation, azimuth = np.meshgrid(
        np.radians(np.linspace(LOWEST, HIGHEST, BEAMS)),
        np.arange(AZIMUTHS) * (2 * math.pi / AZIMUTHS),
        indexing="ij",
    )
    flat = np.cos(elevation)
    rays = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], -1).reshape(-1, 3)
    origin = world.car(seconds)
    distance, solid, _ = cast(origin, rays, world.bodies(seconds), world.slope)
    is_bush = np.array([kind == "bush" for kind in world.kinds] + [False, False])
    noise = rng.normal(size=len(rays)) * np.where(is_bush[solid], BUSH_NOISE, RANGE_NOISE)
    kept = (distance <= FARTHEST) & (rng.random(len(rays)) >= DROPPED)
    shine = rng.normal(0, 0.08, len(rays))[kept]
    solid = solid[kept]
    points = origin + rays[kept] * (distance + noise)[kept, None]
    mean = np.where(solid == GROUND, _INTENSITIES[world.surface(points[:, :2])], world.of("reflects")[solid])
    rows = np.column_stack([points, np.clip(mean + shine, 0, 1)]).round(3)  # a sensor counts millimetres
    return np.column_stack([rows, np.full(len(rows), seconds)]).astype(np.float32), solid


def camera_pose(number: int) -> np.ndarray:
    """cam2lidar [4, 4] of a camera that looks out level, a quarter turn to the left of the one before."""
    cos, sin = math.cos(number * math.pi / 2), math.sin(number * math.pi / 2)
    return np.array([[sin, 0, cos, 0.3 * cos], [-cos, 0, sin, 0.3 * sin], [0, -1, 0, -0.2], [0, 0, 0, 1]])


def intrinsics(size: tuple[int, int]) -> np.ndarray:
    """[3, 3] for pictures of (rows, columns); the middle of a pixel is at whole numbers."""
    focal = size[1] / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
    return np.array([[focal, 0, (size[1] - 1) / 2], [0, focal, (size[0] - 1) / 2], [0, 0, 1]])


def picture(world: World, scene: int, number: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of a camera: colours of kinds and things, sides in shade, fog, noise."""
    rng = _generator(scene, _CAMERA, number)
    pose = camera_pose(number)
    v, u = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    pixels = np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    rays = (pose[:3, :3] @ np.linalg.solve(intrinsics(size), pixels)).T
    distance, solid, face = cast(pose[:3, 3], rays, world.bodies(), world.slope)
    colour = (world.of("colour") + world.tints)[solid] * np.array([0.75, 1.0, 1.15])[face, None]
    on_ground = solid == GROUND
    places = pose[:3, 3] + rays[on_ground] * distance[on_ground, None]
    colour[on_ground] = _COLOURS[world.surface(places[:, :2])]
    fog = np.exp(-np.where(np.isinf(distance), 1e9, distance) / 50)[:, None]
    sky = np.array([0.65, 0.75, 0.9])
    colour = np.where((solid == SKY)[:, None], sky, fog * colour + (1 - fog) * sky)
    colour = colour + rng.normal(0, 0.02, colour.shape)
    return np.round(255 * np.clip(colour, 0, 1)).astype(np.uint8).reshape(*size, 3)


def generate(scene: int, *, sweeps: int = 1, image_size: tuple[int, int] = (40, 80)) -> Frame:
    """The frame of a scene's number, with labels: `sweeps` of 1, or 2 with the one before, and four pictures.

    Without pictures with an image size of (0, 0).
    """
    world = build_world(scene)
    clouds, solids = zip(*(sweep(world, scene, n * LAG) for n in range(sweeps)), strict=True)
    points, solid = np.concatenate(clouds), np.concatenate(solids)
    key = np.arange(len(points)) < len(clouds[0])
    objects = world.labelled
    instance = np.where((solid >= 0) & (solid < objects), solid, -1).astype(np.int16)
    lidar2ego = np.eye(4)  # the car's x is along the road, its origin on the ground below the LiDAR
    lidar2ego[:2, :2] = _turn(np.eye(2), -world.road[0]).T
    lidar2ego[2, 3] = HEIGHT
    labels = Labels(
        boxes=world.boxes[:objects].astype(np.float32),
        names=world.kinds[:objects],
        num_points=np.bincount(instance[key & (instance >= 0)], minlength=objects),
        instance=instance,
        ground=solid == GROUND,
        masks=world.masks(),
    )
    drawn = [picture(world, scene, number, image_size) for number in range(len(CAMERAS)) if min(image_size)]
    return _frame(f"{scene:06d}", points, key, drawn, lidar2ego, labels)


def _frame(
    token: str,
    points: np.ndarray,
    key: np.ndarray,
    images: Sequence[np.ndarray],
    lidar2ego: np.ndarray,
    labels: Labels | None,
) -> Frame:
    cameras = {
        name: Camera(image, intrinsics(image.shape[:2]), camera_pose(number))
        for number, (name, image) in enumerate(zip(CAMERAS, images, strict=False))
    }
    return checked(Frame(token, token, "synthdrive", points, key, cameras, lidar2ego, labels=labels))


@dataclass(frozen=True)
class SynthdriveFrames(Frames):
    """A data set on disk."""

    folder: Path
    tokens: Sequence[str]
    kind = "synthdrive"

    @classmethod
    def open(cls, folder: Path) -> SynthdriveFrames:
        """What `write` wrote, if it is of this version."""
        head = folder / "synthdrive.json"
        mend = f"write it by `python -m projects.calico.synthdrive {folder}`"
        made = read_object(head, "synthdrive data set", mend)
        try:
            version, first, scenes = (made[name] for name in ("version", "first", "scenes"))
            tokens = [f"{number:06d}" for number in range(first, first + scenes)]
        except (KeyError, TypeError) as error:
            raise UserError(f"{head} is not usable ({one_line(error)}); {mend}") from None
        if version != VERSION:
            raise UserError(f"{folder} holds scenes of version {version}, and this is {VERSION}; {mend} anew")
        return cls(folder, tokens)

    def read(self, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        """See `Frames`."""
        token, mend = self.tokens[index], "write the data set again, which adds what is missing"
        found = read_arrays(self.folder / f"{token}.npz", "synthdrive scene", mend, _ARRAYS)
        drawn = None
        if labels:
            names = tuple(CLASSES[number] for number in found["names"])
            masks = dict(zip(MAP_LAYERS, found["masks"], strict=True))
            drawn = Labels(
                found["boxes"], names, found["num_points"], (), found["instance"], found["ground"], masks
            )
        images = found.get("images", ()) if cameras else ()
        return _frame(token, found["points"], found["key"], images, found["lidar2ego"], drawn)


def write(
    folder: Path,
    scenes: int,
    first: int = 0,
    *,
    sweeps: int = 1,
    image_size: tuple[int, int] = (40, 80),
    workers: int = 1,
) -> SynthdriveFrames:
    """The scenes `first` to `first + scenes - 1` on disk; those that are there already stay, if they were made alike."""
    head = new_folder(folder, "synthdrive data set") / "synthdrive.json"
    asked = {"sweeps": sweeps, "image_size": list(image_size), "version": VERSION, "first": first}
    if not head.is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files; name a folder of its own")
    there = read_object(head, "synthdrive data set") if head.is_file() else {**asked, "scenes": 0}
    for key, value in asked.items():
        if there.get(key) != value:
            told = f"holds scenes with {key}={there.get(key)} and not {value}"
            raise UserError(f"{folder} {told}; name another folder")
    write_json(head, there, "synthdrive data set")
    numbers = range(first, first + scenes)
    missing = [number for number in numbers if not (folder / f"{number:06d}.npz").exists()]
    job = partial(_write, folder, sweeps, image_size)
    each(job, missing, workers, "scenes", done=scenes - len(missing))
    write_json(head, {**asked, "scenes": scenes}, "synthdrive data set")
    return SynthdriveFrames.open(folder)


def _write(folder: Path, sweeps: int, image_size: tuple[int, int], scene: int) -> None:
    frame = generate(scene, sweeps=sweeps, image_size=image_size)
    labels = frame.labels
    assert labels is not None and labels.instance is not None and labels.ground is not None
    columns = {
        "points": frame.points,
        "key": frame.key,
        "lidar2ego": frame.lidar2ego,
        "boxes": labels.boxes,
        "names": np.array([CLASSES.index(name) for name in labels.names], np.int8),
        "num_points": labels.num_points.astype(np.int32),
        "instance": labels.instance,
        "ground": labels.ground,
        "masks": np.stack([labels.masks[layer] for layer in MAP_LAYERS]),
    }
    if frame.cameras:
        columns["images"] = np.stack([camera.load() for camera in frame.cameras.values()])
    path = folder / f"{frame.token}.npz"
    with new_file(path, "synthdrive scene") as partial_file, partial_file.open("wb") as file:
        np.savez(file, allow_pickle=False, **columns)


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path)
    add("--scenes", type=at_least(1), required=True, help="how many")
    add("--first", type=at_least(0), default=0, help="number of the first (0)")
    add("--sweeps", type=int, choices=(1, 2), default=1, help="2: with the sweep before (1)")
    add("--image-size", type=at_least(1), nargs=2, default=[40, 80], metavar=("ROWS", "COLUMNS"))
    add("--workers", type=at_least(1), default=1, help="processes (1)")
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    frames = write(out, **options | {"image_size": tuple(options["image_size"])})
    print(f"{out}: {len(frames.tokens)} scenes, {frames.tokens[0]} to {frames.tokens[-1]}")
    return 0


if __name__ == "__main__":
    run_tool(main)
