"""Info files of mmdetection3d 1.1 (pickles or JSON), read as data: numbers, texts, lists and dictionaries, nothing else."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from projects.calico.readers.nuscenes import CLASS_OF, NuScenesFrames, Record
from vlmkd.errors import UserError
from vlmkd.files import read_object, unreadable
from vlmkd.tensor_files import reading

_LIMIT = 1 << 31  # bytes; the info files of all of nuScenes' train split have a quarter


class _Kind:
    """Stands for a NumPy dtype: numbers alone, of either byte order."""

    def __init__(self, code: str = "", *_: Any) -> None:
        if not re.fullmatch(r"[fiub][1248]", code):
            raise pickle.UnpicklingError(f"dtype {code!r} is no number")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = {">": ">", "<": "<"}.get(state[1], "") + self.code

    def values(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, self.code)


class _Array:
    """Stands for a NumPy array while it is read."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        self.values = kind.values(data).reshape(shape, order="F" if by_columns else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin-1")


class _Reader(pickle.Unpickler):
    """Knows five names of NumPy, none of which is NumPy's own."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        own = {
            "dtype": _Kind,
            "ndarray": _Array,
            "scalar": lambda kind, data: kind.values(data)[0].item(),
            "_reconstruct": _Array,
        }
        if re.fullmatch(r"numpy(\._?core\.multiarray)?", module) and name in own:
            return own[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is code and no data")


def _plain(value: Any) -> Any:
    """Lists and dictionaries of plain numbers and texts."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.values.tolist() if isinstance(value, _Array) else value


def read_infos(path: Path) -> dict[str, Any]:
    """`metainfo` and `data_list` of an info file of version 1.1.

    Raises:
        UserError: another version, a pickle that names anything but numbers, or a damaged file.
    """
    what = f"info file {path}"
    if path.suffix == ".json":
        content: Any = read_object(path, "info file")
    else:
        try:
            data = path.read_bytes() if path.stat().st_size < _LIMIT else b""
        except OSError as error:
            raise unreadable(error, path, "info file") from None
        try:
            with reading(path, "info file"):
                content = _plain(_Reader(io.BytesIO(data)).load())
        except RecursionError:
            raise UserError(f"{what} is nested too deeply; is it the right file?") from None
    version = (
        content.get("metainfo", {}).get("info_version", "1.1") if isinstance(content, dict) else None
    )  # KITTI's says none
    if version != "1.1" or not isinstance(content.get("data_list"), list):
        raise UserError(
            f"{what} has the info version {version!r}; 1.1 is read (mmdetection3d's update_infos_to_v2.py makes it of older ones)"
        )
    return content


def nuscenes_record(content: Mapping[str, Any], index: int = 0, *, folders: bool = True) -> Record:
    """Frame number `index` of nuScenes as a record of `readers.nuscenes`; its boxes are of the ten classes.

    What the file does not say (scene, instances, visibility, attributes) is empty.

    Args:
        folders: files lie in samples/SENSOR and sweeps/SENSOR, where info files name them without; else beside each other.
    """
    category = {name: one for one, name in reversed(CLASS_OF.items())}
    one = content["data_list"][index]
    names = {
        label: category[name] for name, label in content["metainfo"]["categories"].items() if name in category
    }
    boxes = [box for box in one["instances"] if box["bbox_label_3d"] in names]
    ego2global = np.array(one["ego2global"])
    lidar2global = ego2global @ np.array(one["lidar_points"]["lidar2ego"])

    def place(folder: str, name: str) -> str:
        return f"{folder}/{name}" if folders and "/" not in name else name

    def past(sweep: Mapping[str, Any]) -> Record:
        points = sweep["lidar_points"]
        own = np.array(sweep["ego2global"]) @ np.array(points["lidar2ego"])
        matrix = np.linalg.inv(lidar2global) @ own
        time = round(sweep["timestamp"] * (1 if sweep["timestamp"] > 1e12 else 1e6))
        return {
            "path": place("sweeps/LIDAR_TOP", points["lidar_path"]),
            "timestamp": time,
            "sensor2lidar": matrix.tolist(),
        }

    return {
        "token": one["token"],
        "scene": "",
        "location": "",
        "timestamp": round(one["timestamp"] * 1e6),
        "lidar": place("samples/LIDAR_TOP", one["lidar_points"]["lidar_path"]),
        "lidar2ego": one["lidar_points"]["lidar2ego"],
        "ego2global": ego2global.tolist(),
        "sweeps": [past(sweep) for sweep in one.get("lidar_sweeps", ())],
        "cams": {
            name: {
                "path": place(f"samples/{name}", camera["img_path"]),
                "timestamp": round(camera["timestamp"] * 1e6),
                "K": camera["cam2img"],
                "cam2ego": camera["cam2ego"],
                "cam2lidar": np.linalg.inv(np.array(camera["lidar2cam"])).tolist(),
            }
            for name, camera in one["images"].items()
        },
        "boxes": [box["bbox_3d"][:7] for box in boxes],
        "velocity": [[math.nan if speed is None else speed for speed in box["velocity"]] for box in boxes],
        "names": [names[box["bbox_label_3d"]] for box in boxes],
        "num_lidar_pts": [box["num_lidar_pts"] for box in boxes],
        "num_radar_pts": [box["num_radar_pts"] for box in boxes],
        "attribute": [""] * len(boxes),
        "visibility": [""] * len(boxes),
        "instance": [""] * len(boxes),
    }


def nuscenes_frames(path: Path, root: Path | None = None, sweeps: int = 9) -> NuScenesFrames | None:
    """The frames of an info file of nuScenes, whose files lie below `root`, else beside it; None for another data set."""
    content = read_infos(path)
    if str(content["metainfo"].get("dataset")).lower() != "nuscenes":
        return None
    records = [
        nuscenes_record(content, n, folders=root is not None) for n in range(len(content["data_list"]))
    ]
    return NuScenesFrames(records, root or path.parent, [record["token"] for record in records], sweeps)
