"""Write nuscenes_devkit.json: what nuscenes-devkit 1.2.0 says of the small data set of the tests.

The devkit needs NumPy below 2, so it runs in an environment of its own:

    python3 -m venv ENV && ENV/bin/pip install nuscenes-devkit==1.2.0 "numpy<2"
    ENV/bin/python tests/golden/nuscenes_devkit.py
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "projects/calico"))

import tiny_nuscenes
from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.utils import quaternion_yaw
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.splits import create_splits_scenes

SEEDS = range(8)
LAYERS = [
    "drivable_area",
    "ped_crossing",
    "walkway",
    "stop_line",
    "carpark_area",
    "road_divider",
    "lane_divider",
]


def plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 12)


def scores(nusc: NuScenes, root: Path, seed: int) -> dict[str, Any]:
    """Of the detections of a seed."""
    names = {name: category_to_detection_name(name) for name in tiny_nuscenes.CATEGORIES}
    file = root / f"{seed}.json"
    file.write_text(json.dumps(tiny_nuscenes.detections(root, seed, {k: v for k, v in names.items() if v})))
    config = config_factory("detection_cvpr_2019")
    found, _ = DetectionEval(nusc, config, str(file), "mini_val", str(root / "out"), verbose=False).evaluate()
    return {
        "nds": plain(found.nd_score),
        "map": plain(found.mean_ap),
        "errors": [plain(found.tp_errors[name]) for name in TP_METRICS],
        "classes": {
            name: [
                [plain(found.get_label_ap(name, distance)) for distance in config.dist_ths],
                [plain(found.get_label_tp(name, error)) for error in TP_METRICS],
            ]
            for name in config.class_names
        },
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = tiny_nuscenes.write(Path(folder))
        nusc = NuScenes(tiny_nuscenes.VERSION, str(root), verbose=False)
        sample = nusc.sample[tiny_nuscenes.SAMPLES + 2]
        lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        _, boxes, _ = nusc.get_sample_data(lidar["token"])
        velocities = [nusc.box_velocity(box.token).tolist() for box in boxes]
        cloud, lags = LidarPointCloud.from_file_multisweep(nusc, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=9)
        pose = nusc.get("ego_pose", lidar["ego_pose_token"])
        patch = (pose["translation"][0], pose["translation"][1], 100.0, 100.0)
        api = NuScenesMap(str(root), "boston-seaport")
        masks = api.get_map_mask(patch, 30.0, LAYERS, (200, 200))
        content = {
            "splits": {
                name: {
                    "count": len(scenes),
                    "digest": hashlib.sha256("\n".join(scenes).encode()).hexdigest()[:8],
                }
                for name, scenes in create_splits_scenes().items()
            },
            "scores": [scores(nusc, root, seed) for seed in SEEDS],
            "sample": sample["token"],
            "boxes": [
                [
                    *map(plain, box.center),
                    *map(plain, box.wlh),
                    plain(quaternion_yaw(box.orientation)),
                    *map(plain, speed[:2]),
                ]
                for box, speed in zip(boxes, velocities, strict=True)
            ],
            "sweeps": {
                "count": int(cloud.points.shape[1]),
                "sum": [plain(value) for value in cloud.points.astype(np.float64).sum(1)],
                "lags": sorted({plain(lag) for lag in lags.ravel()}),
            },
            "map": {
                "angle": 30.0,
                "masks": base64.b64encode(zlib.compress(np.packbits(masks).tobytes(), 9)).decode(),
            },
        }
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
