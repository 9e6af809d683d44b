"""The paper-size model on the real nuScenes frame: forward, PRC backward, RAD backward (`pytest -s` prints what they took)."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from projects.calico.geometry import (
    bev_sample,
    image_augmentation,
    in_image,
    lidar_augmentation,
    project,
    transform,
)
from projects.calico.losses import prc_loss, rad_loss
from projects.calico.model import BevModel, LidarInput
from projects.calico.model_config import ModelConfig
from projects.calico.networks.fuser import PointProjector
from projects.calico.networks.lss import CameraInput
from projects.calico.readers.mmdet3d import nuscenes_record, read_infos
from projects.calico.readers.nuscenes import read_frame
from projects.calico.regions import PRESETS, regions_of
from projects.calico.scenes import Frame
from tests.projects.calico.frames import FRAMES, needs_frames
from vlmkd.train.task import frozen

pytestmark = [needs_frames, pytest.mark.slow]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def camera_input(frame: Frame, lidar_aug: Tensor) -> CameraInput:
    """The six images at 256x704, as the paper crops them in tests."""
    aug, images = image_augmentation(0.48, (32, 176), (256, 704)), []
    for camera in frame.cameras.values():
        image = Image.fromarray(camera.load()).resize((768, 432), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image.crop((32, 176, 736, 432)))) / 255
        images.append(((pixels - MEAN) / STD).permute(2, 0, 1))
    intrinsics, cam2lidar = map(torch.as_tensor, frame.stacked())
    return CameraInput(
        torch.stack(images)[None], intrinsics[None], cam2lidar[None], aug.expand(1, 6, 4, 4), lidar_aug[None]
    )


def lidar_input(points: Tensor, lidar_aug: Tensor) -> LidarInput:
    moved = torch.cat([transform(points[:, :3], lidar_aug), points[:, 3:]], 1)
    return LidarInput(moved, torch.zeros(len(points), dtype=torch.long), 1)


def sampled(region: Tensor, usable: Tensor) -> Tensor:
    """Rows of up to 1024 points with a region and 1024 without."""
    make = torch.Generator().manual_seed(0)
    parts = [(usable & of).nonzero()[:, 0] for of in (region >= 0, region < 0)]
    return torch.cat([rows[torch.randperm(len(rows), generator=make)[:1024]] for rows in parts])


@pytest.fixture(scope="module")
def frame() -> Frame:
    record = nuscenes_record(read_infos(FRAMES / "nuscenes/info.json"), folders=False)
    return read_frame(record, FRAMES / "nuscenes", sweeps=0)


@pytest.fixture(scope="module")
def region(frame: Frame) -> Tensor:
    return torch.from_numpy(regions_of(frame, PRESETS["default"]).region).long()


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    cfg = ModelConfig()
    return replace(cfg, camera=replace(cfg.camera, pretrained=False))


def branch(cfg: ModelConfig, which: str) -> BevModel:
    """The model of one modality without heads."""
    torch.manual_seed(0)
    other = {
        "lidar": {"camera": replace(cfg.camera, encoder="none")},
        "camera": {"lidar": replace(cfg.lidar, encoder="none")},
    }
    return BevModel(replace(cfg, head=replace(cfg.head, detection="none", map=False), **other[which]))


def used(start: float) -> tuple[float, float]:
    """Processor seconds since, and the highest memory of this process in GB."""
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def learned(model: BevModel, loss: Tensor) -> None:
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("0.weight"))


def test_a_forward_pass_of_the_whole_model(frame: Frame, config: ModelConfig) -> None:
    torch.manual_seed(0)
    model, eye = BevModel(config).eval(), torch.eye(4, dtype=torch.float64)
    start = time.process_time()
    with torch.no_grad():
        out = model(lidar_input(torch.from_numpy(frame.points), eye), camera_input(frame, eye))
        (found,) = model.detection.decode(out.detection)
    seconds, memory = used(start)
    print(f"\nforward: {seconds:.1f} s, {memory:.2f} GB")
    assert out.lidar.shape == (1, 384, 128, 128) and out.camera.shape == (1, 80, 128, 128)
    assert out.map.shape == (1, 6, 200, 200) and found.boxes.shape == (200, 9)
    assert all(t.isfinite().all() for t in (out.lidar, out.camera, out.map, *out.detection, found.boxes))
    assert seconds < 60 and memory < 6


def test_prc_trains_the_lidar_branch(frame: Frame, region: Tensor, config: ModelConfig) -> None:
    model, points, start = branch(config, "lidar"), torch.from_numpy(frame.points), time.process_time()
    views = [lidar_augmentation(yaw=1.2, scale=0.95), lidar_augmentation(yaw=-0.7, flip_x=True)]
    moved = [lidar_input(points, view) for view in views]
    usable = torch.stack([model.grid.index(view.points[:, :2])[1] for view in moved]).all(0)
    rows = sampled(region, usable)
    samples = [bev_sample(model(view).lidar, view.points[None, rows, :2], model.grid)[0] for view in moved]
    heads = [PointProjector(384), PointProjector(384)]
    first, second = ((head(samples[0]), head(samples[1])) for head in heads)
    loss, stats = prc_loss(first, second, region[rows])
    learned(model, loss)
    print(
        f"\nPRC: {used(start)}, {len(rows)} points, loss {loss:.2f}, { {k: round(v.item(), 2) for k, v in stats.items()} }"
    )
    assert len(rows) == 2048 and stats["plrc_chance"].item() == pytest.approx(math.log(2048), abs=1e-4)


def test_rad_trains_the_camera_branch(frame: Frame, region: Tensor, config: ModelConfig) -> None:
    teacher, student = frozen(branch(config, "lidar")), branch(config, "camera")
    aug, start = lidar_augmentation(yaw=0.3, scale=1.02, flip_y=True), time.process_time()
    given, cameras = lidar_input(torch.from_numpy(frame.points), aug), camera_input(frame, aug)
    pixels, depth = project(
        given.points[None, :, :3], torch.linalg.inv(cameras.cam2lidar), *cameras[1:2], *cameras[3:]
    )
    seen = in_image(pixels, depth, (256, 704))[0].any(0) & teacher.grid.index(given.points[:, :2])[1]
    rows = sampled(region, seen)
    places = given.points[None, rows, :2]
    wanted = bev_sample(teacher(given).lidar, places, teacher.grid)[0]
    got = bev_sample(student(cameras=cameras).camera, places, student.grid)[0]
    loss, stats = rad_loss(PointProjector(80)(got), PointProjector(384)(wanted), region[rows])
    learned(student, loss)
    print(
        f"\nRAD: {used(start)}, {len(rows)} points, loss {loss:.2f}, { {k: round(v.item(), 2) for k, v in stats.items()} }"
    )
    assert len(rows) > 1500 and not any(p.requires_grad for p in teacher.parameters())
