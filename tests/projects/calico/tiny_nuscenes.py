"""A small data set in the layout of nuScenes, the same on every machine, and random detections on it.

Only the standard library and NumPy: tests/golden/nuscenes_devkit.py reads it too, beside nuscenes-devkit.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "v1.0-mini"
SCENES = {
    "scene-0061": "singapore-onenorth",
    "scene-0103": "boston-seaport",
    "scene-0916": "singapore-onenorth",
}
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
SAMPLES, SWEEPS = 4, 5
"""Key frames of a scene, 0.5 s apart, and LiDAR sweeps from one to the next."""
CATEGORIES = (
    "vehicle.car", "human.pedestrian.adult", "vehicle.bus.bendy", "vehicle.truck", "movable_object.barrier",
    "movable_object.trafficcone", "vehicle.bicycle", "vehicle.motorcycle", "static_object.bicycle_rack",
    "vehicle.trailer", "animal", "human.pedestrian.child",
)  # fmt: skip
ATTRIBUTES = ("vehicle.moving", "vehicle.parked", "pedestrian.moving", "cycle.with_rider")
POLE = (20.0, 12.0)
"""Where a pole stands, from a scene's first pose, in metres."""


def token(*parts: Any) -> str:
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def quaternion(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> list[float]:
    """(w, x, y, z) of a rotation by roll, then pitch, then yaw."""
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a / 2), math.sin(a / 2)) for a in (yaw, pitch, roll))
    return [
        cr * cp * cy + sr * sp * sy, sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy
    ]  # fmt: skip


