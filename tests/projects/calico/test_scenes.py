"""Frames: what is refused, in one line each, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from projects.calico.scenes import Camera, Frame, Labels, checked
from vlmkd.errors import UserError

AHEAD = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""cam2lidar of a level camera at the LiDAR that looks along +x."""


def camera(**changes: Any) -> Camera:
    intrinsics = np.array([[50.0, 0, 40], [0, 50, 20], [0, 0, 1]])
    return replace(Camera(np.zeros((40, 80, 3), np.uint8), intrinsics, AHEAD), **changes)


def frame(points: list[list[float]] | None = None, **changes: Any) -> Frame:
    rows = np.array(points if points is not None else [[10, 0, 0, 1, 0], [-10, 0, 0, 1, 0]], np.float32)
    rows = rows.reshape(-1, 5)
    made = Frame("t", "s", "synthdrive", rows, np.ones(len(rows), bool), {"CAM": camera()})
    return replace(made, **changes)


def labels(points: int) -> Labels:
    boxes = np.zeros((1, 9), np.float32)
    return Labels(
        boxes,
        ("car",),
        np.array([3]),
        instance=np.arange(points, dtype=np.int16),
        ground=np.ones(points, bool),
    )


def test_points_land_on_their_pixels() -> None:
    uv, depth = frame([[10, 2, -1, 0, 0], [-10, 0, 0, 0, 0], [1, 30, 0, 0, 0]]).pixels(
        np.array([[10.0, 2, -1], [-10, 0, 0], [1, 30, 0]])
    )["CAM"]
    assert uv[0].tolist() == pytest.approx([40 - 10, 20 + 5])
    assert depth.tolist() == [10, 0, 0]


def test_rows_that_are_not_finite_are_dropped_and_counted() -> None:
    rows = [[10.0, 0, 0, 1, 0], [np.nan, 0, 0, 1, 0], [5, 0, 0, np.inf, 0], [4, 0, 0, 0, 0]]
    clean = checked(frame(rows, labels=labels(4)))
    assert clean.dropped == 2 and clean.points[:, 0].tolist() == [10, 4] and clean.key.tolist() == [True] * 2
    assert clean.labels is not None and clean.labels.instance is not None and clean.labels.ground is not None
    assert clean.labels.instance.tolist() == [0, 3] and len(clean.labels.ground) == 2
    assert checked(clean).dropped == 2


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (frame([]), "sweep is empty, its sweep file holds no points"),
        (frame([[np.nan] * 5, [np.nan] * 5]), "sweep is empty, all of its 2 points are NaN"),
        (frame(key=np.zeros(2, bool)), "sweep is empty"),
        (
            frame(points=None, key=np.ones(3, bool)),
            r"must be \[n, 5\] with n key flags; they are \[2, 5\] with 3",
        ),
        (
            frame(cameras={"CAM": camera(cam2lidar=np.zeros((4, 4)))}),
            "calibration of CAM is not an invertible",
        ),
        (frame(ego2global=np.full((4, 4), np.nan)), "calibration of ego2global"),
        (frame([[-10, 0, 0, 1, 0]]), "puts no point into any of 1 images"),
    ],
)
def test_a_frame_that_cannot_be_used_is_refused_in_one_line(broken: Frame, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        checked(broken)
    assert str(error.value).startswith("frame t: ") and "\n" not in str(error.value)


def test_one_seeing_camera_of_two_is_enough() -> None:
    blind = camera(cam2lidar=AHEAD @ np.diag([1.0, -1, -1, 1]))
    assert len(checked(frame([[10, 0, 0, 1, 0]], cameras={"A": blind, "B": camera()})).cameras) == 2
    assert not checked(frame(cameras={})).pixels(np.zeros((1, 3)))


def test_images_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((4, 6), 9, np.uint8)).save(path)
    on_disk = camera(image=path)
    assert on_disk.size == (4, 6) and on_disk.load().shape == (4, 6, 3) and (on_disk.load() == 9).all()
    with pytest.raises(UserError, match="camera image .*missing.png does not exist"):
        _ = camera(image=tmp_path / "missing.png").size
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="camera image"):
        camera(image=path).load()


def test_labels_of_unequal_lengths_are_a_defect() -> None:
    with pytest.raises(ValueError, match="2 names"):
        Labels(np.zeros((1, 9), np.float32), ("a", "b"), np.zeros(1))
    with pytest.raises(ValueError, match="2 attributes"):
        Labels(np.zeros((1, 9), np.float32), ("a",), np.zeros(1), ("a", "b"))
