"""What is trained before fine-tuning: branches with their projectors, and the losses over a batch's samples.

Letters: B frames, s sampled points of a frame, D width of a projected vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from projects.calico.config import UNTRAINED, CalicoConfig, branches
from projects.calico.geometry import Grid, bev_sample
from projects.calico.losses import (
    Stats,
    box_clip_loss,
    centre_weights,
    feature_mse,
    joined_regions,
    pointcontrast_loss,
    prc_loss,
    rad_loss,
)
from projects.calico.model import BevModel, load_pretrained
from projects.calico.networks.fuser import BoxProjector, PointProjector
from vlmkd.tensor_files import read_safetensors
from vlmkd.train.task import Batch, frozen

PROJECTORS = "projectors.safetensors"
"""File of an export that holds what the next stage drops, but for RAPC's projector where it is asked for."""
WEIGHTS = "model.safetensors"
Projected = dict[str, list[Tensor]]
"""By term: of each view (or of camera and LiDAR), the vectors of all samples of all frames."""


class PretrainStudent(nn.Module):
    """The branches that a stage trains, and a projector for each term of its loss."""

    def __init__(self, cfg: CalicoConfig, lidar_channels: int = 0) -> None:
        """`lidar_channels` of the teacher's map, where the student has no LiDAR branch."""
        super().__init__()
        prc, rad = cfg.stage in ("prc", "joint"), cfg.stage in ("rad", "joint")
        self.model = BevModel(branches(cfg.model, lidar=prc, camera=rad))
        self.projectors = nn.ModuleDict()
        if prc:
            assert self.model.lidar is not None
            lidar_channels = self.model.lidar.out_channels
            for term in terms_of(cfg):
                box = term == "box_clip"
                self.projectors[term] = (BoxProjector if box else PointProjector)(lidar_channels)
        if rad:
            assert self.model.camera is not None
            channels = self.model.camera.out_channels
            if cfg.rad.arm == "mse":
                self.projectors["camera"] = nn.Linear(channels, lidar_channels)
            else:
                self.projectors["camera"] = PointProjector(channels)
                if cfg.rad.teacher_projector == "own":
                    self.projectors["lidar"] = PointProjector(lidar_channels)

    def forward(self, batch: Batch, taught: Tensor | None = None) -> Projected:
        """`taught`: the teacher's samples of the LiDAR's map, all frames together, or what its projector made of them."""
        found: Projected = {}
        maps: list[Tensor] = []
        if self.model.lidar is not None:
            maps = [self.model.lidar(view) for view in batch["lidar"]]
            grid = self.model.lidar.grid
            for term, projector in self.projectors.items():
                if term == "box_clip":
                    pairs = zip(maps, batch["region_boxes"], strict=True)
                    found[term] = [projector(bev, boxes, grid) for bev, boxes in pairs]
                elif term not in ("camera", "lidar"):
                    pairs = zip(maps, batch["places"], strict=True)
                    found[term] = [projector(samples(bev, places, grid)) for bev, places in pairs]
        if self.model.camera is not None:
            camera, places = self.model.camera(batch["cameras"]), batch["places"][0]
            if maps and self.model.lidar is not None:
                taught = samples(maps[0], places, self.model.lidar.grid)
            assert taught is not None
            seen = samples(camera, places, self.model.camera.grid)
            found["rad"] = [self._projected("camera", seen), self._projected("lidar", taught)]
        return found

    def _projected(self, name: str, rows: Tensor) -> Tensor:
        if name not in self.projectors:
            return rows
        projector = self.projectors[name]
        return projector(rows.to(next(projector.parameters()).dtype))


def terms_of(cfg: CalicoConfig) -> list[str]:
    """The terms of the LiDAR's loss, each of which has a projector."""
    arm, alpha = cfg.prc.arm, alpha_of(cfg)
    if arm in ("pointcontrast", "box_clip"):
        return [arm]
    return [name for name, weight in (("plrc", alpha), ("rapc", 1 - alpha)) if weight]


def alpha_of(cfg: CalicoConfig) -> float:
    """The weight of PLRC (docs/papers/calico.md, eq. 3)."""
    return {"plrc": 1.0, "rapc": 0.0}.get(cfg.prc.arm, cfg.prc.alpha)


def samples(bev: Tensor, places: Sequence[Tensor], grid: Grid) -> Tensor:
    """Rows [sum of s, C] of a map [B, C, X, Y] at the places [s, 2] of each frame."""
    rows = [bev_sample(one[None], xy[None], grid)[0] for one, xy in zip(bev, places, strict=True)]
    return torch.cat(rows)


