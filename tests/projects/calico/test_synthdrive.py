"""The small world: what it must look like, that it is one function of a scene's number, and what lies on disk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from projects.calico import synthdrive as drive
from projects.calico.frames import open_frames
from projects.calico.geometry import box_corners, points_in_boxes
from projects.calico.regions import PRESETS, gpf, regions_of
from projects.calico.scenes import Frame, Labels
from vlmkd.errors import UserError


def labels_of(frame: Frame) -> Labels:
    assert frame.labels is not None and frame.labels.instance is not None and frame.labels.ground is not None
    return frame.labels


def test_statistics_of_scenes() -> None:
    points, objects, regions, ground, matched, names = [], [], [], [], [], []
    for scene in range(40):
        frame = drive.generate(scene, image_size=(0, 0))
        labels = labels_of(frame)
        assert labels.instance is not None and labels.ground is not None and not frame.cameras
        found = regions_of(frame, PRESETS["default"])
        points.append(len(frame.points))
        objects.append(len(labels.names))
        regions.append(found.count)
        names += labels.names
        near = (np.abs(frame.points[:, :2]) < drive.HALF_RANGE).all(1)
        flat, truth = gpf(frame.points, drive.HEIGHT, "x")[near], labels.ground[near]
        ground.append((flat & truth).sum() / (flat | truth).sum())
        for thing in range(len(labels.names)):
            own = labels.instance == thing
            if own.sum() >= 5:
                ious = [
                    (own & (found.region == r)).sum() / (own | (found.region == r)).sum()
                    for r in range(found.count)
                ]
                matched.append(max(ious, default=0) > 0.5)
    assert 5000 < np.mean(points) < 6000
    assert 9.0 < np.mean(objects) < 10.3 and min(objects) >= 5 and max(objects) <= 13
    assert 10.8 < np.mean(regions) < 13
    assert np.mean(ground) >= 0.97
    assert np.mean(matched) >= 0.75 and len(matched) > 250
    for name, kind in drive.KINDS.items():
        assert names.count(name) / len(names) == pytest.approx(kind.share, abs=0.06), name


@pytest.mark.parametrize("scene", range(3))
def test_solids_stand_apart_on_the_ground(scene: int) -> None:
    world = drive.build_world(scene)
    boxes = world.boxes
    bottom = boxes[:, 2] - boxes[:, 5] / 2
    np.testing.assert_allclose(bottom, -1.8 + boxes[:, :2] @ world.slope, atol=1e-9)
    assert np.abs(world.slope).max() <= 0.02
    edges = []
    for corners in box_corners(boxes).numpy()[:, :4, :2]:
        steps = np.linspace(0, 1, 60)[:, None]
        edges.append(
            np.concatenate(
                [a + steps * (b - a) for a, b in zip(corners, np.roll(corners, 1, 0), strict=True)]
            )
        )
    for n, one in enumerate(edges):
        assert np.linalg.norm(one, axis=1).min() > 2.99
        for other in edges[:n]:
            assert np.linalg.norm(one[:, None] - other[None], axis=-1).min() > 0.59
    yaw = world.road[0]
    aligned = np.abs(np.sin(boxes[: world.labelled, 6] - yaw)) < 1e-6
    assert 0.3 < aligned.mean() <= 1
    moving = np.hypot(boxes[:, 7], boxes[:, 8])
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
    np.testing.assert_allclose(boxes[:, 7:], moving[:, None] * heading, atol=1e-9)


def march(origin: np.ndarray, ray: np.ndarray, boxes: np.ndarray, slope: np.ndarray) -> tuple[float, int]:
    """The ray caster's answer by small steps."""
    steps = np.arange(0, 61, 0.005)
    points = origin + steps[:, None] * ray
    inside = points_in_boxes(points, boxes).numpy()
    below = points[:, 2] < -drive.HEIGHT + points[:, :2] @ slope
    met = np.flatnonzero(inside.any(1) | below)
    if not len(met):
        return math.inf, drive.SKY
    return float(steps[met[0]]), int(inside[met[0]].argmax()) if inside[met[0]].any() else drive.GROUND


