"""From frames to batches: views and samples before fine-tuning, labels in it; the same augmentation for points and cameras.

All matrices are 4x4 (see `geometry`). Letters: B frames, V cameras, n points, k boxes, s sampled points, R regions, M layers
of a map, X, Y cells.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from projects.calico.balance import NUSCENES_COUNTS, PasteDatabase
from projects.calico.config import CalicoConfig, SceneDataConfig
from projects.calico.geometry import (
    Grid,
    image_augmentation,
    in_image,
    lidar_augmentation,
    project,
    transform,
    transform_boxes,
)
from projects.calico.maps import LAYERS, of_frame, read_map
from projects.calico.model import map_grid
from projects.calico.networks.fuser import region_boxes
from projects.calico.networks.lss import CameraInput, LidarInput
from projects.calico.readers.nuscenes import NuScenesFrames
from projects.calico.region_cache import RegionCache
from projects.calico.regions import preset_of, regions_of
from projects.calico.scenes import Frame, Frames
from projects.calico.synthdrive import HALF_RANGE, MAP_CELL
from vlmkd.data.samples import RawSample
from vlmkd.errors import UserError

_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
"""Of ImageNet, whose weights image backbones start from."""
_AWAY = 1e6
"""Metres above the map at which a camera that a frame lacks looks further up."""
_PASTED = 2
"""Objects of a class up to which more are pasted, for classes that BEVFusion has no number for."""


@dataclass(frozen=True)
class SceneItem:
    """A frame of a data set, as the loader draws it."""

    key: str
    """Its token; of a frame that is drawn several times an epoch, with a number."""
    index: int
    """Among the frames of its data set."""

    def members(self) -> dict[str, bytes]:
        """Nothing: the pipeline reads what it needs of the frame."""
        return {}


class View(NamedTuple):
    """One augmented view of a sweep."""

    points: Tensor
    """float32 [n, 5], in the frame of the map."""
    lidar_aug: Tensor
    """float64 [4, 4], which took them there."""


@dataclass
class SceneSample:
    """One frame, ready to be collated."""

    key: str
    views: list[View]
    dropped: int
    """Points that were not finite."""
    cameras: CameraInput | None = None
    """Under the augmentation of the first view; without the axis of frames."""
    places: list[Tensor] = field(default_factory=list)
    """Of each view, float32 [s, 2]: the sampled points on its map."""
    region: Tensor | None = None
    """int64 [s]: the region of each sampled point, -1 for none."""
    seen: Tensor | None = None
    """bool [s]: sampled points that lie in a picture (joint; RAD samples no others)."""
    region_boxes: list[Tensor] = field(default_factory=list)
    """Of each view, float32 [R, 4]: x1, y1, x2, y2 of the same regions (box_clip)."""
    boxes: Tensor | None = None
    """float32 [k, 9]."""
    labels: Tensor | None = None
    """int64 [k]."""
    masks: Tensor | None = None
    """bool [M, X, Y]."""


def generator(*parts: object) -> np.random.Generator:
    """A generator for what the parts name."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def draw_lidar_aug(data: SceneDataConfig, draw: np.random.Generator) -> Tensor:
    """float64 [4, 4]: flips, rotation, scale and shift as the config has them."""
    turn = math.radians(data.rotation)
    flips = (draw.random(2) < 0.5).tolist() if data.flip else (False, False)
    shift = draw.normal(0, 1, 3) * data.shift
    return lidar_augmentation(draw.uniform(-turn, turn), draw.uniform(*data.scale), *flips, tuple(shift))


