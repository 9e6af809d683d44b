"""nuScenes from its tables: poses, sweeps, boxes and maps equal the devkit's; real frame and real tables; what is missing."""

from __future__ import annotations

import base64
import json
import math
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from projects.calico import nuscenes_infos
from projects.calico.frames import open_frames
from projects.calico.geometry import Grid, lidar_augmentation, points_in_boxes, pose
from projects.calico.maps import LAYERS, VectorMap, fill, map_file, of_frame, rasterise, read_map
from projects.calico.readers import mmdet3d
from projects.calico.readers.nuscenes import (
    CLASS_OF,
    CLASSES,
    INFO_VERSION,
    Infos,
    Tables,
    info_record,
    lidar2global,
    read_frame,
    read_labels,
    to_global,
)
from tests.projects.calico import tiny_nuscenes
from tests.projects.calico.frames import FRAMES, needs_frames
from vlmkd.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/nuscenes_devkit.json").read_text())
GRID = Grid((-50, -50, -5), (50, 50, 3), (0.5, 0.5, 8))
POLE = 10  # points of each sweep, the first ones


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_nuscenes.write(tmp_path_factory.mktemp("nuscenes"))
    from PIL import Image

    for camera in tiny_nuscenes.CAMERAS:
        (folder / "samples" / camera).mkdir()
        for scene in tiny_nuscenes.SCENES:
            for k in range(tiny_nuscenes.SAMPLES):
                Image.new("RGB", (1600, 900)).save(folder / f"samples/{camera}/{scene}_{k}.jpg", quality=1)
    return folder


