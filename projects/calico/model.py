"""The whole BEV model, for any subset of modalities, and what goes from one training stage to the next.

Letters: B frames, V cameras, n points of all frames together, C channels, X, Y cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.model_config import CameraConfig, LidarConfig, ModelConfig
from projects.calico.networks.camera import LssFpn, TimmBackbone, TinyBackbone
from projects.calico.networks.center import CenterHead
from projects.calico.networks.fuser import ConvFuser
from projects.calico.networks.lss import CameraInput, DepthLSS, LSSTransform, depth_images
from projects.calico.networks.pillars import PillarEncoder
from projects.calico.networks.second import SecondWithFpn
from projects.calico.networks.seg import SegHead
from projects.calico.networks.transfusion import TransFusionHead
from projects.calico.networks.voxels import VoxelEncoder
from vlmkd.errors import UserError
from vlmkd.export.folder import write_tensors
from vlmkd.files import new_file
from vlmkd.tensor_files import read_safetensors

Branch = Literal["lidar", "camera"]
_FACTS = "calico"


class LidarInput(NamedTuple):
    """The points of a batch, in the frame of the map (augmented)."""

    points: Tensor
    """[n, F]: x, y, z, intensity, time lag."""
    frame: Tensor
    """int64 [n], the frame of the batch that each belongs to."""
    frames: int
    """B."""


class BevOutput(NamedTuple):
    """What a pass gives; None for what the model has not."""

    lidar: Tensor | None
    """The LiDAR's map [B, C, X, Y]."""
    camera: Tensor | None
    """The cameras' map [B, C, X, Y]."""
    detection: Any
    """Of the detection head: see its `loss` and `decode`."""
    map: Tensor | None
    """Logits [B, M, X', Y'] of the map's classes."""


class LidarBranch(nn.Module):
    """Points -> [B, C, X, Y] over `grid`: the map that is contrasted, taught, and fused."""

    def __init__(self, cfg: LidarConfig, bounds: Sequence[float], features: int) -> None:
        super().__init__()
        self.encoder: PillarEncoder | VoxelEncoder
        self.backbone: nn.Module
        given = _grid(bounds, cfg.cell)
        if cfg.encoder == "pillars":
            self.encoder = PillarEncoder(given, cfg.channels, cfg.mode, features, cfg.max_points)
            sizes = (cfg.layers, cfg.widths, cfg.strides, cfg.fpn_widths, cfg.ups)
            self.backbone = SecondWithFpn(self.encoder.out_channels, *sizes)
            self.channels = [features, *cfg.channels, *cfg.widths, self.backbone.out_channels]
            stride = self.backbone.stride
        else:
            first, last = cfg.channels
            stages = [[first * 2**n] * 2 + [first * 2 ** (n + 1)] for n in range(3)] + [[first * 8] * 2]
            self.encoder = VoxelEncoder(given, stages, last, features, cfg.max_points, cfg.backend)
            self.backbone, stride = nn.Identity(), self.encoder.stride
            self.channels = [features, *cfg.channels, self.encoder.out_channels]
        self.out_channels, self.grid = self.channels[-1], _map_grid(given, stride)

    def forward(self, given: LidarInput) -> Tensor:
        return self.backbone(self.encoder(*given))


