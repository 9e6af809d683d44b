"""nuScenes (v1.0 tables, full, mini or test) without other toolboxes: tables, info records, frames.

An info file is JSON lines: a header, then one record a key frame, written by `python -m projects.calico.nuscenes_infos`.
Letters: n points, k boxes. Matrices are 4x4 and act from the left; quaternions are (w, x, y, z).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from projects.calico.evaluation.detection import Boxes
from projects.calico.geometry import pose
from projects.calico.scenes import Camera, Frame, FrameKind, Labels, checked
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_text, unreadable

Record = dict[str, Any]
INFO_VERSION = 1
LIDAR = "LIDAR_TOP"
CLASS_OF = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}
"""Category -> one of the ten classes; other categories are ignored."""
CLASSES = tuple(dict.fromkeys(CLASS_OF.values()))
RACK = "static_object.bicycle_rack"
_TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "sample", "sample_annotation",
    "sample_data", "scene", "sensor",
)  # fmt: skip
_LONGEST_GAP = 1.5  # seconds between two annotations of a thing that still tell its speed
_NEAR = 1.0  # metres from the sensor along x and y within which points of past sweeps are the car's own


# ---------------------------------------------------------------------------------------------------------- tables


class Tables:
    """The official tables of one version; of the readings those of the LiDAR and the key frames of the cameras.

    Raises:
        UserError: a table is missing or no JSON; a row names another that is not there.
    """

    def __init__(self, root: Path, version: str) -> None:
        self.folder = root / version
        if not self.folder.is_dir():
            raise UserError(
                f"{root} has no folder {version}; name the data set's root, which holds samples/, sweeps/ and {version}/"
            )
        self._rows: dict[str, dict[str, Record]] = {}
        for table in _TABLES:
            if table not in ("ego_pose", "sample_data"):
                self._rows[table] = {row["token"]: row for row in self._read(table)}
        # Two tables of 2.6 million rows, of which a quarter is read.
        self._rows["sample_data"] = {
            row["token"]: row for row in self._read("sample_data") if self._is_used(row, self.channel(row))
        }
        poses = {row["ego_pose_token"] for row in self._rows["sample_data"].values()}
        self._rows["ego_pose"] = {
            row["token"]: row for row in self._read("ego_pose") if row["token"] in poses
        }
        self.data: dict[str, dict[str, Record]] = {token: {} for token in self._rows["sample"]}
        """Sample -> channel -> reading of the key frame."""
        for row in self._rows["sample_data"].values():
            if row["is_key_frame"]:
                self.get("sample", row["sample_token"], "sample_data", row)
                self.data[row["sample_token"]][self.channel(row)] = row
        self.annotations: dict[str, list[Record]] = {token: [] for token in self._rows["sample"]}
        for row in self._rows["sample_annotation"].values():
            self.get("sample", row["sample_token"], "sample_annotation", row)
            self.annotations[row["sample_token"]].append(row)

    @staticmethod
    def _is_used(row: Record, channel: str) -> bool:
        return channel == LIDAR or (row["is_key_frame"] and channel.startswith("CAM"))

    def _read(self, table: str) -> Iterator[Record]:
        """The rows one by one, so that of a file of a gigabyte only its text is in memory."""
        path = self.folder / f"{table}.json"
        text = read_text(path, "nuScenes table", "fetch the metadata archive of this version", limit=1 << 33)
        decode, at = json.JSONDecoder().raw_decode, text.find("[") + 1
        end = text.rfind("]")
        try:
            while (at := _skip(text, at)) < end:
                row, at = decode(text, at)
                row["token"]  # noqa: B018  every row has one
                yield row
            if end < at or at == 0:
                raise ValueError("it is no list of rows")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"nuScenes table {path} is not usable ({one_line(error)}); fetch the tables again"
            ) from None

    def get(self, table: str, token: str, source: str = "", row: Record | None = None) -> Record:
        """A row by its token, which `row` of the table `source` names."""
        try:
            return self._rows[table][token]
        except KeyError:
            named = f"row {row['token']} of {source} names" if row else "there is no"
            raise UserError(
                f"nuScenes tables {self.folder}: {named} {table} {token!r}{', which is not there' if row else ''}; fetch the tables again"
            ) from None

    def channel(self, row: Record) -> str:
        """Name of the sensor that a reading is of."""
        calibrated = self.get("calibrated_sensor", row["calibrated_sensor_token"], "sample_data", row)
        return str(self.get("sensor", calibrated["sensor_token"], "calibrated_sensor", calibrated)["channel"])

    def poses(self, row: Record) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """sensor2ego and ego2global of a reading, at its own time."""
        calibrated = self.get("calibrated_sensor", row["calibrated_sensor_token"], "sample_data", row)
        ego = self.get("ego_pose", row["ego_pose_token"], "sample_data", row)
        return _pose(calibrated), _pose(ego)

    def scenes(self) -> dict[str, list[Record]]:
        """Scene's name -> its samples in the order of time."""
        found = {}
        for scene in self._rows["scene"].values():
            samples, token, source = [], scene["first_sample_token"], ("scene", scene)
            while token:
                samples.append(self.get("sample", token, *source))
                source = ("sample", samples[-1])
                token = samples[-1]["next"]
            found[scene["name"]] = samples
        return found

    def velocity(self, annotation: Record) -> NDArray[np.float64]:
        """Global [3], m/s, from the annotations before and after; NaN when they are missing or too far apart."""
        ends = [
            self.get("sample_annotation", annotation[side], "sample_annotation", annotation)
            if annotation[side]
            else annotation
            for side in ("prev", "next")
        ]
        times = [
            self.get("sample", one["sample_token"], "sample_annotation", one)["timestamp"] * 1e-6
            for one in ends
        ]
        longest = _LONGEST_GAP * (2 if annotation["prev"] and annotation["next"] else 1)
        if ends[0] is ends[1] or times[1] - times[0] > longest:
            return np.full(3, np.nan)
        return np.subtract(ends[1]["translation"], ends[0]["translation"]) / (times[1] - times[0])


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def _pose(row: Record) -> NDArray[np.float64]:
    return pose(row["rotation"], row["translation"]).numpy()