@pytest.fixture(scope="module")
def infos(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Infos:
    return nuscenes_infos.build(root, tmp_path_factory.mktemp("infos") / "val.jsonl", "v1.0-mini", "mini_val")


@pytest.fixture
def record(infos: Infos) -> dict[str, Any]:
    """The sample that the devkit was asked for."""
    (found,) = [one for one in infos if one["token"] == GOLDEN["sample"]]
    return found


def test_boxes_and_velocities_equal_the_devkits(record: dict[str, Any]) -> None:
    ours = np.concatenate([record["boxes"], np.array(record["velocity"], float)], 1)
    theirs = np.array([[math.nan if value is None else value for value in row] for row in GOLDEN["boxes"]])
    theirs = theirs[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]  # they have w, l, h, and the velocity in the world
    turn = lidar2global(record)[:3, :3]
    theirs[:, 7:9] = (np.pad(theirs[:, 7:9], ((0, 0), (0, 1))) @ turn)[:, :2]
    assert np.isnan(theirs[:, 7]).any()
    assert np.allclose(ours, theirs, atol=1e-9, equal_nan=True)


def test_boxes_go_to_the_world_and_back(root: Path, record: dict[str, Any]) -> None:
    """`to_global` gives the annotations, exactly, though the LiDAR is tilted."""
    placed = to_global(
        np.concatenate([record["boxes"], np.array(record["velocity"], float)], 1), lidar2global(record)
    )
    rows = json.loads((root / "v1.0-mini/sample_annotation.json").read_text())
    rows = [row for row in rows if row["sample_token"] == record["token"]]
    assert np.allclose(placed[:, :3], [row["translation"] for row in rows], atol=1e-9)
    yaw = np.array([2 * math.atan2(row["rotation"][3], row["rotation"][0]) for row in rows])
    assert np.allclose(np.sin(placed[:, 6] - yaw), 0, atol=1e-9) and (np.cos(placed[:, 6] - yaw) > 0).all()


def test_sweeps_equal_the_devkits(root: Path, record: dict[str, Any]) -> None:
    """The devkit also takes the car's points from the key sweep, and has four numbers a point."""
    frame = read_frame(record, root, sweeps=8)
    assert len(record["sweeps"]) == 10 and frame.key.sum() == 60
    points = frame.points[(np.abs(frame.points[:, :2]) >= 1).any(1) | ~frame.key]
    assert len(points) == GOLDEN["sweeps"]["count"] < len(frame.points)
    assert points[:, :4].astype(float).sum(0) == pytest.approx(GOLDEN["sweeps"]["sum"], rel=1e-5, abs=0.01)
    assert np.unique(frame.points[:, 4]) == pytest.approx(GOLDEN["sweeps"]["lags"], abs=1e-6)


def test_a_pole_stays_in_place_while_the_car_moves(root: Path, record: dict[str, Any]) -> None:
    frame = read_frame(record, root)
    poles = (
        frame.points.reshape(-1, 5)[:POLE],
        *(frame.points[frame.points[:, 4] == lag][:POLE] for lag in np.unique(frame.points[:, 4])[1:]),
    )
    assert len(poles) == 10
    xy = np.concatenate([pole[:, :2] for pole in poles])
    assert (
        np.ptp(xy, axis=0).max() < 0.02 * 0.9 + 0.02
    )  # metres; the car drives 7 m, and the pole leans with the sensor
    assert frame.points[frame.key, 4].max() == 0 and frame.points[~frame.key, 4].min() == pytest.approx(0.1)


def test_sweeps_are_the_nearest_or_drawn_and_the_key_frame_stands_in(root: Path, infos: Infos) -> None:
    last, first = infos[3], infos[0]
    nearest = np.unique(read_frame(last, root, sweeps=3).points[:, 4])
    assert nearest == pytest.approx([0, 0.1, 0.2, 0.3])
    drawn = [
        np.unique(read_frame(last, root, sweeps=3, draw=np.random.default_rng(seed)).points[:, 4]).tolist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and max(drawn[0] + drawn[2]) > 0.35
    alone = read_frame(first, root, sweeps=3)
    far = (np.abs(alone.points[:60, :2]) >= 1).any(1).sum()
    assert first["sweeps"] == [] and alone.key.sum() == 60 and far < 60 and len(alone.points) == 60 + 3 * far
    assert (alone.points[:, 4] == 0).all() and (
        alone.points[60:] == np.tile(alone.points[:60][(np.abs(alone.points[:60, :2]) >= 1).any(1)], (3, 1))
    ).all()


def test_cameras_are_placed_at_their_own_time(record: dict[str, Any]) -> None:
    """A camera that took its picture earlier, while the car drove at 8 m/s, stands behind where it is mounted."""
    in_ego = np.array(record["lidar2ego"]) @ np.array(record["cams"]["CAM_FRONT_LEFT"]["cam2lidar"])
    behind = np.array(record["cams"]["CAM_FRONT_LEFT"]["cam2ego"]) - in_ego
    assert behind[0, 3] == pytest.approx(8 * 5 * 0.012, rel=0.1)
    assert np.allclose(
        np.array(record["lidar2ego"]) @ record["cams"]["CAM_FRONT"]["cam2lidar"],
        record["cams"]["CAM_FRONT"]["cam2ego"],
    )


def test_labels_are_boxes_of_the_ten_classes_with_points(root: Path, record: dict[str, Any]) -> None:
    labels = read_labels(record)
    counts = np.add(record["num_lidar_pts"], record["num_radar_pts"])
    assert 0 < len(labels.names) < (counts > 0).sum() < len(counts)
    assert set(labels.names) < set(CLASSES) and labels.boxes.shape == (len(labels.names), 9)
    assert read_frame(record, root).labels is None
    assert read_frame(record, root, labels=True).labels is not None


def test_info_files_are_built_once_and_resumed(
    root: Path, infos: Infos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [entry.token for entry in infos.entries] == [one["token"] for one in infos]
    assert [entry.scene for entry in infos.entries] == ["scene-0103"] * 4 + ["scene-0916"] * 4
    assert not nuscenes_infos.missing_files(infos, root)
    frames = open_frames(infos.path, root)
    assert list(frames.tokens) == [entry.token for entry in infos.entries]
    read, plain = frames.read(2, labels=True, cameras=False), read_frame(infos[2], root)
    assert np.array_equal(read.points, plain.points) and not read.cameras and len(plain.cameras) == 6
    assert read.labels is not None and plain.labels is None
    whole = infos.path.read_bytes()
    asked = []
    real = nuscenes_infos.info_record
    monkeypatch.setattr(
        nuscenes_infos, "info_record", lambda *args: asked.append(args[1]["token"]) or real(*args)
    )
    (tmp_path / "again.jsonl.partial").write_bytes(whole[: len(whole) * 2 // 3])
    nuscenes_infos.build(root, tmp_path / "again.jsonl", "v1.0-mini", "mini_val")
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    assert 0 < len(asked) < 8


def test_past_sweeps_that_the_file_was_not_written_with_are_refused(root: Path, tmp_path: Path) -> None:
    infos = nuscenes_infos.build(root, tmp_path / "few.jsonl", "v1.0-mini", "mini_val", sweeps=2)
    assert len(open_frames(infos.path, root, sweeps=2).read(3).points) > 60
    with pytest.raises(
        UserError, match="data.sweeps is 9, but .*few.jsonl has 2 past sweeps.*; set it to 2, or"
    ):
        open_frames(infos.path, root)


def test_classes_are_drawn_by_boxes_that_hold_a_point(root: Path, infos: Infos) -> None:
    frames = open_frames(infos.path, root)
    own = [set(read_labels(one).names) for one in infos]
    assert [set(frames.classes(index)) for index in range(8)] == own
    every = [{CLASS_OF[name] for name in one["names"] if name in CLASS_OF} for one in infos]
    assert any(some < whole for some, whole in zip(own, every, strict=True))


def test_the_command_says_what_is_missing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    command = [str(copy), str(tmp_path / "val.jsonl"), "--split", "mini_val"]
    (copy / "maps/expansion/boston-seaport.json").unlink()
    assert nuscenes_infos.main(command) == 0
    assert "map expansion (v1.3): maps/expansion/boston-seaport.json missing" in capsys.readouterr().out
    (copy / "sweeps/LIDAR_TOP/scene-0103_4.pcd.bin").unlink()
    with pytest.raises(
        UserError, match="1 files below .* are missing, first sweeps/LIDAR_TOP/scene-0103_4.pcd.bin"
    ):
        nuscenes_infos.main(command)
    infos = Infos(tmp_path / "val.jsonl")
    with pytest.raises(UserError, match="LiDAR sweep .*scene-0103_4.pcd.bin does not exist; fetch"):
        read_frame(infos[1], copy)
    with pytest.raises(UserError, match="v1.0-mini has 1 of the 8 scenes of mini_train, not scene-0553"):
        nuscenes_infos.main([*command[:2], "--split", "mini_train"])


def _edit(table: str, row: int, field: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        rows = json.loads((folder / f"{table}.json").read_text())
        rows[row][field] = value
        (folder / f"{table}.json").write_text(json.dumps(rows))

    return edit


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            _edit("sample_data", 3, "ego_pose_token", "gone"),
            "of sample_data names ego_pose 'gone', which is not there",
        ),
        (_edit("calibrated_sensor", 2, "sensor_token", "gone"), "of calibrated_sensor names sensor 'gone'"),
        (
            _edit("sample_annotation", 0, "instance_token", "gone"),
            "of sample_annotation names instance 'gone'",
        ),
        (_edit("sample_annotation", 2, "sample_token", "gone"), "of sample_annotation names sample 'gone'"),
        (_edit("scene", 0, "first_sample_token", "gone"), "of scene names sample 'gone'"),
        (lambda folder: (folder / "sensor.json").unlink(), "sensor.json does not exist; fetch the metadata"),
        (lambda folder: (folder / "scene.json").write_text('[{"token": "a"}, {'), "scene.json is not usable"),
        (lambda folder: (folder / "scene.json").write_text('{"token": "a"}'), "scene.json is not usable"),
        (lambda folder: shutil.rmtree(folder), "has no folder v1.0-mini"),
    ],
)
def test_damaged_tables_are_named(
    root: Path, tmp_path: Path, damage: Callable[[Path], Any], told: str
) -> None:
    shutil.copytree(root / "v1.0-mini", tmp_path / "v1.0-mini")
    damage(tmp_path / "v1.0-mini")
    with pytest.raises(UserError) as caught:
        tables = Tables(tmp_path, "v1.0-mini")
        for samples in tables.scenes().values():
            for sample in samples:
                info_record(tables, sample)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            '{"dataset": "nuscenes", "info_version": 7}',
            f"version 7; this reader knows nuscenes, version {INFO_VERSION}",
        ),
        ('{"dataset": "kitti", "info_version": 1}', "data set 'kitti'"),
        ("[1]", "line 1 is no JSON object"),
        ('{"dataset": "nuscenes", "info_version": 1}\n{"token": "a"}', "line 2 has no 'scene'"),
    ],
)
def test_other_info_files_are_refused(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        Infos(tmp_path / "x.jsonl")
    assert told in str(caught.value)


# ------------------------------------------------------------------------------------------------------- real tables


@needs_frames
def test_real_tables_of_the_schema(tmp_path: Path) -> None:
    """One scene cut to one sample: its own links hold, those to its neighbours dangle."""
    shutil.copytree(FRAMES / "nuscenes_schema_lyft", tmp_path / "v1")
    tables = Tables(tmp_path, "v1")
    (token,) = tables.data
    sample = tables.rows["sample"][token]
    with pytest.raises(UserError, match="of sample_data names sample_data '.*', which is not there"):
        info_record(tables, sample, sweeps=10)
    with pytest.raises(UserError, match="of scene names sample '.*', which is not there"):
        tables.scenes()
    for row in tables.annotations[token]:
        row["prev"] = row["next"] = ""
    found = info_record(tables, sample, sweeps=0)
    assert len(found["cams"]) == 7 and found["location"] == "Palo Alto" and len(found["boxes"]) == 4
    assert found["names"][0] == "car" and found["velocity"] == [[None, None]] * 4
    # Boxes of the world, through the inverse of the poses, keep their distance from the sensor.
    row = tables.annotations[token][0]
    apart = np.linalg.norm(np.subtract(row["translation"], lidar2global(found)[:3, 3]))
    assert np.linalg.norm(found["boxes"][0][:3]) == pytest.approx(apart)


@needs_frames
def test_the_real_frame_through_mmdetections_info_file() -> None:
    safe = mmdet3d.read_infos(FRAMES / "nuscenes/info_mmdet3d_v1.1.pkl")
    stored = mmdet3d.read_infos(FRAMES / "nuscenes/info.json")
    ours = mmdet3d.nuscenes_record(stored, folders=False)
    named = mmdet3d.nuscenes_record(safe)
    for field in ("token", "timestamp", "lidar2ego", "ego2global", "boxes", "names", "num_lidar_pts"):
        assert ours[field] == named[field]
    assert named["cams"]["CAM_FRONT"]["path"].startswith("samples/CAM_FRONT/n015")
    frame = read_frame(ours, FRAMES / "nuscenes", sweeps=0, labels=True)
    assert frame.points.shape == (34688, 5) and frame.key.all() and not frame.points[:, 4].any()
    opened = open_frames(FRAMES / "nuscenes", sweeps=0)
    assert opened.kind == "nuscenes" and list(opened.tokens) == [frame.token]
    again = opened.read(0)
    assert again.labels is None and (again.points[again.key] == frame.points).all()
    assert again.scene == opened.scenes[0] == frame.token  # the file tells no drive
    with pytest.raises(UserError, match="data.sweeps is 9, but info file .*info.json has 0 past sweeps"):
        open_frames(FRAMES / "nuscenes")
    seen = {name: int((depth > 1).sum()) for name, (_, depth) in frame.pixels(frame.points).items()}
    assert (
        len(seen) == 6
        and min(seen.values()) >= 3000
        and (seen["CAM_FRONT"], seen["CAM_BACK"]) == (3067, 4826)
    )
    assert frame.labels is not None and set(frame.labels.names) <= set(CLASSES)
    inside = (
        points_in_boxes(frame.points.astype(np.float64), frame.labels.boxes.astype(np.float64)).sum(0).numpy()
    )
    off = np.abs(inside - frame.labels.num_points)
    assert (off == 0).mean() >= 0.85 and off.max() <= 16


@needs_frames
def test_the_real_kitti_pickle_is_read_as_data() -> None:
    found = mmdet3d.read_infos(FRAMES / "kitti/info_mmdet3d_v1.1.pkl")
    assert len(found["data_list"][0]["instances"]) == 10


class _Bomb:
    def __reduce__(self) -> Any:
        import os

        return os.mkdir, ("bomb",)


def test_pickles_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    head = {"metainfo": {"info_version": "1.1"}}
    values = {
        "a": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "s": np.float32(0.5),
        "b": np.array([True]),
        "big": np.arange(3, dtype=">i4"),
    }
    for protocol in range(2, 5):
        (tmp_path / "ok.pkl").write_bytes(pickle.dumps(head | {"data_list": [values]}, protocol))
        (found,) = mmdet3d.read_infos(tmp_path / "ok.pkl")["data_list"]
        assert found == {
            "a": [[0, 1, 2], [3, 4, 5]],
            "f": [[0, 1, 2], [3, 4, 5]],
            "s": 0.5,
            "b": [True],
            "big": [0, 1, 2],
        }
    for content, told in (
        (_Bomb(), "mkdir, which is code and no data"),
        ({"data_list": np.array([None])}, "is no number"),
        ({"metainfo": {"info_version": "2.0"}, "data_list": [1]}, "info version '2.0'; 1.1 is read"),
        ([], "no data_list"),
    ):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError) as caught:
            mmdet3d.read_infos(tmp_path / "bad.pkl")
        assert told in str(caught.value)
    nested: list[Any] = []
    for _ in range(60):  # a few bytes that unfold to 2^60 lists
        nested = [nested, nested]
    (tmp_path / "ok.pkl").write_bytes(pickle.dumps(head | {"data_list": nested}))
    assert len(mmdet3d.read_infos(tmp_path / "ok.pkl")["data_list"]) == 2
    good = pickle.dumps(head | {"data_list": [values]})
    for end in range(0, len(good) - 1, 37):
        (tmp_path / "cut.pkl").write_bytes(good[:end])
        with pytest.raises(UserError):
            mmdet3d.read_infos(tmp_path / "cut.pkl")
    assert not (tmp_path / "bomb").exists()


