"""nuScenes (v1.0 tables, full, mini or test) without other toolboxes: tables, info records, frames.

An info file is JSON lines: a header, then one record a key frame, written by `python -m projects.calico.nuscenes_infos`; an
unknown velocity is null. Letters: n points, k boxes. Matrices are 4x4 and act from the left; quaternions are (w, x, y, z).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from projects.calico.evaluation.detection import Boxes
from projects.calico.geometry import pose
from projects.calico.readers.files import read_sweep
from projects.calico.scenes import Camera, Frame, Frames, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_text, unreadable

Record = dict[str, Any]
INFO_VERSION = 1
LIDAR = "LIDAR_TOP"
_SOURCES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "bus": "vehicle.bus.bendy vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "construction_vehicle": "vehicle.construction",
    "pedestrian": "human.pedestrian.adult human.pedestrian.child human.pedestrian.construction_worker"
    " human.pedestrian.police_officer",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "traffic_cone": "movable_object.trafficcone",
    "barrier": "movable_object.barrier",
}
CLASSES = tuple(_SOURCES)
CLASS_OF = {category: name for name, categories in _SOURCES.items() for category in categories.split()}
"""Category -> one of the ten classes; other categories are ignored."""
RACK = "static_object.bicycle_rack"
_TABLES = (
    "attribute", "sensor", "calibrated_sensor", "category", "instance", "log", "sample", "sample_annotation", "scene",
    "sample_data", "ego_pose",
)  # fmt: skip
_OF_BOXES = (
    "boxes", "velocity", "names", "num_lidar_pts", "num_radar_pts", "attribute", "visibility", "instance"
)  # fmt: skip
_LONGEST_GAP = 1.5  # seconds between two annotations of a thing that still tell its speed
_NEAR = 1.0  # metres from the sensor along x and y within which points of past sweeps are the car's own


class Tables:
    """The official tables of one version; of the readings those of the LiDAR and the key frames of the cameras.

    Raises:
        UserError: a table is missing or no JSON; a row names another that is not there.
    """

    def __init__(self, root: Path, version: str) -> None:
        self.folder = root / version
        if not self.folder.is_dir():
            told = f"name the data set's root, which holds samples/, sweeps/ and {version}/"
            raise UserError(f"{root} has no folder {version}; {told}")
        self._poses: set[str] = set()
        self.rows: dict[str, dict[str, Record]] = {}
        """Table -> token -> row, which also names its `table`."""
        for table in _TABLES:
            self.rows[table] = {row["token"]: row for row in self._read(table) if self._is_used(table, row)}
        self.data: dict[str, dict[str, Record]] = {token: {} for token in self.rows["sample"]}
        """Sample -> channel -> reading of the key frame."""
        for row in self.rows["sample_data"].values():
            if row["is_key_frame"]:
                self.data[self.follow(row, "sample")["token"]][self.channel(row)] = row
        self.annotations: dict[str, list[Record]] = {token: [] for token in self.rows["sample"]}
        for row in self.rows["sample_annotation"].values():
            self.annotations[self.follow(row, "sample")["token"]].append(row)

    def _is_used(self, table: str, row: Record) -> bool:
        """Of the tables with a row a reading, 2.6 million, a quarter is."""
        if table != "sample_data":
            return table != "ego_pose" or row["token"] in self._poses
        channel = self.channel(row)
        used = channel == LIDAR or (row["is_key_frame"] and channel.startswith("CAM"))
        if used:
            self._poses.add(row["ego_pose_token"])
        return used

    def _read(self, table: str) -> Iterator[Record]:
        """The rows one by one, so that of a file of a gigabyte only its text is in memory."""
        path = self.folder / f"{table}.json"
        text = read_text(path, "nuScenes table", "fetch the metadata archive of this version", limit=1 << 33)
        decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
        at, end = text.find("[") + 1, text.rfind("]")
        try:
            while (at := between.match(text, at).end()) < end:  # type: ignore[union-attr]
                row, at = decode(text, at)
                yield row | {"table": table, "token": row["token"]}
            if end < at or at == 0:
                raise ValueError("it is no list of rows")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"nuScenes table {path} is not usable ({one_line(error)}); fetch the tables again"
            ) from None

    def follow(self, row: Record, table: str, field: str = "") -> Record:
        """The row of `table` that `row` names in `field`, else in TABLE_token."""
        token = row[field or f"{table}_token"]
        try:
            return self.rows[table][token]
        except KeyError:
            raise UserError(
                f"nuScenes tables {self.folder}: row {row['token']} of {row['table']} names {table} {token!r}, which is not"
                " there; fetch the tables again"
            ) from None

    def channel(self, row: Record) -> str:
        """Name of the sensor that a reading is of."""
        return str(self.follow(self.follow(row, "calibrated_sensor"), "sensor")["channel"])

    def poses(self, row: Record) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """sensor2ego and ego2global of a reading, at its own time."""
        return _pose(self.follow(row, "calibrated_sensor")), _pose(self.follow(row, "ego_pose"))

    def scenes(self) -> dict[str, list[Record]]:
        """Scene's name -> its samples in the order of time."""
        found = {}
        for scene in self.rows["scene"].values():
            samples = [self.follow(scene, "sample", "first_sample_token")]
            while samples[-1]["next"]:
                samples.append(self.follow(samples[-1], "sample", "next"))
            found[scene["name"]] = samples
        return found

    def velocity(self, annotation: Record) -> NDArray[np.float64]:
        """Global [3], m/s, from the annotations before and after; NaN when they are missing or too far apart."""
        first, last = (
            self.follow(annotation, "sample_annotation", side) if annotation[side] else annotation
            for side in ("prev", "next")
        )
        times = (self.follow(one, "sample")["timestamp"] for one in (last, first))
        seconds, sides = 1e-6 * np.subtract(*times), bool(annotation["prev"]) + bool(annotation["next"])
        if not sides or seconds > _LONGEST_GAP * sides:
            return np.full(3, np.nan)
        return np.subtract(last["translation"], first["translation"]) / seconds


