"""Readers of KITTI and Argoverse 2 on the real frames, and on files that are not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from projects.calico.frames import open_frames
from projects.calico.geometry import points_in_boxes
from projects.calico.readers.argoverse import ArgoverseFrames
from projects.calico.readers.files import read_arrays
from tests.projects.calico.frames import FRAMES, needs_frames
from vlmkd.errors import UserError


@needs_frames
def test_the_nuscenes_frame() -> None:
    frames = open_frames(FRAMES / "nuscenes", sweeps=0)
    frame = frames.read(0, labels=True)
    assert frames.kind == "nuscenes" and len(frames.tokens) == 1 and frame.points.shape == (34688, 5)
    seen = {name: int((depth > 1).sum()) for name, (_, depth) in frame.pixels(frame.points).items()}
    assert len(seen) == 6 and min(seen.values()) == seen["CAM_FRONT"] == 3067 and seen["CAM_BACK"] == 4826
    assert frame.labels is not None and set(frame.labels.names) >= {"car", "pedestrian", "barrier"}
    middles = frame.pixels(frame.labels.boxes)
    assert sum((depth > 0).sum() for _, depth in middles.values()) >= 0.9 * len(frame.labels.boxes)
    bare = frames.read(0, cameras=False)
    assert not bare.cameras and bare.labels is None
    with pytest.raises(UserError, match="LIDAR_TOP.* does not exist"):  # where the whole data set has it
        open_frames(FRAMES / "nuscenes/info_mmdet3d_v1.1.pkl", sweeps=0).read(0)


@needs_frames
def test_argoverse_boxes_hold_exactly_the_stated_points() -> None:
    frames = open_frames(FRAMES / "av2")
    assert frames.kind == "av2" and list(frames.tokens) == ["sweep_0", "sweep_1"]
    assert list(frames.scenes) == [frames.read(0).scene] * 2  # one drive
    for index, size in enumerate((99229, 99466)):
        frame = frames.read(index, labels=True)
        assert (
            frame.points.shape == (size, 5) and frame.key.all() and not frame.cameras and frame.dropped == 0
        )
        assert frame.labels is not None and len(frame.labels.boxes) == 81
        counted = points_in_boxes(frame.points.astype(np.float64), frame.labels.boxes.astype(np.float64)).sum(
            0
        )
        if index == 0:
            assert counted.tolist() == frame.labels.num_points.tolist() and counted.sum() == 9399
        assert np.isnan(frame.labels.boxes[:, 7:]).all() and frame.labels.names[0] == "BICYCLE"
    assert frames.read(0).labels is None


@needs_frames
def test_argoverse_static_points_follow_the_ego_motion() -> None:
    frames = open_frames(FRAMES / "av2")
    first, second = frames.read(0), frames.read(1)
    flow = read_arrays(FRAMES / "av2/flow_labels_sweep_0.npz", "flow")
    motion = np.linalg.inv(second.ego2global) @ first.ego2global
    points = first.points[:, :3].astype(np.float64)
    expected = points @ motion[:3, :3].T + motion[:3, 3] - points
    error = np.linalg.norm(flow["flow_m"].astype(np.float64) - expected, axis=1)
    near = np.linalg.norm(points[:, :2], axis=1) < 60
    still = near & ~flow["dynamic"].astype(bool)
    assert np.median(error[still]) < 0.001 and error[still].max() < 0.06
    assert np.median(error[near & flow["dynamic"].astype(bool)]) > 0.5


@pytest.fixture
def argoverse_log(tmp_path: Path) -> Path:
    """The frames in the layout of the release, with a picture that was taken 20 ms after the first sweep."""
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    known = json.loads((FRAMES / "av2/annotations_calib.json").read_text())
    folder = tmp_path / known["log_id"]
    for name in ("sensors/lidar", "sensors/cameras/ring_front_center", "calibration"):
        (folder / name).mkdir(parents=True)

    def write(path: str, rows: list[dict[str, Any]]) -> None:
        feather.write_feather(pyarrow.Table.from_pylist(rows), folder / path)

    poses, boxes = [], []
    for number, sweep in known["sweeps"].items():
        time = {"timestamp_ns": sweep["timestamp_ns"]}
        poses.append(time | sweep["city_SE3_egovehicle"])
        boxes += [time | box for box in sweep["boxes"]]
        table = read_arrays(FRAMES / f"av2/sweep_{number}.npz", "sweep")
        columns = dict(zip("xyz", table["xyz"].T, strict=True)) | {"intensity": table["intensity"]}
        columns = {name: pyarrow.array(np.ascontiguousarray(column)) for name, column in columns.items()}
        feather.write_feather(
            pyarrow.table(columns), folder / f"sensors/lidar/{sweep['timestamp_ns']}.feather"
        )
    shot = poses[0]["timestamp_ns"] + 20_000_000
    poses.append(poses[0] | {"timestamp_ns": shot, "tx_m": poses[0]["tx_m"] + 0.3})
    write("city_SE3_egovehicle.feather", poses)
    write("annotations.feather", boxes)
    for name, rows in known["calibration"].items():
        write(f"calibration/{name}.feather", rows)
    Image.new("RGB", (1550, 2048)).save(folder / f"sensors/cameras/ring_front_center/{shot}.jpg")
    return folder


@needs_frames
def test_argoverse_logs_give_what_the_other_formats_give(argoverse_log: Path) -> None:
    frames, known = ArgoverseFrames(argoverse_log), ArgoverseFrames(FRAMES / "av2")
    assert open_frames(argoverse_log).tokens == frames.tokens == ["315966265259836000", "315966265360032000"]
    for index in (0, 1):
        one, other = frames.read(index, labels=True), known.read(index, labels=True)
        assert np.array_equal(one.points, other.points) and np.array_equal(one.ego2global, other.ego2global)
        assert one.labels is not None and other.labels is not None
        np.testing.assert_array_equal(one.labels.boxes, other.labels.boxes)
        assert one.labels.names == other.labels.names and one.scene == other.scene
    first = frames.read(0)
    assert list(first.cameras) == ["ring_front_center"] and not frames.read(1).cameras  # too far in time
    moved = np.linalg.inv(first.ego2global)[:3, :3] @ [0.3, 0, 0]
    mount = first.cameras["ring_front_center"].cam2lidar
    np.testing.assert_allclose(mount[:3, 3], [1.635017, 0.002676, 1.397967] + moved, atol=1e-5)
    assert first.pixels(np.array([[20.0, 0, 1]]))["ring_front_center"][1][0] == pytest.approx(18.4, abs=0.5)


@needs_frames
def test_argoverse_logs_that_are_not_whole(argoverse_log: Path) -> None:
    (argoverse_log / "annotations.feather").unlink()
    bare = ArgoverseFrames(argoverse_log).read(0, labels=True).labels
    assert bare is not None and len(bare.boxes) == 0
    sweep = argoverse_log / "sensors/lidar/315966265259836000.feather"
    sweep.write_bytes(sweep.read_bytes()[:1000])
    with pytest.raises(UserError, match="Argoverse table .*315966265259836000.feather is damaged"):
        ArgoverseFrames(argoverse_log).read(0)
    (argoverse_log / "calibration/intrinsics.feather").unlink()
    with pytest.raises(UserError, match="intrinsics.feather does not exist"):
        ArgoverseFrames(argoverse_log).read(0)


@needs_frames
def test_kitti_info_file() -> None:
    frames = open_frames(FRAMES / "kitti")
    frame = frames.read(0, labels=True)
    assert frames.tokens == ["000008"] and frame.points.shape == (17238, 5) and frame.points[:, 4].max() == 0
    assert 0 <= frame.points[:, 3].min() and frame.points[:, 3].max() <= 1
    (_, depth) = frame.pixels(frame.points)["CAM2"]
    assert (depth > 0).all()  # every point is inside the picture
    assert frame.labels is not None and frame.labels.names == ("Car",) * 6
    assert np.abs(frame.labels.num_points - [1325, 1900, 881, 659, 55, 162]).max() <= 1
    assert frame.cameras["CAM2"].load().shape == (375, 1242, 3)
    info = json.loads((FRAMES / "kitti/info.json").read_text())["data_list"][0]["images"]["CAM2"]
    direct = np.column_stack([frame.points[:, :3], np.ones(17238)]) @ np.array(info["lidar2img"]).T
    pixels = frame.pixels(frame.points)["CAM2"][0]
    assert np.abs(pixels - direct[:, :2] / direct[:, 2:3]).max() < 0.01
    bare = frames.read(0, cameras=False)
    assert bare.labels is None and not bare.cameras


@pytest.fixture
def kitti_folder(tmp_path: Path) -> Path:
    """The frame in KITTI's own layout."""
    info = json.loads((FRAMES / "kitti/info.json").read_text())["data_list"][0]
    base = tmp_path / "kitti/training"
    for folder in ("velodyne", "image_2", "calib", "label_2"):
        (base / folder).mkdir(parents=True)
    shutil.copy(FRAMES / "kitti/000008.bin", base / "velodyne")
    shutil.copy(FRAMES / "kitti/000008.png", base / "image_2")
    camera = info["images"]["CAM2"]
    matrices = {
        "P2": np.array(camera["cam2img"])[:3],
        "R0_rect": np.array(info["images"]["R0_rect"])[:3, :3],
        "Tr_velo_to_cam": np.array(info["lidar_points"]["Tr_velo_to_cam"])[:3],
    }
    lines = [f"{key}: {' '.join(map(repr, value.ravel().tolist()))}" for key, value in matrices.items()]
    (base / "calib/000008.txt").write_text("\n".join(lines) + "\n")
    rows = []
    for thing in info["instances"]:
        x, y, z, length, height, width, ry = thing["bbox_3d"]
        name = "Car" if thing["bbox_label_3d"] == 2 else "DontCare"
        rows.append(f"{name} 0.88 3 -0.69 0 1 2 3 {height} {width} {length} {x} {y} {z} {ry}")
    (base / "label_2/000008.txt").write_text("\n".join(rows) + "\n")
    return tmp_path / "kitti"