# --------------------------------------------------------------------------------------------------------------- maps


def test_maps_equal_the_devkits_but_for_its_rounding(root: Path, infos: Infos) -> None:
    """The devkit rounds corners of areas to whole pixels and draws their edges too, all half a cell to the side.

    What differs lies at edges, and in the holes that it cuts into other areas.
    """
    masks = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(GOLDEN["map"]["masks"])), np.uint8))
    theirs = masks.reshape(7, 200, 200).astype(bool).transpose(0, 2, 1)  # they have [y, x]
    theirs = np.concatenate([theirs[:5], theirs[5:].any(0, keepdims=True)])
    (record,) = [one for one in infos if one["token"] == GOLDEN["sample"]]
    ego = np.array(record["ego2global"])[:3, 3]
    flat = lidar_augmentation(math.radians(-GOLDEN["map"]["angle"])).numpy()
    flat[:2, 3] = -flat[:2, :2] @ ego[:2]
    world = read_map(root, "boston-seaport")
    ours = rasterise(world, flat, Grid((-50.25, -50.25, -5), (49.75, 49.75, 3), (0.5, 0.5, 8)))
    ours[-1] = rasterise(world, flat, GRID, layers=("divider",))[0]
    assert ours.any((1, 2)).all()
    for layer, mine, other in zip(LAYERS, ours, theirs, strict=True):
        wide = np.zeros_like(mine)
        padded = np.pad(mine, 1)
        for i in range(3):
            for j in range(3):
                wide |= padded[i : i + 200, j : j + 200]
        assert not (other & ~wide).any(), layer
        assert (mine & other).sum() / (mine | other).sum() > 0.85, layer