def _pose(row: Record) -> NDArray[np.float64]:
    return pose(row["rotation"], row["translation"]).numpy()


def info_record(tables: Tables, sample: Record, sweeps: int = 10) -> Record:
    """The record of one key frame: paths below the root, poses, sweeps before it and boxes in its LiDAR frame."""
    data = tables.data[sample["token"]]
    if LIDAR not in data:
        told = f"sample {sample['token']} has no {LIDAR}; fetch the tables again"
        raise UserError(f"nuScenes tables {tables.folder}: {told}")
    key = row = data[LIDAR]
    scene = tables.follow(sample, "scene")
    lidar2ego, ego2global = tables.poses(key)
    to_lidar = np.linalg.inv(ego2global @ lidar2ego)
    past: list[Record] = []
    while len(past) < sweeps and row["prev"]:
        row = tables.follow(row, "sample_data", "prev")
        sensor2ego, ego = tables.poses(row)
        matrix = (to_lidar @ ego @ sensor2ego).tolist()
        past.append({"path": row["filename"], "timestamp": row["timestamp"], "sensor2lidar": matrix})
    cams = {}
    for name in sorted(data.keys() - {LIDAR}):
        cam2ego, ego = tables.poses(data[name])
        cams[name] = {
            "path": data[name]["filename"],
            "timestamp": data[name]["timestamp"],
            "K": tables.follow(data[name], "calibrated_sensor")["camera_intrinsic"],
            "cam2ego": cam2ego.tolist(),
            "cam2lidar": (to_lidar @ ego @ cam2ego).tolist(),
        }
    boxes = [_box(tables, row, to_lidar) for row in tables.annotations[sample["token"]]]
    return {
        "token": sample["token"],
        "scene": scene["name"],
        "location": tables.follow(scene, "log")["location"],
        "timestamp": key["timestamp"],
        "lidar": key["filename"],
        "lidar2ego": lidar2ego.tolist(),
        "ego2global": ego2global.tolist(),
        "sweeps": past,
        "cams": cams,
        **{field: [values[column] for values in boxes] for column, field in enumerate(_OF_BOXES)},
    }