def test_the_ray_caster_meets_what_small_steps_meet() -> None:
    world = drive.build_world(5)
    rng = np.random.default_rng(0)
    elevation, azimuth = np.radians(rng.uniform(-25, 8, 150)), rng.uniform(0, 2 * math.pi, 150)
    rays = np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], 1
    )
    rays[0] = [1, 0, 0]
    origin = np.array([0.1, 0.2, 0.05])
    distance, solid, face = drive.cast(origin, rays, world.bodies(), world.slope)
    kinds = set()
    for n, ray in enumerate(rays):
        far, met = march(origin, ray, world.bodies(), world.slope)
        if distance[n] > 60.9:
            assert met in (drive.SKY, drive.GROUND)
            continue
        assert abs(far - distance[n]) < 0.01 and met == solid[n], n
        kinds.add(int(np.sign(met)))
        if met >= 0:  # it enters through the named face
            box = world.bodies()[met]
            local = origin + distance[n] * ray - box[:3]
            cos, sin = math.cos(box[6]), math.sin(box[6])
            local = np.array([cos * local[0] + sin * local[1], cos * local[1] - sin * local[0], local[2]])
            assert abs(abs(local[face[n]]) - box[3 + face[n]] / 2) < 1e-6
    assert kinds >= {-1, 1}


def test_labels_say_what_the_points_lie_on() -> None:
    world, frame = drive.build_world(3), drive.generate(3)
    labels = labels_of(frame)
    assert labels.instance is not None and labels.ground is not None
    grown = labels.boxes.copy().astype(np.float64)
    grown[:, 3:6] += 0.25  # noise of the range
    inside = points_in_boxes(frame.points.astype(np.float64), grown).numpy()
    rows = np.flatnonzero(labels.instance >= 0)
    assert inside[rows, labels.instance[rows]].all()
    assert labels.num_points.tolist() == [(labels.instance == n).sum() for n in range(len(labels.names))]
    height = frame.points[:, 2] - (-1.8 + frame.points[:, :2] @ world.slope)
    assert np.abs(height[labels.ground]).max() < 0.15 and not (labels.ground & (labels.instance >= 0)).any()
    assert frame.points[:, 3].min() >= 0 and frame.points[:, 3].max() <= 1 and frame.points[:, 4].max() == 0
    assert np.linalg.norm(frame.points[:, :3], axis=1).max() <= 60.2 and frame.key.all()


def test_pixels_and_points_are_of_the_same_things() -> None:
    """A point, projected, meets in the picture what it lies on: colours agree but for edges."""
    frame, world = drive.generate(2, image_size=(160, 320)), drive.build_world(2)
    labels = labels_of(frame)
    assert labels.instance is not None
    own = np.array([drive.KINDS[kind].colour for kind in world.kinds]) + world.tints
    near, shaded = [], np.array([0.75, 1.0, 1.15])
    for name, (uv, depth) in frame.pixels(frame.points).items():
        image = frame.cameras[name].load() / 255
        seen = (depth > 0) & (depth < 12) & (labels.instance >= 0)
        v, u = (
            np.clip(np.round(uv[seen, 1]).astype(int), 0, 159),
            np.clip(np.round(uv[seen, 0]).astype(int), 0, 319),
        )
        fog = np.exp(-depth[seen] / 50)[:, None]
        clear = (image[v, u] - (1 - fog) * [0.65, 0.75, 0.9]) / fog
        colours = np.clip(own[labels.instance[seen]][:, None] * shaded[:, None], 0, 1)
        near += (np.abs(clear[:, None] - colours).max(-1).min(1) < 0.12).tolist()
    assert len(near) > 200 and np.mean(near) > 0.9


def test_map_layers_follow_the_road() -> None:
    world, labels = drive.build_world(7), labels_of(drive.generate(7, image_size=(0, 0)))
    masks = labels.masks
    assert tuple(masks) == drive.MAP_LAYERS and all(
        m.shape == (96, 96) and m.dtype == bool for m in masks.values()
    )
    assert (masks["crossing"] <= masks["road"]).all() and not (masks["walkway"] & masks["road"]).any()
    yaw, left, ahead = world.road
    for along, across, expected in (
        (ahead, left, "crossing"),
        (ahead + 3, left + 3, "road"),
        (ahead - 2, left - 5, "walkway"),
    ):
        x, y = (
            math.cos(yaw) * along - math.sin(yaw) * across,
            math.sin(yaw) * along + math.cos(yaw) * across,
        )
        i, j = int((x + 19.2) / 0.4), int((y + 19.2) / 0.4)
        if 0 <= i < 96 and 0 <= j < 96:
            assert masks[expected][i, j], expected
    one = drive.build_world(7).surface(np.array([[0.0, 0.0]]))
    assert one.shape == (1,)