def test_fill_is_exact() -> None:
    """Every cell centre against the crossing-number rule, in plain Python."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        rings = [rng.uniform(-5, 25, (rng.integers(3, 9), 2)) for _ in range(rng.integers(1, 3))]
        found = fill(rings, (20, 17))
        for i in range(20):
            for j in range(17):
                crossings = 0
                for ring in rings:
                    for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, 0), strict=True):
                        if (ax <= i + 0.5) != (bx <= i + 0.5):
                            crossings += ay + (i + 0.5 - ax) * (by - ay) / (bx - ax) < j + 0.5
                assert found[i, j] == crossings % 2


def test_a_map_follows_turn_flip_scale_and_shift(root: Path, infos: Infos) -> None:
    """Cells of the augmented frame hold what the world holds there: each compared with the same point, taken back."""
    record, world = infos[5], read_map(root, "singapore-onenorth")
    aug = lidar_augmentation(0.4, 1.08, flip_y=True, shift=(1.0, -2.0, 0.0)).numpy()
    plain = np.linalg.inv(lidar2global(record))
    fine = Grid((-60, -60, -5), (60, 60, 3), (0.25, 0.25, 8))
    frame = read_frame(record, root, cameras=False)
    before, after = of_frame(world, frame, fine), of_frame(world, frame, GRID, aug)
    assert (before == rasterise(world, plain, fine)).all()
    i, j = np.indices((200, 200))
    centres = np.stack([i * 0.5 - 49.75, j * 0.5 - 49.75, 0 * i, 0 * i + 1.0], -1)
    centres[..., 2] = (aug @ plain)[2, 3]  # the ground
    back = centres @ np.linalg.inv(aug).T
    inside = (np.abs(back[..., :2]) < 59).all(-1)
    x, y = (np.clip(np.floor((back[..., axis] + 60) / 0.25).astype(int), 0, 479) for axis in (0, 1))
    for layer in range(5):
        expected = before[layer][x, y]
        assert (expected == after[layer])[inside].mean() > 0.99
        assert (expected & after[layer])[inside].sum() / (expected | after[layer])[inside].sum() > 0.9


def test_missing_and_old_maps_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="needs maps/expansion/boston-seaport.json, .*-queenstown.json below .*fetch nuScenes' map expansion",
    ):
        read_map(tmp_path, "boston-seaport")
    file = map_file(tmp_path, "boston-seaport")
    file.parent.mkdir(parents=True)
    file.write_text('{"version": "1.2"}')
    with pytest.raises(UserError, match="of version 1.2; fetch map expansion v1.3"):
        read_map(tmp_path, "boston-seaport")
    content = tiny_nuscenes.vector_map()
    content["node"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="lacks 'n[0-9]+'; fetch"):
        read_map(tmp_path, "boston-seaport")


@needs_frames
def test_a_real_map_has_the_car_on_the_road() -> None:
    """Argoverse 2: exactly one drivable area holds the car, and most annotated vehicles stand on the road."""
    content = json.loads((FRAMES / "av2/map_PIT_city_47896.json").read_text())

    def ring(points: list[dict[str, float]]) -> list[np.ndarray]:
        return [np.array([(point["x"], point["y"]) for point in points])]

    drivable = [ring(one["area_boundary"]) for one in content["drivable_areas"].values()]
    crossed = [ring(one["edge1"] + one["edge2"][::-1]) for one in content["pedestrian_crossings"].values()]
    world = VectorMap({"drivable_area": drivable, "ped_crossing": crossed}, {})
    sweep = json.loads((FRAMES / "av2/annotations_calib.json").read_text())["sweeps"]["0"]
    at = sweep["city_SE3_egovehicle"]
    to_bev = np.linalg.inv(
        pose([at[f"q{one}"] for one in "wxyz"], [at[f"t{one}_m"] for one in "xyz"]).numpy()
    )
    fine = Grid((-60, -60, -5), (60, 60, 3), (0.25, 0.25, 8))
    areas = world.areas["drivable_area"]
    crossings = world.areas["ped_crossing"]
    assert len(areas) == 13 and len(crossings) == 11 and all(ring.shape == (4, 2) for (ring,) in crossings)
    each = [
        rasterise(VectorMap({"drivable_area": [area]}, {}), to_bev, fine, ground=at["tz_m"])[0]
        for area in areas
    ]
    assert sum(int(mask[240, 240]) for mask in each) == 1
    road = rasterise(world, to_bev, fine, ground=at["tz_m"], layers=("drivable_area", "ped_crossing"))
    assert road[1].any() and (road[0] == np.any(each, 0)).all()
    cars = [(box["tx_m"], box["ty_m"]) for box in sweep["boxes"] if box["category"] == "REGULAR_VEHICLE"]
    cells = ((np.array(cars) + 60) / 0.25).astype(int)
    cells = cells[((cells >= 0) & (cells < 480)).all(1)]
    assert len(cells) == 19 and road[0][cells[:, 0], cells[:, 1]].mean() > 0.9