def _box(tables: Tables, row: Record, to_lidar: NDArray[Any]) -> tuple[Any, ...]:
    """The values of `_OF_BOXES` of an annotation."""
    centre = to_lidar[:3, :3] @ row["translation"] + to_lidar[:3, 3]
    heading = to_lidar[:3, :3] @ _pose(row)[:3, 0]
    speed = to_lidar[:2, :2] @ tables.velocity(row)[:2]
    width, length, height = row["size"]
    named = row["attribute_tokens"][:1]
    return (
        [*centre.tolist(), length, width, height, math.atan2(heading[1], heading[0])],
        [None if math.isnan(value) else value for value in speed.tolist()],
        tables.follow(tables.follow(row, "instance"), "category")["name"],
        row["num_lidar_pts"],
        row["num_radar_pts"],
        tables.follow(row | {"attribute_token": named[0]}, "attribute")["name"] if named else "",
        row["visibility_token"],
        row["instance_token"],
    )


def header(version: str, split: str) -> Record:
    """The first line of an info file."""
    return {"dataset": "nuscenes", "info_version": INFO_VERSION, "version": version, "split": split}


class Entry(NamedTuple):
    """What is known of a record without reading it again."""

    token: str
    scene: str
    location: str
    names: tuple[str, ...]
    """Classes of its boxes that hold a point, each once, for resampling."""
    offset: int
    """Byte at which its line begins."""


def _entry(record: Record, offset: int = 0) -> Entry:
    counts = (record.get(field, ()) for field in ("names", "num_lidar_pts", "num_radar_pts"))
    names = dict.fromkeys(
        CLASS_OF[name] for name, *hits in zip(*counts, strict=True) if name in CLASS_OF and any(hits)
    )
    return Entry(record["token"], record["scene"], record["location"], tuple(names), offset)


class Infos(Sequence[Record]):
    """The records of an info file, read one at a time, as loader processes need it.

    Raises:
        UserError: a file of another version or of something else, or a damaged line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._hint = path, "write it by `python -m projects.calico.nuscenes_infos`"
        self.entries: list[Entry] = []
        try:
            with path.open("rb") as file:
                head = self._parse(file.readline(), 1)
                dataset, version = head.get("dataset"), head.get("info_version")
                if (dataset, version) != ("nuscenes", INFO_VERSION):
                    told = f"is of data set {dataset!r}, version {version!r}"
                    knows = f"this reader knows nuscenes, version {INFO_VERSION}"
                    raise UserError(f"info file {path} {told}; {knows}: {self._hint}")
                self.sweeps: int | None = head.get("sweeps")
                offset = file.tell()
                for number, line in enumerate(file, start=2):
                    self.entries.append(_entry(self._parse(line, number), offset))
                    offset += len(line)
        except KeyError as error:
            raise UserError(f"info file {path} line {number} has no {error}; {self._hint}") from None
        except OSError as error:
            raise unreadable(error, path, "info file", self._hint) from None

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"info file {self.path} line {number} is no JSON object; {self._hint}")
        return content

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.entries[index].offset)
            return self._parse(file.readline(), index + 2)


@dataclass(frozen=True)
class NuScenesFrames(Frames):
    """Frames of an info file, or of records, see `Frames`."""

    records: Sequence[Record]
    root: Path
    sweeps: int = 9
    """Past ones of a frame."""
    kind = "nuscenes"

    @cached_property
    def entries(self) -> Sequence[Entry]:
        """One a record."""
        return self.records.entries if isinstance(self.records, Infos) else list(map(_entry, self.records))

    @property
    def tokens(self) -> Sequence[str]:
        """nuScenes' own."""
        return [entry.token for entry in self.entries]

    @property
    def scenes(self) -> Sequence[str]:
        """Names; mmdetection3d's info files do not tell them."""
        return [entry.scene or entry.token for entry in self.entries]

    def classes(self, index: int) -> Sequence[str]:
        """Of the labelled objects of a frame, each once."""
        return self.entries[index].names

    def read(self, index: int, **given: Any) -> Frame:
        """See `read_frame`."""
        return read_frame(self.records[index], self.root, sweeps=self.sweeps, **given)