# ---------------------------------------------------------------------------------------------------------- records


def info_record(tables: Tables, sample: Record, sweeps: int = 10) -> Record:
    """The record of one key frame: paths below the root, poses, sweeps before it and boxes in its LiDAR frame."""
    data = tables.data[sample["token"]]
    if LIDAR not in data:
        raise UserError(
            f"nuScenes tables {tables.folder}: sample {sample['token']} has no {LIDAR}; fetch the tables again"
        )
    key = data[LIDAR]
    scene = tables.get("scene", sample["scene_token"], "sample", sample)
    lidar2ego, ego2global = tables.poses(key)
    to_lidar = np.linalg.inv(ego2global @ lidar2ego)
    past: list[Record] = []
    row = key
    while len(past) < sweeps and row["prev"]:
        row = tables.get("sample_data", row["prev"], "sample_data", row)
        sensor2ego, ego = tables.poses(row)
        matrix = (to_lidar @ ego @ sensor2ego).tolist()
        past.append({"path": row["filename"], "timestamp": row["timestamp"], "sensor2lidar": matrix})
    cams = {}
    for name, one in sorted(data.items()):
        if name != LIDAR:
            cam2ego, ego = tables.poses(one)
            calibrated = tables.get("calibrated_sensor", one["calibrated_sensor_token"], "sample_data", one)
            cams[name] = {
                "path": one["filename"],
                "timestamp": one["timestamp"],
                "K": calibrated["camera_intrinsic"],
                "cam2ego": cam2ego.tolist(),
                "cam2lidar": (to_lidar @ ego @ cam2ego).tolist(),
            }
    return {
        "token": sample["token"],
        "scene": scene["name"],
        "location": tables.get("log", scene["log_token"], "scene", scene)["location"],
        "timestamp": key["timestamp"],
        "lidar": key["filename"],
        "lidar2ego": lidar2ego.tolist(),
        "ego2global": ego2global.tolist(),
        "sweeps": past,
        "cams": cams,
        **_boxes(tables, sample, to_lidar),
    }