def camera_input(
    frame: Frame,
    size: tuple[int, int],
    data: SceneDataConfig,
    draw: np.random.Generator | None,
    lidar_aug: Tensor | None = None,
) -> CameraInput:
    """Pictures resized, cropped at the bottom, mirrored and turned to (rows, columns), with the matrices that tell so.

    Without `draw` they are as in evaluations: in the middle, unturned.
    """
    if not frame.cameras:
        raise UserError(f"frame {frame.token} has no cameras; set model.camera.encoder=none")
    images, matrices = [], []
    for camera in frame.cameras.values():
        picture = Image.fromarray(camera.load())
        resize, flip, angle, aside = data.eval_resize, False, 0.0, 0.5
        if draw is not None:
            turn = math.radians(data.image_rotation)
            resize, angle, aside = draw.uniform(*data.image_resize), draw.uniform(-turn, turn), draw.random()
            flip = data.image_flip and bool(draw.random() < 0.5)
        wide, high = int(picture.width * resize), int(picture.height * resize)
        left, top = int(max(wide - size[1], 0) * aside), high - size[0]
        if (wide, high) != picture.size:
            picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size[1], top + size[0]))
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if angle:
            picture = picture.rotate(math.degrees(angle), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(picture)))
        matrices.append(image_augmentation(resize, (left, top), size, flip, angle))
    pixels = ((torch.stack(images).float() / 255 - _MEAN) / _STD).permute(0, 3, 1, 2).contiguous()
    intrinsics, cam2lidar = map(torch.from_numpy, frame.stacked())
    aug = torch.eye(4, dtype=torch.float64) if lidar_aug is None else lidar_aug
    return CameraInput(pixels, intrinsics, cam2lidar, torch.stack(matrices), aug)


def _with_views(given: CameraInput, count: int) -> CameraInput:
    """Of a frame that lacks cameras which others of its batch have: grey pictures in their place, which no cell sees."""
    lacking = count - len(given.images)
    if not lacking:
        return given
    eye, away = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    away[2, 3] = _AWAY
    more = (given.images.new_zeros(given.images.shape[1:]), eye[:3, :3], away, eye)
    columns = (
        torch.cat([own, one.expand(lacking, *one.shape)]) for own, one in zip(given[:4], more, strict=True)
    )
    return CameraInput(*columns, given.lidar_aug)


