"""The whole BEV model, for any subset of modalities, and what goes from one training stage to the next.

Letters: B frames, V cameras, n points of all frames together, C channels, X, Y cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from projects.calico.geometry import Grid
from projects.calico.model_config import POINT, CameraConfig, LidarConfig, ModelConfig
from projects.calico.networks.fuser import ConvFuser
from projects.calico.networks.heads import CenterHead, SegHead, TransFusionHead
from projects.calico.networks.lidar import PillarEncoder, VoxelEncoder
from projects.calico.networks.lss import (
    CameraInput,
    LidarInput,
    LssFpn,
    LSSTransform,
    TimmBackbone,
    TinyBackbone,
)
from projects.calico.networks.parts import SecondWithFpn
from vlmkd.config import require
from vlmkd.errors import UserError
from vlmkd.export.folder import write_tensors
from vlmkd.files import new_file
from vlmkd.models.checkpoints import differences
from vlmkd.tensor_files import read_safetensors

Branch = Literal["lidar", "camera"]
_FACTS = "calico"


class BevOutput(NamedTuple):
    """Maps [B, C, X, Y] of both branches, what the detection head found, logits [B, M, X', Y'] of the map; None: not there."""

    lidar: Tensor | None
    camera: Tensor | None
    detection: Any
    map: Tensor | None


class LidarBranch(nn.Module):
    """Points -> [B, C, X, Y] over `grid`: the map that is contrasted, taught, and fused."""

    def __init__(self, cfg: LidarConfig, bounds: Sequence[float]) -> None:
        super().__init__()
        given, self.channels = grid_of(bounds, cfg.cell), [POINT, *cfg.channels]
        if cfg.encoder == "pillars":
            self.encoder: nn.Module = PillarEncoder(given, cfg)
            self.backbone: nn.Module = SecondWithFpn(cfg.channels[-1], cfg)
            last, self.channels = self.backbone, [*self.channels, *cfg.widths]
        else:
            last = self.encoder = VoxelEncoder(given, cfg)
            self.backbone = nn.Identity()
        self.channels.append(last.out_channels)
        self.out_channels, self.grid = last.out_channels, _coarser(given, last.stride)

    def forward(self, given: LidarInput) -> Tensor:
        return self.backbone(self.encoder(*given))


class CameraBranch(nn.Module):
    """Images -> [B, C, X, Y] over `grid`."""

    def __init__(self, cfg: CameraConfig, bounds: Sequence[float]) -> None:
        super().__init__()
        self.backbone = TinyBackbone(cfg.widths) if cfg.encoder == "tiny" else TimmBackbone(cfg)
        self.neck, stride = LssFpn(self.backbone.channels, cfg.neck), self.backbone.strides[0]
        fits = not any(size % stride for size in cfg.image_size)
        require(fits, "model.camera.image_size", f"is {cfg.image_size}; use multiples of {stride}")
        fits = cfg.view == "lss" or stride == 8
        told = f"is depth_lss, which needs maps of stride 8, not {stride}; use lss"
        require(fits, "model.camera.view", told)
        low, high = cfg.height
        cell = [cfg.cell, cfg.cell, high - low]
        given = grid_of([*bounds[:2], low, *bounds[3:5], high], cell, "model.camera.cell")
        self.view = LSSTransform(cfg, stride, given)
        self.channels = [*self.backbone.channels, cfg.neck, cfg.channels]
        self.out_channels, self.grid = cfg.channels, _coarser(given, cfg.downsample)

    def forward(self, cameras: CameraInput, lidar: LidarInput | None = None) -> Tensor:
        """`lidar` is read by `view=depth_lss` alone."""
        images = cameras.images.flatten(0, 1).to(next(self.parameters()).dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        return self.view(self.neck(self.backbone(images)), cameras, lidar)


class BevModel(nn.Module):
    """LiDAR branch, camera branch, fuser, decoder and heads: those that the config names.

    A model without heads is its branches, for pre-training; their maps are `BevOutput.lidar` and `.camera`.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.lidar = self.camera = self.fuser = self.decoder = self.detection = self.map = None
        if cfg.lidar.encoder != "none":
            self.lidar = LidarBranch(cfg.lidar, cfg.range)
            _set_momentum(self.lidar, cfg.norm_momentum)
        if cfg.camera.encoder != "none":
            self.camera = CameraBranch(cfg.camera, cfg.range)
        branches = [branch for branch in (self.camera, self.lidar) if branch is not None]
        cells = [branch.grid.cell[:2] for branch in branches]
        told = f"is {cfg.camera.cell}; the map's cells are {cells[0]} m, the LiDAR's {cells[-1]}: make them equal"
        require(len({branch.grid.shape[:2] for branch in branches}) == 1, "model.camera.cell", told)
        self.grid = grid_of(cfg.range, [*cells[0], cfg.range[5] - cfg.range[2]])
        head, channels = cfg.head, branches[0].out_channels
        if head.detection == "none" and not head.map:
            return
        if len(branches) > 1:
            self.fuser = ConvFuser([branch.out_channels for branch in branches], cfg.decoder.fuser)
            channels = cfg.decoder.fuser
        if cfg.decoder.layers:
            self.decoder = SecondWithFpn(channels, cfg.decoder)
            _set_momentum(self.decoder, cfg.norm_momentum)
            channels, self.grid = self.decoder.out_channels, _coarser(self.grid, self.decoder.stride)
        if head.detection != "none":
            kind = TransFusionHead if head.detection == "transfusion" else CenterHead
            self.detection = kind(channels, self.grid, cfg.classes, head)
        if head.map:
            self.map = SegHead(channels, self.grid, len(cfg.map_classes), map_grid(cfg), head.map_width)

    def forward(self, lidar: LidarInput | None = None, cameras: CameraInput | None = None) -> BevOutput:
        """What a branch of the model does not read may be None."""
        seen = None if self.camera is None else self.camera(cameras, lidar)
        felt = None if self.lidar is None else self.lidar(lidar)
        given = [bev for bev in (seen, felt) if bev is not None]
        bev = given[0] if self.fuser is None else self.fuser(given)
        bev = bev if self.decoder is None else self.decoder(bev)
        found, drawn = (None if head is None else head(bev) for head in (self.detection, self.map))
        return BevOutput(felt, seen, found, drawn)