def _boxes(tables: Tables, sample: Record, to_lidar: NDArray[Any]) -> Record:
    """The lists of the annotations, all of one length."""
    found: Record = {
        name: []
        for name in (
            "boxes",
            "velocity",
            "names",
            "num_lidar_pts",
            "num_radar_pts",
            "attribute",
            "visibility",
            "instance",
        )
    }
    for row in tables.annotations[sample["token"]]:
        instance = tables.get("instance", row["instance_token"], "sample_annotation", row)
        category = tables.get("category", instance["category_token"], "instance", instance)["name"]
        attributes = [
            tables.get("attribute", token, "sample_annotation", row)["name"]
            for token in row["attribute_tokens"]
        ]
        centre = to_lidar[:3, :3] @ row["translation"] + to_lidar[:3, 3]
        heading = to_lidar[:3, :3] @ _pose(row)[:3, 0]
        speed = to_lidar[:2, :2] @ tables.velocity(row)[:2]
        width, length, height = row["size"]
        found["boxes"].append([*centre.tolist(), length, width, height, math.atan2(heading[1], heading[0])])
        found["velocity"].append(speed.tolist())
        found["names"].append(category)
        found["num_lidar_pts"].append(row["num_lidar_pts"])
        found["num_radar_pts"].append(row["num_radar_pts"])
        found["attribute"].append(attributes[0] if attributes else "")
        found["visibility"].append(row["visibility_token"])
        found["instance"].append(row["instance_token"])
    return found


def header(version: str, split: str) -> Record:
    """The first line of an info file."""
    return {"dataset": "nuscenes", "info_version": INFO_VERSION, "version": version, "split": split}