class Teacher(nn.Module):
    """The frozen LiDAR branch, and RAPC's projector where the student is held against its vectors."""

    def __init__(self, cfg: CalicoConfig) -> None:
        super().__init__()
        self.model = BevModel(branches(cfg.model, lidar=True, camera=False))
        assert self.model.lidar is not None
        folder = Path(cfg.rad.teacher_ckpt)
        if cfg.rad.teacher_ckpt != UNTRAINED:
            load_pretrained(self.model, folder / WEIGHTS, ["lidar"])
        self.projector: PointProjector | None = None
        if cfg.rad.teacher_projector == "frozen_rapc":
            self.projector = PointProjector(self.model.lidar.out_channels)
            given = read_safetensors(folder / PROJECTORS, what="projectors of the teacher")
            own = {
                name.removeprefix("rapc."): value for name, value in given.items() if name.startswith("rapc.")
            }
            self.projector.load_state_dict(own)
        frozen(self)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Samples [sum of s, C] of the first view's map, or their vectors."""
        assert self.model.lidar is not None
        rows = samples(self.model.lidar(batch["lidar"][0]), batch["places"][0], self.model.lidar.grid)
        return rows if self.projector is None else self.projector(rows)


def pretrain_losses(
    cfg: CalicoConfig, found: Projected, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses by name, means over the frames, and numbers for the log."""
    together = cfg.prc.negatives == "batch"
    region = [joined_regions(batch["region"])] if together else batch["region"]
    sizes = [len(one) for one in region]
    split = {
        name: [view.split(sizes) for view in views] for name, views in found.items() if name != "box_clip"
    }
    terms: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    if "box_clip" in found:
        first, second = found["box_clip"]
        terms["box_clip"] = box_clip_loss(first, second)
    elif cfg.stage != "rad":
        rows = []
        for number, own in enumerate(region):
            first, second = (
                {name: views[view][number] for name, views in split.items() if name != "rad"}
                for view in (0, 1)
            )
            rows.append(_contrast(cfg, first, second, own))
        terms[cfg.prc.arm], metrics = _mean(rows)
    if "rad" in found:
        weights = _weights(cfg, batch, together)
        rows = [_distil(cfg, *row) for row in zip(*split["rad"], region, weights, strict=True)]
        terms[cfg.rad.arm], own_metrics = _mean(rows)
        metrics |= {f"rad_{name}": value for name, value in own_metrics.items()}
    return terms, metrics


def _contrast(
    cfg: CalicoConfig, first: dict[str, Tensor], second: dict[str, Tensor], region: Tensor
) -> tuple[Tensor, Stats]:
    if cfg.prc.arm == "pointcontrast":
        pair = first["pointcontrast"], second["pointcontrast"]
        return pointcontrast_loss(*pair, cfg.prc.tau, chunk=cfg.prc.chunk)
    pairs = [(first[name], second[name]) if name in first else None for name in ("plrc", "rapc")]
    return prc_loss(*pairs, region, alpha=alpha_of(cfg), tau=cfg.prc.tau, chunk=cfg.prc.chunk)


def _distil(
    cfg: CalicoConfig, camera: Tensor, lidar: Tensor, region: Tensor, weights: Tensor | None
) -> tuple[Tensor, Stats]:
    rad = cfg.rad
    if rad.arm == "mse":
        return feature_mse(camera, lidar, None if rad.weight == "uniform" else region), {}
    weight = weights if rad.weight == "centre" and weights is not None else "region"
    return rad_loss(
        camera, lidar, region, rad.tau, weight="uniform" if rad.weight == "uniform" else weight,
        direction=rad.direction, chunk=cfg.prc.chunk,
    )  # fmt: skip


def _weights(cfg: CalicoConfig, batch: Batch, together: bool) -> list[Tensor | None]:
    """Of the points by true boxes, where that is asked for."""
    if cfg.rad.weight != "centre":
        return [None] * (1 if together else len(batch["region"]))
    pairs = zip(batch["places"][0], batch["boxes"], strict=True)
    weights = [centre_weights(places, boxes) for places, boxes in pairs]
    return [torch.cat(weights)] if together else list(weights)


def _mean(rows: Sequence[tuple[Tensor, Stats]]) -> tuple[Tensor, Stats]:
    """Over frames."""
    stats = {name: torch.stack([own[name].float() for _, own in rows]).mean() for name in rows[0][1]}
    return torch.stack([loss for loss, _ in rows]).mean(), stats