def save_branches(path: Path, model: BevModel, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a safetensors file that the next stage starts from, with the lists of channels of the model's branches.

    `weights` are the model's by name where another state than the present is meant (an engine's, an average).
    """
    branches = {"lidar": model.lidar, "camera": model.camera}
    channels = {name: branch.channels for name, branch in branches.items() if branch is not None}
    facts = {_FACTS: json.dumps({"channels": channels})}
    with new_file(path, "checkpoint") as partial:
        write_tensors(partial, model.state_dict() if weights is None else weights, facts)


def load_pretrained(model: BevModel, path: Path, name: Branch) -> str:
    """Fill a branch of `model` from a file of `save_branches`; projectors, fuser, decoder and heads start fresh.

    Returns how many tensors were loaded, and which of the branch's the file lacks (they stay as they were) or has beside
    them.
    """
    branch = model.lidar if name == "lidar" else model.camera
    if branch is None:
        raise UserError(f"the model has no {name} branch to load; see model.lidar.encoder and model.camera")
    tensors = read_safetensors(path, what="checkpoint")
    with safe_open(path, "pt") as stream:
        facts = (stream.metadata() or {}).get(_FACTS)
    if facts is None:
        raise UserError(f"checkpoint {path} is none of CALICO's; name a file of its export")
    channels, own = json.loads(facts)["channels"], branch.state_dict()
    given = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    common = own.keys() & given.keys()
    if channels.get(name, branch.channels) != branch.channels:
        told = f"the channels {channels[name]}, but model.{name} has {branch.channels}"
        raise UserError(f"checkpoint {path}: its {name} branch has {told}; use one config for both stages")
    if not common:
        told = f"nothing in it is the model's {name} branch; it has {', '.join(channels)}"
        raise UserError(f"checkpoint {path}: {told}")
    told = differences(own, given)
    if any(own[key].shape != given[key].shape for key in common):
        raise UserError(f"checkpoint {path}: {told}; use one config for both stages")
    branch.load_state_dict(given, strict=False)
    return f"{len(common)} tensors loaded" + (f", {told}" if told else "")


def _set_momentum(part: nn.Module, momentum: float) -> None:
    for norm in part.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.momentum = momentum


def grid_of(bounds: Sequence[float], cell: Sequence[float], field: str = "model.range") -> Grid:
    """Cells between the two corners of `bounds`, which the config's `field` tells."""
    try:
        return Grid(tuple(bounds[:3]), tuple(bounds[3:]), tuple(cell))
    except ValueError:
        told = (
            f"from {list(bounds[:3])} to {list(bounds[3:])} m is no whole number of cells of {list(cell)} m"
        )
        raise UserError(f"config field {field}: {told}") from None


def map_grid(cfg: ModelConfig) -> Grid:
    """Where the map's labels lie."""
    low, high = cfg.head.map_range[2::3]
    cell = [cfg.head.map_cell, cfg.head.map_cell, high - low]
    return grid_of(cfg.head.map_range, cell, "model.head.map_range")


def _coarser(grid: Grid, stride: int) -> Grid:
    """The cells of a map that is `stride` times smaller, with one cell along z."""
    x, y, _ = grid.cell
    return grid_of([*grid.min, *grid.max], [x * stride, y * stride, grid.max[2] - grid.min[2]])
