"""Info files of mmdetection3d 1.1 (pickles or JSON), read as data: numbers, texts, lists and dictionaries, nothing else."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from projects.calico.readers.nuscenes import CLASS_OF, NuScenesFrames, Record
from vlmkd.errors import UserError
from vlmkd.files import read_object
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


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """Lists and dictionaries of plain numbers and texts; what the file names twice is made once."""
    if id(value) not in seen:
        if isinstance(value, dict):
            seen[id(value)] = {key: _plain(one, seen) for key, one in value.items()}
        elif isinstance(value, (list, tuple)):
            seen[id(value)] = [_plain(one, seen) for one in value]
        else:
            return value.values.tolist() if isinstance(value, _Array) else value
    return seen[id(value)]


def read_infos(path: Path) -> dict[str, Any]:
    """`metainfo` and `data_list` of an info file of version 1.1.

    Raises:
        UserError: another version, a pickle that names anything but numbers, or a damaged file.
    """
    if path.suffix == ".json":
        content: Any = read_object(path, "info file")
    else:
        with reading(path, "info file"):
            data = path.read_bytes() if path.stat().st_size < _LIMIT else b""
            content = _plain(_Reader(io.BytesIO(data)).load(), {})
    found = content if isinstance(content, dict) else {}
    version = found.get("metainfo", {}).get("info_version", "1.1")  # KITTI's says none
    if version != "1.1" or not isinstance(found.get("data_list"), list):
        raise UserError(
            f"info file {path} has the info version {version!r}{'' if found.get('data_list') else ' and no data_list'}; 1.1 is"
            " read (mmdetection3d's update_infos_to_v2.py makes it of older ones)"
        )
    return found


def nuscenes_record(content: Mapping[str, Any], index: int = 0, *, folders: bool = True) -> Record:
    """Frame number `index` of nuScenes as a record of `readers.nuscenes`; its boxes are of the ten classes.

    What the file does not say (scene, instances, visibility, attributes) is empty.

    Args:
        folders: files lie in samples/SENSOR and sweeps/SENSOR, where info files name them without; else beside each other.
    """
    category = {name: one for one, name in reversed(CLASS_OF.items())}
    one, points = content["data_list"][index], content["data_list"][index]["lidar_points"]
    names = {
        label: category[name] for name, label in content["metainfo"]["categories"].items() if name in category
    }
    boxes = [box for box in one["instances"] if box["bbox_label_3d"] in names]
    to_lidar = np.linalg.inv(np.array(one["ego2global"]) @ np.array(points["lidar2ego"]))

    def place(folder: str, name: str) -> str:
        return f"{folder}/{name}" if folders and "/" not in name else name

    def past(sweep: Mapping[str, Any]) -> Record:
        own = np.array(sweep["ego2global"]) @ np.array(sweep["lidar_points"]["lidar2ego"])
        return {
            "path": place("sweeps/LIDAR_TOP", sweep["lidar_points"]["lidar_path"]),
            "timestamp": round(sweep["timestamp"] * 1e6),
            "sensor2lidar": (to_lidar @ own).tolist(),
        }

    return {
        "token": one["token"],
        "scene": "",
        "location": "",
        "timestamp": round(one["timestamp"] * 1e6),
        "lidar": place("samples/LIDAR_TOP", points["lidar_path"]),
        "lidar2ego": points["lidar2ego"],
        "ego2global": one["ego2global"],
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
        "velocity": [box["velocity"] for box in boxes],
        "names": [names[box["bbox_label_3d"]] for box in boxes],
        **{field: [box[field] for box in boxes] for field in ("num_lidar_pts", "num_radar_pts")},
        **{field: [""] * len(boxes) for field in ("attribute", "visibility", "instance")},
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