def rotation(q: list[float]) -> np.ndarray:
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def write(root: Path) -> Path:
    """Write the tables, sweeps and map; images are named, not written."""
    tables: dict[str, list[dict[str, Any]]] = {
        "category": [
            {"token": token("category", name), "name": name, "description": ""} for name in CATEGORIES
        ],
        "attribute": [
            {"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES
        ],
        "visibility": [{"token": str(n), "level": f"v{n}", "description": ""} for n in range(1, 5)],
        "sensor": [
            {"token": token(name), "channel": name, "modality": "lidar" if name == "LIDAR_TOP" else "camera"}
            for name in ("LIDAR_TOP", *CAMERAS)
        ],
        **{name: [] for name in ("instance", "calibrated_sensor", "ego_pose", "log", "scene", "sample")},
        **{name: [] for name in ("sample_data", "sample_annotation", "map")},
    }
    for number, (scene, location) in enumerate(SCENES.items()):
        _write_scene(root, tables, scene, location, number)
    (root / "maps").mkdir(exist_ok=True)
    (root / "maps/basemap.png").write_bytes(b"")
    logs = [log["token"] for log in tables["log"]]
    tables["map"] = [
        {
            "token": token("map"),
            "log_tokens": logs,
            "category": "semantic_prior",
            "filename": "maps/basemap.png",
        }
    ]
    (root / VERSION).mkdir()
    for name, rows in tables.items():
        (root / VERSION / f"{name}.json").write_text(json.dumps(rows))
    (root / "maps/expansion").mkdir()
    for location in sorted(set(SCENES.values())):
        (root / f"maps/expansion/{location}.json").write_text(json.dumps(vector_map()))
    return root


def _write_scene(
    root: Path, tables: dict[str, list[dict[str, Any]]], scene: str, location: str, number: int
) -> None:
    draw = random.Random(f"tiny {scene}").random
    start, heading = (300.0 + 40 * number, 400.0 + 30 * number), 2 * math.pi * draw()
    begin = 1_500_000_000_000_000 + number * 10**9  # microseconds
    tables["log"].append(
        {
            "token": token("log", scene),
            "logfile": scene,
            "location": location,
            "vehicle": "n",
            "date_captured": "",
        }
    )
    for name in ("LIDAR_TOP", *CAMERAS):
        camera = name != "LIDAR_TOP"
        yaw = -CAMERAS.index(name) * math.pi / 3 if camera else -math.pi / 2
        turn = rotation(quaternion(yaw, 0.02 * draw(), 0.02 * draw()))
        if camera:  # x right, y down, z forward
            turn = turn @ np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        tables["calibrated_sensor"].append(
            {
                "token": token("calibrated", scene, name),
                "sensor_token": token(name),
                "translation": [0.9 + draw(), draw() - 0.5, 1.84],
                "rotation": _from_matrix(turn),
                "camera_intrinsic": [[1266.0, 0, 800], [0, 1266.0, 450], [0, 0, 1]] if camera else [],
            }
        )

    def pose(time: int) -> tuple[str, list[float], list[float]]:
        """Token, translation and rotation of the car at a time; written on first use."""
        name, seconds = token("pose", scene, time), (time - begin) * 1e-6
        yaw = heading + 0.1 * seconds
        place = [start[0] + 8 * seconds * math.cos(yaw), start[1] + 8 * seconds * math.sin(yaw), 0.0]
        turn = quaternion(yaw, 0.02 * math.sin(seconds), 0.015 * math.cos(seconds))
        tables["ego_pose"].append({"token": name, "timestamp": time, "rotation": turn, "translation": place})
        return name, place, turn

    samples = [token("sample", scene, k) for k in range(SAMPLES)]
    times = [begin + k * 500_000 for k in range(SAMPLES)]
    tables["scene"].append(
        {"token": token("scene", scene), "log_token": token("log", scene), "nbr_samples": SAMPLES, "name": scene,
         "first_sample_token": samples[0], "last_sample_token": samples[-1], "description": ""}
    )  # fmt: skip
    for k, name in enumerate(samples):
        tables["sample"].append(
            {"token": name, "timestamp": times[k], "scene_token": token("scene", scene),
             "prev": samples[k - 1] if k else "", "next": samples[k + 1] if k + 1 < SAMPLES else ""}
        )  # fmt: skip
        for camera in CAMERAS:
            time = times[k] - 12_000 * CAMERAS.index(camera)
            tables["sample_data"].append(
                {"token": token("image", scene, k, camera), "sample_token": name, "ego_pose_token": pose(time)[0],
                 "calibrated_sensor_token": token("calibrated", scene, camera), "timestamp": time, "fileformat": "jpg",
                 "is_key_frame": True, "height": 900, "width": 1600, "prev": "", "next": "",
                 "filename": f"samples/{camera}/{scene}_{k}.jpg"}
            )  # fmt: skip
    (root / "samples/LIDAR_TOP").mkdir(parents=True, exist_ok=True)
    (root / "sweeps/LIDAR_TOP").mkdir(parents=True, exist_ok=True)
    calibrated = tables["calibrated_sensor"][-1 - len(CAMERAS)]
    last = (SAMPLES - 1) * SWEEPS
    for sweep in range(last + 1):
        time, key = begin + sweep * 100_000, sweep % SWEEPS == 0
        file = f"{'samples' if key else 'sweeps'}/LIDAR_TOP/{scene}_{sweep}.pcd.bin"
        name, place, turn = pose(time)
        tables["sample_data"].append(
            {"token": token("sweep", scene, sweep), "sample_token": samples[-(-sweep // SWEEPS)], "ego_pose_token": name,
             "calibrated_sensor_token": calibrated["token"], "timestamp": time, "fileformat": "pcd", "is_key_frame": key,
             "height": 0, "width": 0, "prev": token("sweep", scene, sweep - 1) if sweep else "",
             "next": token("sweep", scene, sweep + 1) if sweep < last else "", "filename": file}
        )  # fmt: skip
        pole = np.array([[start[0] + POLE[0], start[1] + POLE[1], 0.1 * level] for level in range(10)])
        in_ego = (pole - place) @ rotation(turn)
        in_lidar = (in_ego - calibrated["translation"]) @ rotation(calibrated["rotation"])
        points = np.array([[60 * draw() - 30, 60 * draw() - 30, 4 * draw() - 2] for _ in range(50)])
        points[:3] *= 0.01  # on the car itself
        points = np.pad(np.concatenate([in_lidar, points]), ((0, 0), (0, 2)))
        points[:, 3], points[:, 4] = np.arange(len(points)) * 4 % 256, np.arange(len(points)) % 32
        points.astype(np.float32).tofile(root / file)
    _write_annotations(tables, scene, start, samples, draw)


def _write_annotations(
    tables: dict[str, list[dict[str, Any]]],
    scene: str,
    start: tuple[float, float],
    samples: list[str],
    draw: Any,
) -> None:
    for thing in range(26):
        category = CATEGORIES[thing % len(CATEGORIES)]
        first, end = int(2 * draw()), SAMPLES - int(2 * draw())
        frames = [k for k in range(first, end) if not (thing % 5 == 0 and k == 1)] if thing % 7 else [2]
        place = [start[0] + 90 * draw() - 45, start[1] + 90 * draw() - 45, draw()]
        if thing == 18:  # a bicycle in the rack, which comes later
            place = [start[0] + 10.0, start[1] + 9.5, 0.5]
        if category == "static_object.bicycle_rack":
            place = [start[0] + 10.0, start[1] + 10.0, 0.5]
        size = [8.0, 8.0, 3.0] if "rack" in category else [0.5 + draw(), 0.8 + 3 * draw(), 1 + draw()]
        speed, yaw = [8 * draw() - 4, 8 * draw() - 4], 2 * math.pi * draw()
        moving, attribute, instance = draw() < 0.5, draw() < 0.8, token("instance", scene, thing)
        names = {k: token("annotation", scene, thing, k) for k in frames}
        for at, k in enumerate(frames):
            gone = 0.5 * k * moving
            tables["sample_annotation"].append(
                {
                    "token": names[k],
                    "sample_token": samples[k],
                    "instance_token": instance,
                    "visibility_token": str(1 + thing % 4),
                    "attribute_tokens": [token("attribute", ATTRIBUTES[thing % 4])] if attribute else [],
                    "translation": [place[0] + speed[0] * gone, place[1] + speed[1] * gone, place[2]],
                    "size": size,
                    "rotation": quaternion(yaw + 0.2 * k),
                    "num_lidar_pts": int(4 * draw()) * int(4 * draw()),
                    "num_radar_pts": int(draw() < 0.2),
                    "prev": names[frames[at - 1]] if at else "",
                    "next": names[frames[at + 1]] if at + 1 < len(frames) else "",
                }
            )
        tables["instance"].append(
            {"token": instance, "category_token": token("category", category), "nbr_annotations": len(frames),
             "first_annotation_token": names[frames[0]], "last_annotation_token": names[frames[-1]]}
        )  # fmt: skip


def _from_matrix(matrix: np.ndarray) -> list[float]:
    """Quaternion by the eigenvector that any rotation has (Bar-Itzhack 2000)."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    key = (
        np.array(
            [
                [a - e - i, 0, 0, 0],
                [d + b, e - a - i, 0, 0],
                [g + c, h + f, i - a - e, 0],
                [h - f, c - g, d - b, a + e + i],
            ]
        )
        / 3
    )
    values, vectors = np.linalg.eigh(key)
    x, y, z, w = vectors[:, values.argmax()]
    return [float(w), float(x), float(y), float(z)]


def vector_map() -> dict[str, Any]:
    """A map of both locations: polygons, one with a hole, crossings and dividers about the poses of the scenes."""
    draw = random.Random("tiny map").random
    content: dict[str, Any] = {
        "version": "1.3",
        "canvas_edge": [1000.0, 1000.0],
        "arcline_path_3": {},
        "connectivity": {},
    }
    layers = (
        "polygon",
        "line",
        "node",
        "drivable_area",
        "road_segment",
        "road_block",
        "lane",
        "ped_crossing",
        "walkway",
    )
    for layer in (
        *layers,
        "stop_line",
        "carpark_area",
        "road_divider",
        "lane_divider",
        "traffic_light",
        "lane_connector",
    ):
        content[layer] = []

    def nodes(points: list[tuple[float, float]]) -> list[str]:
        first = len(content["node"])
        content["node"] += [{"token": f"n{first + n}", "x": x, "y": y} for n, (x, y) in enumerate(points)]
        return [node["token"] for node in content["node"][first:]]

    def polygon(x: float, y: float, radius: float, corners: int, hole: bool = False) -> str:
        def ring(r: float) -> list[tuple[float, float]]:
            turn = 2 * math.pi * draw()
            angles = [turn + 2 * math.pi * n / corners for n in range(corners)]
            return [(x + r * math.cos(angle), y + r * math.sin(angle)) for angle in angles]

        name = f"p{len(content['polygon'])}"
        holes = [{"node_tokens": nodes(ring(radius * 0.4))}] if hole else []
        content["polygon"].append(
            {"token": name, "exterior_node_tokens": nodes(ring(radius)), "holes": holes}
        )
        return name

    for number in range(12):
        x, y = 280 + 110 * draw(), 380 + 90 * draw()
        content["drivable_area"].append(
            {
                "token": f"d{number}",
                "polygon_tokens": [polygon(x, y, 12, 6, hole=number % 2 == 0), polygon(x + 9, y, 6, 4)],
            }
        )
        for layer, radius in (("ped_crossing", 4), ("walkway", 8), ("stop_line", 5), ("carpark_area", 7)):
            x, y = 280 + 110 * draw(), 380 + 90 * draw()
            record = {"token": f"{layer}{number}", "polygon_token": polygon(x, y, radius, 5)}
            content[layer].append(record | {"stop_line_type": "YIELD"} if layer == "stop_line" else record)
        for layer in ("road_divider", "lane_divider"):
            x, y, turn = 280 + 110 * draw(), 380 + 90 * draw(), 2 * math.pi * draw()
            ends = [(x, y), (x + 40 * math.cos(turn), y + 40 * math.sin(turn))]
            content["line"].append({"token": f"l{len(content['line'])}", "node_tokens": nodes(ends)})
            content[layer].append({"token": f"{layer}{number}", "line_token": content["line"][-1]["token"]})
    return content


def detections(root: Path, seed: int, names: dict[str, str]) -> dict[str, Any]:
    """A results file for the two scenes of mini_val: true boxes moved, turned, renamed or lost, and false ones.

    `names` maps categories to detection classes. Even seeds round the scores, so that many are equal.
    """
    draw = random.Random(f"detections {seed}").random
    rows = {
        table: json.loads((root / VERSION / f"{table}.json").read_text())
        for table in ("scene", "sample", "sample_annotation", "instance", "category")
    }
    category = {row["token"]: row["name"] for row in rows["category"]}
    kind = {row["token"]: category[row["category_token"]] for row in rows["instance"]}
    held_out = {row["token"] for row in rows["scene"] if row["name"] != "scene-0061"}
    results: dict[str, list[dict[str, Any]]] = {
        row["token"]: [] for row in rows["sample"] if row["scene_token"] in held_out
    }
    spread, classes = 0.15 + 0.5 * (seed % 3), sorted(set(names.values()))
    for row in rows["sample_annotation"]:
        name = names.get(kind[row["instance_token"]])
        if (
            row["sample_token"] not in results
            or name is None
            or draw() < 0.15
            or (seed == 3 and name == "bus")
        ):
            continue
        for copy in range(1 + (draw() < 0.3)):
            score = 0.2 + 0.8 * draw() if copy == 0 else 0.5 * draw()
            yaw = (
                2 * math.atan2(row["rotation"][3], row["rotation"][0])
                + 0.5 * (draw() - 0.5)
                + math.pi * (draw() < 0.1)
            )
            results[row["sample_token"]].append(
                {
                    "sample_token": row["sample_token"],
                    "translation": [value + spread * (draw() - draw()) * 2 for value in row["translation"]],
                    "size": [value * (0.8 + 0.4 * draw()) for value in row["size"]],
                    "rotation": quaternion(yaw, 0.01 * draw()),
                    "velocity": [3 * draw(), math.nan if draw() < 0.05 else 3 * draw()],
                    "detection_name": name if draw() < 0.9 else classes[int(len(classes) * draw())],
                    "detection_score": round(score, 1) if seed % 2 == 0 else score,
                    "attribute_name": ATTRIBUTES[int(4 * draw())] if draw() < 0.9 else "",
                }
            )
    if seed == 5:
        for box in (box for boxes in results.values() for box in boxes):
            box["detection_score"] = 0.0
    return {
        "meta": {f"use_{one}": one == "lidar" for one in ("camera", "lidar", "radar", "map", "external")},
        "results": results,
    }
