"""Pictures of frames: things are where they should be, and the command draws real frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from projects.calico import show, synthdrive
from projects.calico.scenes import Camera, FrameKind
from projects.calico.show import Outlines
from tests.projects.calico.frames import FRAMES, needs_frames
from vlmkd.errors import UserError

RED = np.array([[255, 0, 0]], np.uint8)


@pytest.mark.parametrize(
    ("kind", "xy", "pixel"),
    [
        ("nuscenes", (5.1, 8.1), (15, 1)),  # x right, y ahead
        ("kitti", (8.1, -5.1), (15, 1)),  # x ahead, y left
        ("synthdrive", (-8.1, 5.1), (4, 18)),
    ],
)
def test_the_car_drives_up(kind: FrameKind, xy: tuple[float, float], pixel: tuple[int, int]) -> None:
    image = show.from_above(kind, np.array([[*xy, 0.0]]), RED, half=10, side=20)
    red = np.argwhere((np.asarray(image) == RED[0]).all(-1))
    assert red[:, ::-1].tolist() == [list(pixel)]
    outside = show.from_above(
        kind, np.array([[10.5, 0, 0], [0, -10.5, 0]]), RED.repeat(2, 0), half=10, side=20
    )
    assert not (np.asarray(outside) == RED[0]).all(-1).any()


def test_a_box_from_above_has_its_front_marked() -> None:
    box = np.array([[2.0, 0, 0, 4, 2, 1, 0]])
    image = np.asarray(
        show.from_above("kitti", np.zeros((0, 3)), RED[:0], [Outlines(box, (0, 0, 255))], half=5, side=100)
    )
    blue = (image == (0, 0, 255)).all(-1)
    rows, columns = np.nonzero(blue)
    assert (rows.min(), rows.max()) == pytest.approx((10, 50), abs=2)  # x from 0 to 4 m
    assert (columns.min(), columns.max()) == pytest.approx((40, 60), abs=2)
    assert blue[20, 50] and not blue[40, 50]  # the line from the middle ahead


def test_map_layers_lie_where_the_world_has_them() -> None:
    world = synthdrive.build_world(1)
    image = np.asarray(
        show.from_above("synthdrive", np.zeros((0, 3)), RED[:0], half=12, side=240, masks=world.masks())
    )
    rng = np.random.default_rng(0)
    colours = {1: show._LAYERS["road"], 2: show._LAYERS["crossing"], 3: show._LAYERS["walkway"]}
    right = 0
    for x, y in rng.uniform(-11.5, 11.5, (200, 2)):
        expected = colours.get(int(world.surface(np.array([x, y]))), show._PAPER)
        right += tuple(image[int((12 - x) * 10), int((12 - y) * 10)]) == expected
    assert right > 170  # the rest: rings, their texts, and edges of cells


def camera() -> Camera:
    """Looks along +x; 100 pixels are a metre at a distance of one."""
    pose = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    return Camera(np.zeros((60, 100, 3), np.uint8), np.array([[100.0, 0, 50], [0, 100, 30], [0, 0, 1]]), pose)


def test_points_and_boxes_in_a_picture() -> None:
    image = np.asarray(
        show.camera_view(camera(), np.array([[10.0, 2, 1], [-10, 2, 1]]), RED.repeat(2, 0), width=100)
    )
    red = np.argwhere((image == RED[0]).all(-1))
    assert red.mean(0).tolist() == pytest.approx([20, 30], abs=0.6)  # one metre up, two to the left, of ten
    grey = np.array([show._GROUND], np.uint8)
    assert (np.asarray(show.camera_view(camera(), np.array([[10.0, 2, 1]]), grey, width=100)) > 0).all(
        -1
    ).sum() == 1
    box = np.array([[10.0, 0, 0, 2, 2, 2, 0]])
    drawn = np.asarray(
        show.camera_view(camera(), np.zeros((0, 3)), RED[:0], [Outlines(box, (0, 255, 0))], width=100)
    )
    rows, columns = np.nonzero((drawn == (0, 255, 0)).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((19, 41, 39, 61), abs=1.5)


def test_lines_end_before_the_camera() -> None:
    """A long wall beside the car comes from behind it; what is behind it is not drawn at all."""
    wall = np.array([[0.0, 1.5, 0, 40, 0.2, 1, 0]])
    drawn = np.asarray(
        show.camera_view(camera(), np.zeros((0, 3)), RED[:0], [Outlines(wall, (0, 255, 0))], width=100)
    )
    rows, columns = np.nonzero((drawn == (0, 255, 0)).all(-1))
    assert len(rows) > 50 and columns.max() < 50 and columns.min() == 0
    behind = wall - [30, 0, 0, 0, 0, 0, 0]
    empty = np.asarray(
        show.camera_view(camera(), np.zeros((0, 3)), RED[:0], [Outlines(behind, (0, 255, 0))], width=100)
    )
    assert not empty.any()


def test_neighbouring_regions_differ_in_colour() -> None:
    region = np.append(np.arange(40), [-1, -1]).astype(np.int16)
    colours = show.region_colours(region, np.arange(42) == 41).astype(int)
    assert tuple(colours[40]) == show._REST and tuple(colours[41]) == show._GROUND
    assert np.abs(colours[1:40] - colours[:39]).sum(1).min() > 80


def test_the_command_writes_pictures_and_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthdrive.write(tmp_path / "scenes", 2)
    out = tmp_path / "a.png"
    assert show.main([str(tmp_path / "scenes"), "--frame", "000001", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "synthdrive 000001; " in told and "4 cameras" in told
    with Image.open(out) as image:
        assert image.width > 1500 and image.height > 900
    page = tmp_path / "a.html"
    assert show.main([str(tmp_path / "scenes"), "--frame", "1", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("<img ") == 5 and "<h1>synthdrive 000001</h1>" in text and "http" not in text
    with pytest.raises(
        UserError, match="--frame 7 is neither a token nor a number below 2; the first token is 000000"
    ):
        show.main([str(tmp_path / "scenes"), "--frame", "7"])
    with pytest.raises(UserError, match="must end in .png or .html"):
        show.main([str(tmp_path / "scenes"), "--out", "a.jpg"])


@needs_frames
@pytest.mark.parametrize("name", ["nuscenes", "kitti", "av2"])
def test_real_frames_are_drawn(name: str, tmp_path: Path) -> None:
    out = tmp_path / "frame.png"
    assert show.main([str(FRAMES / name), "--out", str(out)]) == 0
    with Image.open(out) as image:
        pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == show.TRUTH).all(1).sum() > 500  # boxes
    assert (np.ptp(pixels.astype(int), axis=1) > 120).sum() > 2000  # regions


def test_frames_without_labels_or_cameras_are_drawn() -> None:
    frame = replace(synthdrive.generate(0, image_size=(0, 0)), labels=None)
    drawn = show.pictures(frame, show.regions_of(frame, show.PRESETS["default"]), half=24, side=300)
    assert list(drawn) == ["from above"]
    assert show.montage(drawn, "title").size == (300, 326)