def test_the_sweep_before_shows_motion_and_no_motion() -> None:
    """A pole stays where it is under the car's motion; what moves was behind where it is."""
    still, moved = 0, 0
    for scene in range(12):
        world, frame = drive.build_world(scene), drive.generate(scene, sweeps=2, image_size=(0, 0))
        assert frame.points[frame.key][:, 4].max() == 0
        assert (frame.points[~frame.key][:, 4] == np.float32(drive.LAG)).all()  # the past is above 0
        labels = labels_of(frame)
        assert (
            labels.instance is not None and labels.num_points.sum() == (labels.instance[frame.key] >= 0).sum()
        )
        past, solid = drive.sweep(world, scene, drive.LAG)
        assert np.array_equal(past, frame.points[~frame.key])
        for n, kind in enumerate(world.kinds):
            seen = past[solid == n][:, :3].astype(np.float64)
            speed = float(np.hypot(*world.boxes[n, 7:]))
            if len(seen) < 5 or kind == "bush":
                continue
            grown = world.boxes[n : n + 1].copy()
            grown[:, 3:6] += 0.2
            now = points_in_boxes(seen, grown).numpy().mean()
            grown[:, :2] -= drive.LAG * grown[:, 7:]
            assert points_in_boxes(seen, grown).numpy().all()
            still += int(speed == 0 and now == 1)
            moved += int(speed > 4 and now < 1)
            assert speed > 0 or now == 1
    assert still > 50 and moved > 5


def test_a_scene_is_one_function_of_its_number(tmp_path: Path) -> None:
    one, other = drive.generate(11, sweeps=2), drive.generate(11, sweeps=2)
    drive.generate(12)
    assert one.points.tobytes() == other.points.tobytes()
    assert all(one.cameras[n].load().tobytes() == other.cameras[n].load().tobytes() for n in drive.CAMERAS)
    assert np.array_equal(
        drive.generate(11).points, one.points[one.key]
    )  # one more sweep changes none before it
    assert not np.array_equal(drive.generate(12).points[:100], one.points[:100])


def test_data_sets_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scenes"
    assert drive.main([str(folder), "--scenes", "3", "--first", "100", "--sweeps", "2"]) == 0
    assert "3 scenes, 000100 to 000102" in capsys.readouterr().out
    frames, direct = open_frames(folder), drive.generate(101, sweeps=2)
    assert frames.kind == "synthdrive" and frames.tokens == ["000100", "000101", "000102"]
    read = frames.read(1, labels=True)
    a, b = labels_of(read), labels_of(direct)
    assert read.token == direct.token and np.array_equal(read.points, direct.points) and a.names == b.names
    for name in ("boxes", "num_points", "instance", "ground"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert all(np.array_equal(a.masks[layer], b.masks[layer]) for layer in drive.MAP_LAYERS)
    assert all(np.array_equal(read.cameras[n].load(), direct.cameras[n].load()) for n in drive.CAMERAS)
    assert np.array_equal(read.lidar2ego, direct.lidar2ego)
    bare = frames.read(1, cameras=False)
    assert bare.labels is None and not bare.cameras
    # growing keeps what is there; the same bytes again where it was not
    before = (folder / "000101.npz").read_bytes()
    (folder / "000101.npz").unlink()
    stamp = (folder / "000100.npz").stat().st_mtime_ns
    drive.main([str(folder), "--scenes", "4", "--first", "100", "--sweeps", "2"])
    assert (folder / "000101.npz").read_bytes() == before and (
        folder / "000100.npz"
    ).stat().st_mtime_ns == stamp
    assert len(open_frames(folder).tokens) == 4
    with pytest.raises(UserError, match="holds scenes with sweeps=2 and not 1; name another folder"):
        drive.main([str(folder), "--scenes", "4", "--first", "100"])
    with pytest.raises(UserError, match="holds scenes with first=100 and not 0"):
        drive.main([str(folder), "--scenes", "4", "--sweeps", "2"])
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "train.json").write_text("[]")
    with pytest.raises(UserError, match="chats holds other files; name a folder of its own"):
        drive.write(tmp_path / "chats", 1)


def test_data_sets_that_are_not_whole(tmp_path: Path) -> None:
    drive.write(tmp_path, 1)
    frames = open_frames(tmp_path)
    path = tmp_path / "000000.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="synthdrive scene .*000000.npz is damaged .*delete it"):
        frames.read(0)
    np.savez(path, points=np.zeros((1, 5)))
    with pytest.raises(UserError, match="synthdrive scene .*000000.npz has no key; delete it"):
        frames.read(0)
    path.unlink()
    with pytest.raises(UserError, match="synthdrive scene .*000000.npz does not exist"):
        frames.read(0)
    head = tmp_path / "synthdrive.json"
    head.write_text(head.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(UserError, match="version 0, and this is 1"):
        open_frames(tmp_path)
    head.write_text("{}")
    with pytest.raises(UserError, match="is not usable"):
        open_frames(tmp_path)


@pytest.mark.slow  # two interpreters start
def test_workers_do_not_matter(tmp_path: Path) -> None:
    for workers in (1, 2):
        drive.write(tmp_path / str(workers), 5, first=7, workers=workers)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(files) == 6
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files)