@needs_frames
def test_kitti_folders_give_what_the_info_file_gives(kitti_folder: Path) -> None:
    frames, known = open_frames(kitti_folder), open_frames(FRAMES / "kitti")
    one, other = frames.read(0, labels=True), known.read(0, labels=True)
    assert frames.tokens == ["000008"] and np.array_equal(one.points, other.points)
    assert one.labels is not None and other.labels is not None
    np.testing.assert_allclose(one.labels.boxes, other.labels.boxes, atol=1e-5)
    np.testing.assert_allclose(one.cameras["CAM2"].cam2lidar, other.cameras["CAM2"].cam2lidar, atol=1e-6)
    shutil.rmtree(kitti_folder / "training/label_2")
    unlabelled = frames.read(0, labels=True).labels
    assert unlabelled is not None and len(unlabelled.boxes) == 0


@needs_frames
def test_kitti_files_that_are_not_whole(kitti_folder: Path) -> None:
    base = kitti_folder / "training"
    frames = open_frames(kitti_folder)
    (base / "label_2/000008.txt").write_text("Car 0 0 0 0 1 2 3 1.5 x 4 1 2 3 0\n")
    with pytest.raises(UserError, match="KITTI labels .* are damaged"):
        frames.read(0, labels=True)
    (base / "calib/000008.txt").write_text("P2: 1 2 3\n")
    with pytest.raises(UserError, match="KITTI calibration .* has no usable P2"):
        frames.read(0)
    shutil.copytree(FRAMES / "kitti", kitti_folder / "info")
    sweep = kitti_folder / "info/000008.bin"
    sweep.chmod(0o644)
    sweep.write_bytes(sweep.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"LiDAR sweep .*000008.bin is cut off|rows of four"):
        sweep.write_bytes(sweep.read_bytes()[:-6])
        open_frames(kitti_folder / "info").read(0)
    sweep.write_bytes(b"")
    with pytest.raises(UserError, match="frame 000008: the key sweep is empty"):
        open_frames(kitti_folder / "info").read(0)
    sweep.unlink()
    with pytest.raises(UserError, match="LiDAR sweep .*000008.bin does not exist"):
        open_frames(kitti_folder / "info").read(0)


def test_paths_that_nothing_reads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is none of: a folder of KITTI"):
        open_frames(tmp_path)
    with pytest.raises(UserError, match="does not exist, and is none of"):
        open_frames(tmp_path / "missing")
    (tmp_path / "velodyne").mkdir()
    with pytest.raises(UserError, match="holds no .bin files"):
        open_frames(tmp_path)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK")
    with pytest.raises(UserError, match="Argoverse table .* is damaged"):
        read_arrays(broken, "Argoverse table")
    np.savez(broken, xyz=np.zeros((1, 3)))
    with pytest.raises(
        UserError, match=r"Argoverse table .*broken.npz has no intensity; delete it, and fetch"
    ):
        read_arrays(broken, "Argoverse table", needs=("xyz", "intensity"))