@dataclass(frozen=True)
class Entry:
    """What is known of a record without reading it again."""

    token: str
    scene: str
    location: str
    names: tuple[str, ...]
    """Classes of its boxes, each once, for resampling."""
    offset: int
    """Byte at which its line begins."""


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
                first = self._parse(file.readline(), 1)
                self._check(first)
                self.header = first
                offset = file.tell()
                for number, line in enumerate(file, start=2):
                    one = self._parse(line, number)
                    names = tuple(
                        dict.fromkeys(CLASS_OF[name] for name in one.get("names", ()) if name in CLASS_OF)
                    )
                    try:
                        self.entries.append(Entry(one["token"], one["scene"], one["location"], names, offset))
                    except KeyError as error:
                        raise UserError(
                            f"info file {path} line {number} has no {error}; {self._hint}"
                        ) from None
                    offset += len(line)
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

    def _check(self, first: Record) -> None:
        found = first.get("dataset"), first.get("info_version")
        if found != ("nuscenes", INFO_VERSION):
            raise UserError(
                f"info file {self.path} is of data set {found[0]!r}, version {found[1]!r}; this reader knows nuscenes, "
                f"version {INFO_VERSION}: {self._hint}"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.entries[index].offset)
            return self._parse(file.readline(), index + 2)

    @cached_property
    def scenes(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(dict.fromkeys(entry.scene for entry in self.entries))

    def of_scenes(self, scenes: Iterable[str]) -> list[int]:
        """Indices of the frames of these scenes, all of which must be there."""
        wanted = set(scenes)
        if missing := wanted - set(self.scenes):
            raise UserError(
                f"info file {self.path} lacks {len(missing)} of {len(wanted)} scenes, first {min(missing)}; build it from the whole split"
            )
        return [index for index, entry in enumerate(self.entries) if entry.scene in wanted]


# ----------------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class NuScenesFrames:
    """Frames of an info file, or of some of its records: see `scenes.Frames`."""

    records: Sequence[Record]
    root: Path
    tokens: Sequence[str]
    sweeps: int = 9
    """Past ones of a frame."""
    kind: FrameKind = field(default="nuscenes", init=False)

    @classmethod
    def of_info(cls, path: Path, root: Path, sweeps: int = 9) -> NuScenesFrames:
        """All frames of an info file of ours."""
        infos = Infos(path)
        return cls(infos, root, [entry.token for entry in infos.entries], sweeps)

    def read(
        self,
        index: int,
        *,
        labels: bool = False,
        cameras: bool = True,
        draw: np.random.Generator | None = None,
    ) -> Frame:
        """Frame number `index`; in training `draw` chooses the past sweeps."""
        record = self.records[index]
        return read_frame(record, self.root, sweeps=self.sweeps, labels=labels, cameras=cameras, draw=draw)


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

    Args:
        labels: read the boxes of the ten classes that hold a LiDAR or radar point; else the frame has none.

    Raises:
        UserError: a missing or damaged sweep, or what `checked` refuses.
    """
    current = read_sweep(root / record["lidar"])
    clouds = [np.concatenate([current[:, :4], np.zeros((len(current), 1), np.float32)], 1)]
    past = record["sweeps"][:sweeps]
    if draw is not None and len(record["sweeps"]) > sweeps:
        past = [
            record["sweeps"][n] for n in sorted(draw.choice(len(record["sweeps"]), sweeps, replace=False))
        ]
    for sweep in past:
        points = _without_car(read_sweep(root / sweep["path"]))
        matrix = np.array(sweep["sensor2lidar"])
        moved = points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
        lag = np.full((len(points), 1), (record["timestamp"] - sweep["timestamp"]) * 1e-6)
        clouds.append(np.concatenate([moved, points[:, 3:4], lag], 1).astype(np.float32))
    clouds += [_without_car(clouds[0])] * (sweeps - len(past))
    points = np.concatenate(clouds)
    seen = {
        name: Camera(
            root / one["path"], np.array(one["K"]), np.array(one["cam2lidar"]), one["timestamp"] * 1e-6
        )
        for name, one in (record["cams"].items() if cameras else ())
    }
    return checked(
        Frame(
            token=record["token"],
            scene=record["scene"],
            frame="nuscenes",
            points=points,
            key=np.arange(len(points)) < len(current),
            cameras=seen,
            lidar2ego=np.array(record["lidar2ego"]),
            ego2global=np.array(record["ego2global"]),
            labels=read_labels(record) if labels else None,
        )
    )


def read_sweep(path: Path) -> NDArray[np.float32]:
    """[n,5]: x, y, z, intensity (0 to 255), ring."""
    try:
        values = np.fromfile(path, np.float32)
    except OSError as error:
        raise unreadable(error, path, "LiDAR sweep", "fetch samples/ and sweeps/ of the data set") from None
    if len(values) % 5:
        raise UserError(
            f"LiDAR sweep {path} is cut off: {len(values)} numbers are no rows of five; fetch it again"
        )
    return values.reshape(-1, 5)


def _without_car(points: NDArray[np.float32]) -> NDArray[np.float32]:
    return points[(np.abs(points[:, :2]) >= _NEAR).any(1)]


def read_labels(record: Record) -> Labels:
    """The boxes of the ten classes in which there is a point of the LiDAR or a radar."""
    rows = [
        row
        for row, name in enumerate(record["names"])
        if name in CLASS_OF and record["num_lidar_pts"][row] + record["num_radar_pts"][row] > 0
    ]
    boxes = [[*record["boxes"][row], *record["velocity"][row]] for row in rows]
    return Labels(
        boxes=np.array(boxes, np.float32).reshape(-1, 9),
        names=tuple(CLASS_OF[record["names"][row]] for row in rows),
        num_points=np.array([record["num_lidar_pts"][row] for row in rows], np.int64),
        attributes=tuple(record["attribute"][row] for row in rows),
    )


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
    found: dict[str, list[Any]] = {"class": [], "rack": []}
    ego = []
    for record in records:
        boxes = np.array(
            [[*box, *speed] for box, speed in zip(record["boxes"], record["velocity"], strict=True)], float
        )
        placed = to_global(boxes, lidar2global(record))
        ego.append(np.array(record["ego2global"])[:2, 3])
        for kind, rows in (
            ("class", [row for row, name in enumerate(record["names"]) if name in CLASS_OF]),
            ("rack", [row for row, name in enumerate(record["names"]) if name == RACK]),
        ):
            names = [CLASS_OF.get(record["names"][row], RACK) for row in rows]
            counts = [record["num_lidar_pts"][row] + record["num_radar_pts"][row] for row in rows]
            found[kind].append(
                (placed[rows], names, None, [record["attribute"][row] for row in rows], counts)
            )
    return (
        Boxes.stack(found["class"], truth=True),
        np.array(ego).reshape(-1, 2),
        Boxes.stack(found["rack"], truth=True),
    )
