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


class _Dtype:
    """Stands for NumPy's: numbers alone, of either byte order."""

    def __init__(self, code: str = "", *_: Any) -> None:
        if not re.fullmatch(r"[fiub][1248]", code):
            raise pickle.UnpicklingError(f"dtype {code!r} is no number")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = {">": ">", "<": "<"}.get(state[1], "") + self.code

    def values(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, self.code)


class _Array:
    """Stands for NumPy's while it is read."""

    values = np.empty(0)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        self.values = kind.values(data).reshape(shape, order="F" if by_columns else "C")


class _Reader(pickle.Unpickler):
    """Knows five names of NumPy and of its pickles, none of which is NumPy's own."""

    def find_class(self, module: str, name: str) -> Any:
        own = {
            "dtype": _Dtype,
            "ndarray": _Array,
            "_reconstruct": _Array,
            "scalar": lambda kind, data: kind.values(data)[0].item(),
        }
        if re.fullmatch(r"numpy(\._?core\.multiarray)?", module) and name in own:
            return own[name]
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 holds bytes
            return lambda text, encoding: text.encode("latin-1")
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
        lacks = "" if found.get("data_list") else " and no data_list"
        raise UserError(
            f"info file {path} has the info version {version!r}{lacks}; 1.1 is read (mmdetection3d's"
            " update_infos_to_v2.py makes it of older ones)"
        )
    return found


def nuscenes_record(content: Mapping[str, Any], index: int = 0, *, folders: bool = True) -> Record:
    """Frame number `index` of nuScenes as a record of `readers.nuscenes`; its boxes are of the ten classes.

    What the file does not say (scene, instances, visibility, attributes) is empty. `folders`: files lie in
    samples/SENSOR and sweeps/SENSOR, where info files name them without; else beside each other.
    """
    category = {name: one for one, name in reversed(CLASS_OF.items())}
    classes = content["metainfo"]["categories"].items()
    names = {label: category[name] for name, label in classes if name in category}
    one = content["data_list"][index]
    boxes = [box for box in one["instances"] if box["bbox_label_3d"] in names]

    def reading_of(own: Mapping[str, Any], name: str, folder: str) -> Record:
        path = f"{folder}/{name}" if folders and "/" not in name else name
        return {"path": path, "timestamp": round(own["timestamp"] * 1e6)}

    def lidar2global(own: Mapping[str, Any]) -> np.ndarray:
        return np.array(own["ego2global"]) @ np.array(own["lidar_points"]["lidar2ego"])

    to_lidar = np.linalg.inv(lidar2global(one))
    key = reading_of(one, one["lidar_points"]["lidar_path"], "samples/LIDAR_TOP")
    return {
        "token": one["token"],
        "scene": "",
        "location": "",
        "timestamp": key["timestamp"],
        "lidar": key["path"],
        "lidar2ego": one["lidar_points"]["lidar2ego"],
        "ego2global": one["ego2global"],
        "sweeps": [
            reading_of(past, past["lidar_points"]["lidar_path"], "sweeps/LIDAR_TOP")
            | {"sensor2lidar": (to_lidar @ lidar2global(past)).tolist()}
            for past in one.get("lidar_sweeps", ())
        ],
        "cams": {
            name: reading_of(camera, camera["img_path"], f"samples/{name}")
            | {
                "K": camera["cam2img"],
                "cam2ego": camera["cam2ego"],
                "cam2lidar": np.linalg.inv(np.array(camera["lidar2cam"])).tolist(),
            }
            for name, camera in one["images"].items()
        },
        "boxes": [box["bbox_3d"][:7] for box in boxes],
        "names": [names[box["bbox_label_3d"]] for box in boxes],
        **{field: [box[field] for box in boxes] for field in ("velocity", "num_lidar_pts", "num_radar_pts")},
        **{field: [""] * len(boxes) for field in ("attribute", "visibility", "instance")},
    }


def nuscenes_frames(path: Path, root: Path | None = None, sweeps: int = 9) -> NuScenesFrames | None:
    """The frames of an info file of nuScenes, whose files lie below `root`, else beside it; None for another data set."""
    content = read_infos(path)
    if str(content["metainfo"].get("dataset")).lower() != "nuscenes":
        return None
    numbers = range(len(content["data_list"]))
    records = [nuscenes_record(content, n, folders=root is not None) for n in numbers]
    return NuScenesFrames(records, root or path.parent, sweeps)
