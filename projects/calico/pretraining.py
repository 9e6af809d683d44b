"""What is trained before fine-tuning: branches with their projectors, and the losses over a batch's samples.

Letters: B frames, s sampled points of a frame, D width of a projected vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projects.calico import losses
from projects.calico.config import UNTRAINED, CalicoConfig, branches
from projects.calico.geometry import Grid, bev_sample
from projects.calico.model import BevModel, load_pretrained
from projects.calico.networks.fuser import BoxProjector, PointProjector
from vlmkd.errors import UserError
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
        self.model = BevModel(branches(cfg.model, lidar=cfg.stage != "rad", camera=cfg.stage != "prc"))
        self.projectors, self.terms = nn.ModuleDict(), []
        if self.model.lidar is not None:
            lidar_channels, self.terms = self.model.lidar.out_channels, terms_of(cfg)
            for term in self.terms:
                kind = BoxProjector if term == "box_clip" else PointProjector
                self.projectors[term] = kind(lidar_channels)
        if self.model.camera is not None:
            channels, plain = self.model.camera.out_channels, cfg.rad.arm == "mse"
            self.projectors["camera"] = (
                nn.Linear(channels, lidar_channels) if plain else PointProjector(channels)
            )
            if not plain and cfg.rad.teacher_projector == "own":
                self.projectors["lidar"] = PointProjector(lidar_channels)

    def forward(self, batch: Batch, taught: Tensor | None = None) -> Projected:
        """`taught`: the teacher's samples of the LiDAR's map, all frames together, or what its projector made of them."""
        found: Projected = {}
        places, lidar, camera = batch["places"], self.model.lidar, self.model.camera
        if lidar is not None:
            maps = [lidar(view) for view in batch["lidar"]]
            if self.terms == ["box_clip"]:
                pairs = zip(maps, batch["region_boxes"], strict=True)
                project = self.projectors["box_clip"]
                return {"box_clip": [project(bev, boxes, lidar.grid) for bev, boxes in pairs]}
            found = {
                term: [
                    self.projectors[term](samples(bev, own, lidar.grid))
                    for bev, own in zip(maps, places, strict=True)
                ]
                for term in self.terms
            }
            taught = None if camera is None else samples(maps[0], places[0], lidar.grid)
        if camera is not None:
            seen = samples(camera(batch["cameras"]), places[0], camera.grid)
            project = self.projectors["camera"]
            seen = project(seen.to(next(project.parameters()).dtype))
            if "lidar" in self.projectors:
                taught = self.projectors["lidar"](taught)
            assert taught is not None
            found["rad"] = [seen, taught]
        return found


def terms_of(cfg: CalicoConfig) -> list[str]:
    """The terms of the LiDAR's loss, each of which has a projector."""
    if cfg.prc.arm in ("pointcontrast", "box_clip"):
        return [cfg.prc.arm]
    return [name for name, weight in (("plrc", _alpha(cfg)), ("rapc", 1 - _alpha(cfg))) if weight]


def _alpha(cfg: CalicoConfig) -> float:
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
            load_pretrained(self.model, folder / WEIGHTS, "lidar")
        self.projector: nn.Module = nn.Identity()
        if cfg.rad.teacher_projector == "frozen_rapc":
            self.projector = PointProjector(self.model.lidar.out_channels)
            given = read_safetensors(folder / PROJECTORS, what="projectors of the teacher")
            own = {
                key.removeprefix("rapc."): value for key, value in given.items() if key.startswith("rapc.")
            }
            if own.keys() != self.projector.state_dict().keys():
                told = "is frozen_rapc, but the run of rad.teacher_ckpt trained no projector of RAPC; use own"
                raise UserError(f"config field rad.teacher_projector {told}")
            self.projector.load_state_dict(own)
        frozen(self)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Samples [sum of s, C] of the first view's map, or their vectors."""
        lidar = self.model.lidar
        assert lidar is not None
        return self.projector(samples(lidar(batch["lidar"][0]), batch["places"][0], lidar.grid))


def pretrain_losses(
    cfg: CalicoConfig, found: Projected, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses by name, means over the frames, and numbers for the log."""
    together, prc, rad = cfg.prc.negatives == "batch", cfg.prc, cfg.rad
    region: list[Tensor] = [losses.joined_regions(batch["region"])] if together else batch["region"]
    sizes = [len(one) for one in region]
    pairs: dict[str, Sequence[Any]] = {  # of each frame, the vectors of both views
        name: list(zip(*(view.split(sizes) for view in views), strict=True))
        for name, views in found.items()
        if name != "box_clip"
    }
    terms: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    if "box_clip" in found:
        terms["box_clip"] = losses.box_clip_loss(*found["box_clip"])
    elif "pointcontrast" in found:
        rows = [losses.pointcontrast_loss(*pair, prc.tau) for pair in pairs["pointcontrast"]]
        terms["pointcontrast"], metrics = _mean(rows)
    elif cfg.stage != "rad":
        both = zip(*(pairs.get(name, [None] * len(region)) for name in ("plrc", "rapc")), region, strict=True)
        terms[prc.arm], metrics = _mean(
            [losses.prc_loss(*row, alpha=_alpha(cfg), tau=prc.tau) for row in both]
        )
    if "rad" in found:
        weights: list[Any] = [rad.weight] * len(region)
        if rad.weight == "centre":
            true = zip(batch["places"][0], batch["boxes"], strict=True)
            weights = [losses.centre_weights(places, boxes) for places, boxes in true]
            weights = [torch.cat(weights)] if together else weights
        taught = list(zip(pairs["rad"], region, weights, strict=True))
        if "seen" in batch:  # stage=joint: the cameras learn where they look
            seen = [torch.cat(batch["seen"])] if together else batch["seen"]
            taught = [_at(rows, *row) for rows, row in zip(seen, taught, strict=True)]
        rows = [
            (losses.feature_mse(*pair, None if weight == "uniform" else own), {})
            if rad.arm == "mse"
            else losses.rad_loss(*pair, own, rad.tau, weight=weight, direction=rad.direction)
            for pair, own, weight in taught
        ]
        terms[rad.arm], told = _mean(rows)
        metrics |= {f"rad_{name}": value for name, value in told.items()}
    return terms, metrics


def _at(rows: Tensor, pair: Sequence[Tensor], region: Tensor, weight: Any) -> tuple[Any, Tensor, Any]:
    """Of a frame's samples those of `rows`, bool [s]."""
    return [part[rows] for part in pair], region[rows], weight[rows] if isinstance(weight, Tensor) else weight


def _mean(rows: Sequence[tuple[Tensor, losses.Stats]]) -> tuple[Tensor, losses.Stats]:
    """Over frames."""
    stats = {name: torch.stack([own[name].float() for _, own in rows]).mean() for name in rows[0][1]}
    return torch.stack([loss for loss, _ in rows]).mean(), stats