def read_frame(
    record: Record,
    root: Path,
    *,
    sweeps: int = 9,
    labels: bool = False,
    cameras: bool = True,
    draw: np.random.Generator | None = None,
) -> Frame:
    """The frame of a record, with points of the key sweep and of `sweeps` past ones.

    Past sweeps are the nearest, or drawn from all of the record by `draw`; the key sweep stands in for those that the
    beginning of a scene lacks.
    """
    current = np.pad(read_sweep(root / record["lidar"], 5)[:, :4], ((0, 0), (0, 1)))
    past = record["sweeps"][:sweeps]
    if draw is not None and len(record["sweeps"]) > sweeps:
        past = [record["sweeps"][n] for n in sorted(draw.permutation(len(record["sweeps"]))[:sweeps])]
    clouds = [current]
    for sweep in past:
        points = _without_car(read_sweep(root / sweep["path"], 5))
        matrix = np.array(sweep["sensor2lidar"])
        moved = points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
        lag = np.full(len(points), (record["timestamp"] - sweep["timestamp"]) * 1e-6)
        clouds.append(np.column_stack([moved, points[:, 3], lag]).astype(np.float32))
    clouds += [_without_car(current)] * (sweeps - len(past))
    points = np.concatenate(clouds)
    seen = record["cams"].items() if cameras else ()
    return checked(
        Frame(
            record["token"],
            record["scene"] or record["token"],
            "nuscenes",
            points,
            np.arange(len(points)) < len(current),
            {
                name: Camera(root / one["path"], np.array(one["K"]), np.array(one["cam2lidar"]))
                for name, one in seen
            },
            np.array(record["lidar2ego"]),
            np.array(record["ego2global"]),
            read_labels(record) if labels else None,
        )
    )


def _without_car(points: NDArray[np.float32]) -> NDArray[np.float32]:
    return points[(np.abs(points[:, :2]) >= _NEAR).any(1)]


def read_labels(record: Record) -> Labels:
    """The boxes of the ten classes in which there is a point of the LiDAR or a radar."""
    hit = np.add(record["num_lidar_pts"], record["num_radar_pts"]) > 0
    rows = [row for row, name in enumerate(record["names"]) if name in CLASS_OF and hit[row]]
    return Labels(
        boxes=_with_velocity(record)[rows].astype(np.float32),
        names=tuple(CLASS_OF[record["names"][row]] for row in rows),
        num_points=np.array([record["num_lidar_pts"][row] for row in rows], np.int64),
        attributes=tuple(record["attribute"][row] for row in rows),
    )


def _with_velocity(record: Record) -> NDArray[np.float64]:
    """[k,9]."""
    boxes = [[*box, *speed] for box, speed in zip(record["boxes"], record["velocity"], strict=True)]
    return np.array(boxes, np.float64).reshape(-1, 9)


def lidar2global(record: Mapping[str, Any]) -> NDArray[np.float64]:
    """[4,4]."""
    return np.array(record["ego2global"]) @ np.array(record["lidar2ego"])


def to_global(boxes: NDArray[Any], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes [k,9] of a LiDAR frame in the global one.

    A box stands upright in the world, and its yaw and velocity in the LiDAR frame are what is seen of them from above;
    this undoes that view, so that true boxes come back as they were annotated.
    """
    moved = np.array(boxes, np.float64).reshape(-1, 9)
    seen = np.linalg.inv(matrix)[:2, :2]
    heading = np.linalg.solve(seen, [np.cos(moved[:, 6]), np.sin(moved[:, 6])])
    moved[:, :3] = moved[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    moved[:, 6] = np.arctan2(heading[1], heading[0])
    moved[:, 7:9] = moved[:, 7:9] @ np.linalg.inv(seen).T
    return moved


def truth(records: Iterable[Record]) -> tuple[Boxes, NDArray[np.float64], Boxes]:
    """What predictions are compared with: true boxes, the car's place [S,2], and bicycle racks, all global."""
    ego, samples, racks = [], [], []
    for record in records:
        placed = to_global(_with_velocity(record), lidar2global(record))
        ego.append(np.array(record["ego2global"])[:2, 3])
        counts = np.add(record["num_lidar_pts"], record["num_radar_pts"])
        names, attributes = np.array(record["names"]), np.array(record["attribute"])
        known, rack = (np.isin(names, kind) for kind in (list(CLASS_OF), [RACK]))
        samples.append(
            (placed[known], [CLASS_OF[one] for one in names[known]], None, attributes[known], counts[known])
        )
        racks.append((placed[rack], names[rack], None, None, counts[rack]))
    return Boxes.stack(samples, truth=True), np.array(ego).reshape(-1, 2), Boxes.stack(racks, truth=True)