class CameraBranch(nn.Module):
    """Images -> [B, C, X, Y] over `grid`."""

    def __init__(self, cfg: CameraConfig, bounds: Sequence[float]) -> None:
        super().__init__()
        rows, columns = cfg.image_size
        self.backbone: TimmBackbone | TinyBackbone
        if cfg.encoder == "tiny":
            self.backbone = TinyBackbone(cfg.widths)
        else:
            self.backbone = TimmBackbone(
                cfg.encoder, (rows, columns), cfg.stages, cfg.pretrained, cfg.drop_path
            )
        self.neck, stride = LssFpn(self.backbone.channels, cfg.neck), self.backbone.strides[0]
        if rows % stride or columns % stride:
            raise UserError(
                f"config field model.camera.image_size is {cfg.image_size}; use multiples of {stride}"
            )
        if cfg.view == "depth_lss" and stride != 8:
            raise UserError(
                f"config field model.camera.view is depth_lss, which needs maps of stride 8, not {stride}; use lss"
            )
        low, high = cfg.height
        given = _grid([*bounds[:2], low, *bounds[3:5], high], [cfg.cell, cfg.cell, high - low])
        first, end, step = cfg.depth
        view = LSSTransform if cfg.view == "lss" else DepthLSS
        self.view = view(
            cfg.neck,
            cfg.channels,
            (rows, columns),
            (rows // stride, columns // stride),
            (first, end, step),
            given,
            cfg.downsample,
            cfg.pixel_grid,
            cfg.rounding,
            cfg.pool,
        )
        self.channels = [*self.backbone.channels, cfg.neck, cfg.channels]
        self.out_channels, self.grid = cfg.channels, _map_grid(given, cfg.downsample)

    def forward(self, cameras: CameraInput, lidar: LidarInput | None = None) -> Tensor:
        """`lidar` is read by DepthLSS alone."""
        seen = None
        if isinstance(self.view, DepthLSS):
            if lidar is None:
                raise UserError(
                    "config field model.camera.view is depth_lss, which needs the LiDAR's points; use lss"
                )
            seen = depth_images(lidar.points, lidar.frame, cameras)
        images = cameras.images.flatten(0, 1).to(next(self.parameters()).dtype)
        return self.view(self.neck(self.backbone(images)), cameras, seen)


class BevModel(nn.Module):
    """LiDAR branch, camera branch, fuser, decoder and heads: those that the config names.

    A model without heads is its branches, for pre-training; their maps are `BevOutput.lidar` and `.camera`.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        points, images = cfg.lidar.encoder != "none", cfg.camera.encoder != "none"
        self.lidar = LidarBranch(cfg.lidar, cfg.range, cfg.point_features) if points else None
        self.camera = CameraBranch(cfg.camera, cfg.range) if images else None
        _set_momentum(self.lidar, cfg.norm_momentum)
        branches = [branch for branch in (self.camera, self.lidar) if branch is not None]
        shapes = {branch.grid.shape[:2] for branch in branches}
        if len(shapes) > 1:
            told = f"cells are {branches[0].grid.cell[:2]} m, the LiDAR's {branches[1].grid.cell[:2]}"
            raise UserError(
                f"config field model.camera.cell is {cfg.camera.cell}; the map's {told}: make them equal"
            )
        self.grid = _grid(cfg.range, [*branches[0].grid.cell[:2], cfg.range[5] - cfg.range[2]])
        self.fuser = self.decoder = self.detection = self.map = None
        head = cfg.head
        if head.detection == "none" and not head.map:
            return
        channels = branches[0].out_channels
        if len(branches) > 1:
            self.fuser = ConvFuser([branch.out_channels for branch in branches], cfg.decoder.fuser)
            channels = self.fuser.out_channels
        if cfg.decoder.layers:
            d = cfg.decoder
            self.decoder = SecondWithFpn(channels, d.layers, d.widths, d.strides, d.fpn_widths, d.ups)
            _set_momentum(self.decoder, cfg.norm_momentum)
            channels, self.grid = self.decoder.out_channels, _map_grid(self.grid, self.decoder.stride)
        self.detection = detection_head(cfg, channels, self.grid)
        if head.map:
            low, high = head.map_range[2], head.map_range[5]
            labels = _grid(head.map_range, [head.map_cell, head.map_cell, high - low])
            self.map = SegHead(channels, self.grid, cfg.map_classes, labels, head.map_width)

    def forward(self, lidar: LidarInput | None = None, cameras: CameraInput | None = None) -> BevOutput:
        """What a branch of the model does not read may be None."""
        maps: dict[str, Tensor | None] = {"camera": None, "lidar": None}
        if self.camera is not None:
            assert cameras is not None, "the model sees images"
            maps["camera"] = self.camera(cameras, lidar)
        if self.lidar is not None:
            assert lidar is not None, "the model sees points"
            maps["lidar"] = self.lidar(lidar)
        given = [bev for bev in maps.values() if bev is not None]
        bev = given[0] if self.fuser is None else self.fuser(given)
        bev = bev if self.decoder is None else self.decoder(bev)
        found = None if self.detection is None else self.detection(bev)
        return BevOutput(maps["lidar"], maps["camera"], found, None if self.map is None else self.map(bev))


def detection_head(cfg: ModelConfig, channels: int, grid: Grid) -> CenterHead | TransFusionHead | None:
    """The head that the config names, over a map of so many channels."""
    head = cfg.head
    if head.detection == "none":
        return None
    shared = {"least_score": head.least_score, "box_weight": head.box_weight}
    if head.detection == "transfusion":
        return TransFusionHead(
            channels,
            grid,
            cfg.classes,
            head.width,
            head.queries,
            hidden=head.hidden,
            least_score=head.least_score,
        )
    tasks = [task.split("+") for task in head.tasks]
    named = sorted(name for task in tasks for name in task)
    if tasks and named != sorted(cfg.classes):
        told = f"has the classes {', '.join(named)}, but model.classes are {', '.join(cfg.classes)}"
        raise UserError(f"config field model.head.tasks {told}")
    if head.nms == "circle" and len(head.circles) != max(len(tasks), 1):
        told = f"has {len(head.circles)} numbers for {max(len(tasks), 1)} tasks"
        raise UserError(f"config field model.head.circles {told}")
    return CenterHead(channels, grid, cfg.classes, tasks, head.width, head.nms, head.circles, **shared)


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file, by their names in the model."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """In the model's branch, not in the file: they stay as they were."""
    unexpected: list[str] = field(default_factory=list)
    """In the file's branch, not in the model."""

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f"{len(names)}" + (
                f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
            )

        return f"{len(self.loaded)} tensors loaded, missing {some(self.missing)}, unexpected {some(self.unexpected)}"


def save_branches(
    path: Path,
    model: BevModel,
    branches: Sequence[Branch],
    weights: Mapping[str, Tensor] | None = None,
    *,
    whole: bool = False,
) -> None:
    """Write a safetensors file of the branches that the next stage starts from, with their lists of channels.

    `weights` are the model's by name where another state than the present is meant (an engine's, an average). `whole`:
    the rest of the model goes into the file too.
    """
    weights = model.state_dict() if weights is None else weights
    held = {name: tensor for name, tensor in weights.items() if whole or name.split(".")[0] in branches}
    facts = json.dumps({"channels": {branch: _branch(model, branch).channels for branch in branches}})
    with new_file(path, "checkpoint") as partial:
        write_tensors(partial, held, {_FACTS: facts})


def load_pretrained(model: BevModel, path: Path, branches: Sequence[Branch]) -> LoadReport:
    """Fill branches of `model` from a file of `save_branches`; projectors, fuser, decoder and heads start fresh.

    Raises:
        UserError: no file of ours, other channels than the model's, a tensor of another shape, or a branch none of whose
            tensors match.
    """
    tensors = read_safetensors(path, what="checkpoint")
    with safe_open(path, "pt") as stream:
        facts = (stream.metadata() or {}).get(_FACTS)
    if facts is None:
        raise UserError(f"checkpoint {path} is none of CALICO's; name a file of its export")
    channels, report, state = json.loads(facts)["channels"], LoadReport(), model.state_dict()
    for branch in branches:
        own = _branch(model, branch).channels
        given = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{branch}.")}
        wanted = {name: tensor for name, tensor in state.items() if name.startswith(f"{branch}.")}
        if branch in channels and channels[branch] != own:
            told = f"the channels {channels[branch]}, but model.{branch} has {own}"
            raise UserError(
                f"checkpoint {path}: its {branch} branch has {told}; use one config for both stages"
            )
        matched = [name for name in wanted if name in given]
        if not matched:
            raise UserError(
                f"checkpoint {path}: nothing in it is the model's {branch} branch; it has {', '.join(channels)}"
            )
        for name in matched:
            if given[name].shape != wanted[name].shape:
                shapes = f"{list(given[name].shape)}, in the model {list(wanted[name].shape)}"
                raise UserError(f"checkpoint {path}: {name} is {shapes}; use one config for both stages")
        model.load_state_dict({name: given[name] for name in matched}, strict=False)
        report.loaded.extend(matched)
        report.missing.extend(name for name in wanted if name not in given)
        report.unexpected.extend(name for name in given if name not in wanted)
    return report


def _branch(model: BevModel, branch: Branch) -> LidarBranch | CameraBranch:
    found = model.lidar if branch == "lidar" else model.camera
    if found is None:
        raise UserError(
            f"the model has no {branch} branch to load or save; see model.lidar.encoder and model.camera"
        )
    return found


def _set_momentum(part: nn.Module | None, momentum: float) -> None:
    for norm in () if part is None else part.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.momentum = momentum


def _grid(bounds: Sequence[float], cell: Sequence[float]) -> Grid:
    x, y, z, x2, y2, z2 = bounds
    try:
        return Grid((x, y, z), (x2, y2, z2), (cell[0], cell[1], cell[2]))
    except ValueError:
        told = (
            f"from {list(bounds[:3])} to {list(bounds[3:])} m is no whole number of cells of {list(cell)} m"
        )
        raise UserError(f"config field model.range: {told}") from None


def _map_grid(grid: Grid, stride: int) -> Grid:
    """The cells of a map that is `stride` times smaller, with one cell along z."""
    x, y, _ = grid.cell
    return _grid([*grid.min, *grid.max], [x * stride, y * stride, grid.max[2] - grid.min[2]])