class ScenePipeline:
    """What every stage shares (see `vlmkd.data.pipelines.Pipeline`); sent to loader processes.

    Every draw is a function of the frame and the epoch.
    """

    def __init__(self, cfg: CalicoConfig, frames: Frames) -> None:
        model = cfg.model
        self.data, self.model, self.frames = cfg.data, model, frames
        self.labels, self.images = cfg.reads_labels, cfg.reads_images
        self.low, self.high = torch.tensor(model.range[:3]), torch.tensor(model.range[3:])
        rows, columns = model.camera.image_size
        self.image_size = (rows, columns)

    def read(self, index: int, draw: np.random.Generator | None = None) -> Frame:
        """A frame with no more than the stage reads; of nuScenes `draw` chooses the sweeps."""
        chosen = {"draw": draw} if isinstance(self.frames, NuScenesFrames) else {}
        return self.frames.read(index, labels=self.labels, cameras=self.images, **chosen)

    def inside(self, points: Tensor) -> Tensor:
        """bool [n]: points [n, 2 or 3] that lie within the model's range."""
        axes = points.shape[-1]
        return ((points >= self.low[:axes]) & (points < self.high[:axes])).all(-1)

    def pictures(self, frame: Frame, draw: np.random.Generator | None, aug: Tensor) -> CameraInput | None:
        """See `camera_input`."""
        return camera_input(frame, self.image_size, self.data, draw, aug) if self.images else None

    def labelled(self, frame: Frame, lidar_aug: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [k, 9] and labels [k] of the model's classes, with a point in them and their centre on the map."""
        labels, classes = frame.labels, self.model.classes
        assert labels is not None
        # nuScenes' reader has looked at the radars' points too.
        hit = (labels.num_points != 0) | (frame.frame == "nuscenes")
        rows = [row for row, name in enumerate(labels.names) if name in classes and hit[row]]
        boxes = transform_boxes(torch.from_numpy(labels.boxes[rows]), lidar_aug)
        numbers = torch.tensor([classes.index(labels.names[row]) for row in rows], dtype=torch.int64)
        kept = self.inside(boxes[:, :2])
        return boxes[kept], numbers[kept]

    def process(self, raw: RawSample) -> SceneSample:
        raise NotImplementedError

    def collate(self, samples: list[SceneSample]) -> dict[str, Any]:
        """A batch: `lidar`, a `LidarInput` a view; `cameras`; the lists, a tensor a frame, that the samples have."""
        first = samples[0]
        batch: dict[str, Any] = {
            "keys": [one.key for one in samples],
            "lidar": [
                LidarInput(
                    torch.cat([view.points for view in views]),
                    torch.repeat_interleave(torch.tensor([len(view.points) for view in views])),
                    len(views),
                )
                for views in zip(*(one.views for one in samples), strict=True)
            ],
            "dropped_points": torch.tensor(float(sum(one.dropped for one in samples))),
        }
        if first.cameras is not None:
            seen = [one.cameras for one in samples if one.cameras is not None]
            most = max(len(one.images) for one in seen)
            columns = zip(*(_with_views(one, most) for one in seen), strict=True)
            batch["cameras"] = CameraInput(*map(torch.stack, columns))
        for name in ("places", "region_boxes"):
            if getattr(first, name):
                views = zip(*(getattr(one, name) for one in samples), strict=True)
                batch[name] = [list(view) for view in views]
        for name in ("region", "seen", "boxes", "labels", "masks"):
            if getattr(first, name) is not None:
                batch[name] = [getattr(one, name) for one in samples]
        if "masks" in batch:
            batch["masks"] = torch.stack(batch["masks"])
        return batch

    def check(self, batch: dict[str, Any], size: int) -> None:
        assert len(batch["keys"]) == size and all(view.frames == size for view in batch["lidar"])
        assert ("boxes" in batch) == self.labels and ("cameras" in batch) == self.images

    def describe(self) -> dict[str, Any]:
        return {"info": self.data.info, "labels": self.labels}


class ContrastPipeline(ScenePipeline):
    """Views of one sweep with the same sampled points in each: two for PRC, one with its cameras for RAD."""

    def __init__(self, cfg: CalicoConfig, frames: Frames) -> None:
        super().__init__(cfg, frames)
        self.prc, self.distils = cfg.prc, cfg.stage == "rad"
        self.preset = preset_of(cfg.regions.preset)
        self.cache = RegionCache(Path(cfg.regions.cache), self.preset) if cfg.regions.cache else None

    def process(self, raw: RawSample) -> SceneSample:
        draw = generator(raw.seed)
        frame = self.read(raw.item.index, draw)
        region = np.full(len(frame.points), -1, np.int64)
        region[frame.key] = self.regions(frame)
        augs = [draw_lidar_aug(self.data, draw) for _ in range(1 if self.distils else 2)]
        points = torch.from_numpy(frame.points)
        moved = [transform(points[:, :3], aug) for aug in augs]
        usable = torch.stack([self.inside(view) for view in moved]).all(0) & torch.from_numpy(frame.key)
        cameras = self.pictures(frame, draw, augs[0])
        if cameras is not None and self.distils:
            usable &= self.seen(moved[0], cameras)
        rows = self.sampled(usable.numpy(), region, draw)
        sample = SceneSample(raw.name, [], frame.dropped, cameras, region=torch.from_numpy(region[rows]))
        if cameras is not None and not self.distils:
            sample.seen = self.seen(moved[0][torch.from_numpy(rows)], cameras)
        for xyz, aug in zip(moved, augs, strict=True):
            kept = draw.random(len(points)) >= self.data.drop
            kept[rows] = True
            sample.views.append(View(torch.cat([xyz, points[:, 3:]], 1)[torch.from_numpy(kept)], aug))
            sample.places.append(xyz[torch.from_numpy(rows), :2])
            if self.prc.arm == "box_clip":
                whole = torch.from_numpy(region)[usable]
                sample.region_boxes.append(region_boxes(xyz[usable, :2], whole))
        if self.labels:  # the arm of RAD that weighs points by true boxes
            sample.boxes, sample.labels = self.labelled(frame, augs[0])
        return sample

    def regions(self, frame: Frame) -> np.ndarray:
        """int16 [n] of the key sweep; of a cache, if all points that it was made from are there."""
        if self.cache is None:
            return regions_of(frame, self.preset).region
        return self.cache.read(frame.token, frame.frame, int(frame.key.sum()))

    def seen(self, points: Tensor, cameras: CameraInput) -> Tensor:
        """bool [n]: points [n, 3] of the map's frame that lie in a picture as the network sees it."""
        _, intrinsics, cam2lidar, img_aug, lidar_aug = (part[None] for part in cameras)
        lidar2cam = torch.linalg.inv(cam2lidar)
        pixels, depth = project(points.double()[None], lidar2cam, intrinsics, img_aug, lidar_aug)
        return in_image(pixels, depth, self.image_size)[0].any(0)

    def sampled(self, usable: np.ndarray, region: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Rows [s], uniform without replacement: of regions, then of none; PointContrast's are of all."""
        rich, less = self.prc.n_rich, self.prc.n_less
        pools = [(usable & (region >= 0), rich), (usable & (region < 0), less)]
        if self.prc.arm == "pointcontrast":
            pools = [(usable, rich + less)]
        rows = ((np.flatnonzero(pool), most) for pool, most in pools)
        return np.concatenate([draw.choice(some, min(most, len(some)), replace=False) for some, most in rows])


class LabelledPipeline(ScenePipeline):
    """Frames with boxes and maps, for fine-tuning and, without augmentation, for evaluations."""

    def __init__(self, cfg: CalicoConfig, frames: Frames, paste: PasteDatabase | None = None) -> None:
        super().__init__(cfg, frames)
        self.labels, self.paste = True, paste
        self.layers = cfg.model.map_classes if cfg.model.head.map else []
        self.map_grid = map_grid(cfg.model)

    def process(self, raw: RawSample) -> SceneSample:
        draw = generator(raw.seed)
        frame = self.read(raw.item.index, draw)
        late = self.data.paste_epochs and (raw.turn or 0) >= self.data.paste_epochs
        if self.paste is not None and not late:
            counts = {name: NUSCENES_COUNTS.get(name, _PASTED) for name in self.model.classes}
            frame = self.paste.paste(frame, counts, draw)
        return self.prepare(frame, raw.item.index, draw, raw.name)

    def prepare(
        self, frame: Frame, index: int, draw: np.random.Generator | None = None, key: str = ""
    ) -> SceneSample:
        """A frame as the network takes it, augmented by `draw`."""
        aug = torch.eye(4, dtype=torch.float64) if draw is None else draw_lidar_aug(self.data, draw)
        points = torch.from_numpy(frame.points)
        if draw is not None and self.data.drop:
            points = points[torch.from_numpy(draw.random(len(points)) >= self.data.drop)]
        moved = torch.cat([transform(points[:, :3], aug), points[:, 3:]], 1)
        cameras = self.pictures(frame, draw, aug)
        sample = SceneSample(key or frame.token, [View(moved, aug)], frame.dropped, cameras)
        sample.boxes, sample.labels = self.labelled(frame, aug)
        if self.layers:
            sample.masks = torch.from_numpy(self.masks(frame, index, aug))
        return sample

    def masks(self, frame: Frame, index: int, lidar_aug: Tensor) -> np.ndarray:
        """bool [M, X, Y] of the model's layers in the cells of the label, under the whole augmentation."""
        drawn = {} if frame.labels is None else frame.labels.masks
        if set(self.layers) <= drawn.keys():
            return moved_masks(np.stack([drawn[name] for name in self.layers]), lidar_aug, self.map_grid)
        if isinstance(self.frames, NuScenesFrames) and set(self.layers) <= set(LAYERS):
            world = _cached_map(self.frames.root, self.frames.entries[index].location)
            layers = of_frame(world, frame, self.map_grid, lidar_aug.numpy())
            return layers[[LAYERS.index(name) for name in self.layers]]
        raise UserError(
            f"frame {frame.token} has no map of the layers {', '.join(self.layers)}; set model.head.map=false, or"
            " model.map_classes to layers that the data set has"
        )


_cached_map = cache(read_map)


def moved_masks(masks: np.ndarray, lidar_aug: Tensor, grid: Grid) -> np.ndarray:
    """bool [M, X, Y]: layers drawn around the sweep (`Labels.masks`) in the cells of the augmented frame."""
    half = HALF_RANGE
    drawn = Grid((-half, -half, -1.0), (half, half, 1.0), (MAP_CELL, MAP_CELL, 2.0))
    assert masks.shape[1:] == drawn.shape[:2], "of synthdrive"
    x, y, _ = grid.shape
    centres = grid.centre(torch.cartesian_prod(torch.arange(x), torch.arange(y)), torch.float64)
    centres = torch.nn.functional.pad(centres, (0, 1))
    index, there = drawn.index(transform(centres, torch.linalg.inv(lidar_aug))[:, :2])
    found = torch.from_numpy(masks)[:, index[:, 0], index[:, 1]] & there
    return found.reshape(-1, x, y).numpy()


def evaluation_pipeline(cfg: CalicoConfig, frames: Frames) -> LabelledPipeline:
    """Of the frames that a model is evaluated on."""
    pipeline = LabelledPipeline(cfg, frames)
    pipeline.images = cfg.model.camera.encoder != "none"
    return pipeline
