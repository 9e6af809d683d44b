"""The whole model at the toy world's size: every subset of modalities, one place in both branches, hand-over of stages."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from projects.calico.geometry import (
    bev_sample,
    image_augmentation,
    lidar_augmentation,
    lift_points,
    project,
    transform,
)
from projects.calico.losses import rad_loss
from projects.calico.model import BevModel, LidarInput, load_pretrained, save_branches
from projects.calico.model_config import ModelConfig
from projects.calico.networks.fuser import PointProjector
from projects.calico.networks.lss import CameraInput
from tests.projects.calico.toy import ROOT, load
from tests.projects.calico.toy import TOY_MODEL as TOY
from vlmkd import config
from vlmkd.errors import UserError
from vlmkd.train.task import frozen

CAMERA = torch.tensor([[0.0, 0, 1, 0.5], [-1, 0, 0, 0], [0, -1, 0, -0.2], [0, 0, 0, 1]], dtype=torch.float64)
EYE = torch.eye(4, dtype=torch.float64)


def only(which: str, cfg: ModelConfig = TOY) -> ModelConfig:
    if which == "lidar":
        return replace(cfg, camera=replace(cfg.camera, encoder="none"))
    return replace(cfg, lidar=replace(cfg.lidar, encoder="none")) if which == "camera" else cfg


def bare(cfg: ModelConfig) -> ModelConfig:
    return replace(cfg, head=replace(cfg.head, detection="none", map=False))


def lidar_input(frames: int = 2, seed: int = 0) -> LidarInput:
    make = torch.Generator().manual_seed(seed)
    points = torch.rand(400 * frames, 5, generator=make) * torch.tensor([42.0, 42, 8, 1, 0])
    return LidarInput(
        points - torch.tensor([21.0, 21, 5, 0, 0]), torch.arange(frames).repeat_interleave(400), frames
    )


def camera_input(frames: int = 2, views: int = 4, lidar_aug: Tensor = EYE) -> CameraInput:
    poses = torch.stack([lidar_augmentation(yaw=torch.pi / 2 * n) @ CAMERA for n in range(views)])
    intrinsics = torch.tensor([[73.0, 0, 80], [0, 73, 40], [0, 0, 1]], dtype=torch.float64)
    return CameraInput(
        torch.randn(frames, views, 3, 40, 80, generator=torch.Generator().manual_seed(0)),
        intrinsics.expand(frames, views, 3, 3),
        poses.expand(frames, views, 4, 4),
        image_augmentation(0.5, (1, 0), (40, 80), flip=True, angle=0.03).expand(frames, views, 4, 4),
        lidar_aug.expand(frames, 4, 4),
    )


@pytest.mark.parametrize("which", ["lidar", "camera", "both"])
@pytest.mark.parametrize("detection", ["center", "transfusion"])
def test_any_subset_of_modalities_trains_and_decodes(which: str, detection: Any) -> None:
    cfg = replace(only(which), head=replace(TOY.head, detection=detection, queries=12, hidden=16))
    model = BevModel(cfg)
    lidar, cameras = (
        (None if which == "camera" else lidar_input()),
        (None if which == "lidar" else camera_input()),
    )
    out = model(lidar, cameras)
    assert (out.lidar is None) == (which == "camera") and (out.camera is None) == (which == "lidar")
    for bev, channels in ((out.lidar, 64), (out.camera, 32)):
        assert bev is None or bev.shape == (2, channels, 48, 48)
    assert out.map.shape == (2, 3, 96, 96) and (model.fuser is not None) == (which == "both")
    boxes = torch.tensor([[3.0, 4, -1, 4, 2, 1.5, 0.3, 0, 0], [-8, 2, -1, 0.6, 0.6, 1.7, 0, 1, 0]])
    losses = model.detection.loss(
        out.detection, [boxes, boxes[:0]], [torch.tensor([0, 2]), torch.tensor([]).long()]
    )
    losses |= model.map.loss(out.map, torch.zeros(2, 3, 96, 96))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    frames = model.detection.decode(model(lidar, cameras).detection)
    assert len(frames) == 2 and all(f.boxes.shape[1] == 9 for f in frames)


def test_a_model_without_heads_is_its_branches() -> None:
    model = BevModel(bare(TOY))
    assert model.fuser is None and model.decoder is None
    out = model(lidar_input(), camera_input())
    assert out.detection is None and out.map is None and out.lidar.shape[2:] == out.camera.shape[2:]
    assert model.grid.shape == (48, 48, 1) and model.grid.cell[:2] == (0.8, 0.8)
    voxels = replace(TOY.lidar, encoder="voxels", cell=[0.4, 0.4, 0.25], channels=[4, 8])
    cfg = only("lidar", replace(bare(TOY), lidar=voxels))
    assert BevModel(cfg)(lidar_input()).lidar.shape == (2, 8, 12, 12)
    decoder = replace(
        TOY.decoder, layers=[1, 1], widths=[8, 16], strides=[1, 2], fpn_widths=[8, 8], ups=[1.0, 2.0]
    )
    deep = BevModel(replace(TOY, decoder=decoder))
    norms = [m.momentum for m in [*deep.lidar.modules(), *deep.decoder.modules()] if hasattr(m, "momentum")]
    assert len(norms) == 13 and set(norms) == {0.1}
    assert deep(lidar_input(), camera_input()).map.shape == (2, 3, 96, 96) and deep.decoder.out_channels == 16


@pytest.mark.parametrize("detection", ["center", "transfusion"])
def test_weights_in_half_precision_train(detection: Any) -> None:
    """Geometry, pooling and losses stay in float32, here even with the norms' buffers rounded, which DeepSpeed leaves."""
    torch.manual_seed(0)
    cfg = replace(TOY, head=replace(TOY.head, detection=detection, queries=12, hidden=16))
    full = BevModel(cfg)
    model, projector = BevModel(cfg), PointProjector(64)
    model.load_state_dict(full.state_dict())
    model.bfloat16()
    out, expected = (m(lidar_input(), camera_input()) for m in (model, full))
    for got, wanted in ((out.lidar, expected.lidar), (out.camera, expected.camera), (out.map, expected.map)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.05 * wanted.abs().max().item())
    boxes, labels = torch.tensor([[3.0, 4, -1, 4, 2, 1.5, 0.3, 0, 0]]), torch.tensor([0])
    losses = list(model.detection.loss(out.detection, [boxes] * 2, [labels] * 2).values())
    losses.append(
        projector.bfloat16()(
            bev_sample(out.lidar, boxes[None, :, :2].expand(2, 1, 2), model.grid)[:, 0]
        ).sum()
    )
    assert all(loss.dtype == torch.float32 for loss in losses)
    torch.stack(losses).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.detection.decode(out.detection)[0].boxes.dtype == torch.float32


AUGMENTATIONS = {
    "none": EYE,
    "rotation": lidar_augmentation(yaw=0.7),
    "flip x": lidar_augmentation(flip_x=True),
    "flip y": lidar_augmentation(flip_y=True),
    "scale": lidar_augmentation(scale=1.1),
    "all": lidar_augmentation(yaw=-1.1, scale=0.93, flip_y=True, shift=(0.7, -0.4, 0.1)),
}


@pytest.mark.parametrize("aug", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_one_thing_peaks_in_one_cell_of_both_branches(aug: Tensor) -> None:
    """i.4.1: x and y, a forgotten `lidar_aug`, a flip, an offset of half a cell; through every layer of both branches."""
    model = BevModel(bare(TOY)).eval()
    for layer in model.modules():  # convolutions that blur, so that a peak stays where it is
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.constant_(layer.weight, 0.01)
    linear = model.lidar.encoder.linears[0].weight
    linear.data = torch.eye(10)[3].expand_as(linear).clone()  # a pillar is its points' intensity
    cameras, view = camera_input(1, lidar_aug=aug), model.camera.view
    for v, d, row, column in [(0, 7, 5, 12), (1, 11, 4, 3), (3, 4, 6, 17)]:
        pixel = view.frustum[d, row, column].double()
        place = lift_points(pixel.expand(1, 4, 1, 3), cameras.intrinsics, cameras.cam2lidar, cameras.img_aug)[
            0, v
        ]
        there = transform(place, aug)[0]
        wanted, inside = model.grid.index(there[None, :2])
        assert inside
        # The LiDAR hits it: points within its cell, in the sweep's frame, which the augmentation moves.
        centre = model.grid.centre(wanted)[0].double()
        cluster = torch.linspace(-0.3, 0.3, 4)
        spots = torch.stack(
            [*torch.meshgrid(cluster + centre[0], cluster + centre[1], indexing="ij")], -1
        ).reshape(-1, 2)
        sweep = transform(torch.cat([spots, there[2:].expand(16, 1)], 1), torch.linalg.inv(aug))
        points = torch.cat([transform(sweep, aug).float(), torch.ones(16, 1), torch.zeros(16, 1)], 1)
        zero = torch.zeros(16, dtype=torch.long)
        canvas = model.lidar.encoder(points, zero, 1)
        assert peak(canvas, 2) == wanted[0].tolist()
        empty = model.lidar(LidarInput(points[:0], zero[:0], 1))
        assert near(model.lidar(LidarInput(points, zero, 1)) - empty, wanted[0])
        # The camera sees it: one pixel, whose depth is certain.
        hot, context = torch.zeros(4, 19, 10, 20), torch.zeros(4, 32, 10, 20)
        hot[v, d, row, column], context[v, :, row, column] = 1, 1
        assert peak(view.downsample(view.splat(hot, context, cameras)), 1) == wanted[0].tolist()
        # And the point is found again in that image.
        pixels, depth = project(
            there[None, None], torch.linalg.inv(cameras.cam2lidar), *cameras[1:2], *cameras[3:]
        )
        torch.testing.assert_close(pixels[0, v, 0], pixel[:2], rtol=0, atol=1e-3)
        assert depth[0, v, 0].item() == pytest.approx(pixel[2].item(), abs=1e-6)


def peak(bev: Tensor, stride: int) -> list[int]:
    """The highest cell of a map [1, C, X, Y], in cells `stride` times as large."""
    heat = bev[0].abs().sum(0)
    return [n // stride for n in divmod(int(heat.argmax()), heat.shape[1])]


def near(bev: Tensor, wanted: Tensor) -> bool:
    """Whether the mass of a map lies around a cell: its middle is at most one cell off."""
    heat = bev[0].abs().sum(0)
    x, y = ((heat.sum(1 - axis) * torch.arange(48)).sum() / heat.sum() for axis in (0, 1))
    return bool((torch.stack([x, y]) - wanted).abs().max() <= 1)


def test_a_teacher_is_the_same_to_the_bit_after_ten_steps() -> None:
    """i.4.6: parameters and BatchNorm's buffers; the student learns."""
    torch.manual_seed(0)
    teacher, student = frozen(BevModel(bare(only("lidar")))), BevModel(bare(only("camera")))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    heads = nn.ModuleList([PointProjector(32), PointProjector(64)])
    optimiser = torch.optim.AdamW([*student.parameters(), *heads.parameters()], 2e-3)
    lidar, cameras = lidar_input(1), camera_input(1)
    inside = teacher.grid.index(lidar.points[:, :2])[1]
    xy, region = lidar.points[None, inside, :2], (torch.arange(int(inside.sum())) % 7) - 1
    losses = []
    for _ in range(10):
        wanted = bev_sample(teacher(lidar).lidar, xy, teacher.grid)[0]
        got = bev_sample(student(cameras=cameras).camera, xy, student.grid)[0]
        loss, _ = rad_loss(heads[0](got), heads[1](wanted), region)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert losses[-1] < losses[0] and not any(p.requires_grad for p in teacher.parameters())


def saved(path: Path, cfg: ModelConfig, seed: int) -> BevModel:
    torch.manual_seed(seed)
    model = BevModel(cfg)
    save_branches(path, model)
    return model


def test_stages_hand_over_their_branches(tmp_path: Path) -> None:
    first = saved(tmp_path / "prc.safetensors", bare(only("lidar")), 0)
    second = saved(tmp_path / "rad.safetensors", bare(only("camera")), 1)
    torch.manual_seed(2)
    model = BevModel(TOY)
    head = model.detection.tasks[0]["heat"][1].weight.clone()
    report = load_pretrained(model, tmp_path / "prc.safetensors", "lidar")
    assert report == f"{len(first.lidar.state_dict())} tensors loaded"  # and none is missing or unexpected
    load_pretrained(model, tmp_path / "rad.safetensors", "camera")
    for own, given in ((model.lidar, first.lidar), (model.camera, second.camera)):
        assert all(torch.equal(t, given.state_dict()[name]) for name, t in own.state_dict().items())
    assert torch.equal(model.detection.tasks[0]["heat"][1].weight, head)
    # An engine's weights, of which the branch's are kept; one tensor less and one more are told.
    weights = {name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}
    gone = weights.pop("camera.neck.convs.0.0.weight")
    weights["camera.neck.more"] = gone
    save_branches(tmp_path / "own.safetensors", model, weights)
    load_pretrained(model, tmp_path / "own.safetensors", "lidar")
    report = load_pretrained(model, tmp_path / "own.safetensors", "camera")
    shape = list(gone.shape)
    assert f", 1 missing: neck.convs.0.0.weight {shape}; 1 unexpected: neck.more {shape}" in report
    assert (model.lidar.encoder.linears[0].weight == 2).all() and torch.equal(
        model.detection.tasks[0]["heat"][1].weight, head
    )


def test_hand_overs_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "prc.safetensors"
    model = saved(path, bare(only("lidar")), 0)

    def refused(told: str, cfg: ModelConfig, branch: Any, given: Path = path) -> None:
        with pytest.raises(UserError, match=told):
            load_pretrained(BevModel(cfg), given, branch)

    refused("nothing in it is the model's camera branch; it has lidar", bare(TOY), "camera")
    refused("the model has no camera branch", bare(only("lidar")), "camera")
    wide = replace(TOY, lidar=replace(TOY.lidar, channels=[16]))
    refused(
        r"the channels \[5, 24, 32, 64, 64\], but model.lidar has \[5, 16, 32, 64, 64\]",
        bare(wide),
        "lidar",
    )
    refused("does not exist", bare(TOY), "lidar", tmp_path / "nothing.safetensors")
    other = {name.replace("lidar.", "lidar.old."): tensor for name, tensor in model.state_dict().items()}
    save_branches(tmp_path / "old.safetensors", model, other)
    refused("nothing in it is the model's lidar branch", bare(TOY), "lidar", tmp_path / "old.safetensors")
    from safetensors.torch import save_file

    save_file({"lidar.x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    refused("none of CALICO's", bare(TOY), "lidar", tmp_path / "foreign.safetensors")
    reshaped = {
        name: tensor[..., :1] if tensor.ndim == 4 else tensor for name, tensor in model.state_dict().items()
    }
    save_branches(tmp_path / "shape.safetensors", model, reshaped)
    refused(
        r"\[32, 24, 3, 1\] instead of \[32, 24, 3, 3\]",
        bare(TOY),
        "lidar",
        tmp_path / "shape.safetensors",
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"camera": replace(TOY.camera, cell=0.4)}, "model.camera.cell is 0.4"),
        ({"camera": replace(TOY.camera, image_size=[42, 80])}, "image_size is .42, 80.; use multiples of 4"),
        ({"range": [-19.3, -19.2, -5.0, 19.2, 19.2, 3.0]}, "no whole number of cells"),
        ({"head": replace(TOY.head, tasks=["car", "bus"])}, "model.head.tasks has the classes bus, car"),
        ({"head": replace(TOY.head, circles=[1.0, 2.0])}, "model.head.circles has 2 numbers for 1 tasks"),
    ],
)
def test_configs_that_do_not_fit_are_one_line(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        BevModel(replace(TOY, **changes))


VOXELS = {"model__lidar__encoder": "voxels", "model__lidar__channels": "[4,8]"}
TIMM = {
    "model__camera__encoder": "resnet18",
    "model__camera__stages": "[2,3,4]",
    "model__camera__drop_path": 0,
}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model__lidar__cell": "[0.4,0.4,4.0]"}, r"lidar.cell is .*; a pillar is as high as model.range, 8 m"),
        (VOXELS | {"model__lidar__cell": "[0.4,0.4,4.0]"}, "lidar.cell is .*2 cells along z are too few"),
        (VOXELS | {"model__lidar__channels": "[24]"}, r"lidar.channels is \[24\]; of voxels it is"),
        (VOXELS | {"model__lidar__cell": "[0.4,0.4,0.25]", "model__lidar__backend": "spconv"},
         "lidar.backend is spconv, which is not installed"),
        ({"model__lidar__strides": "[2,1]"}, r"lidar.ups are .* for strides \[2, 1\], .* different sizes"),
        ({"model__lidar__widths": "[32]"}, "lidar.widths has 1 numbers for the 2 stages"),
        ({"model__decoder__layers": "[1]"}, "decoder.widths has 0 numbers for the 1 stages"),
        ({"model__camera__widths": "[16]"}, "camera.widths is .16.; tiny gives the maps of its last two stages"),
        ({"model__camera__depth": "[20,1,1]"}, "camera.depth is .*; it is the first bin, the end, the step"),
        ({"model__head__detection": "transfusion", "model__head__width": 20}, "head.width is 20; .* 8 heads"),
        ({"model__head__map_range": "[-19.3,-19.2,-10,19.2,19.2,10]"}, "head.map_range: .* no whole number"),
        ({"model__camera__cell": 0.7}, "camera.cell: .* no whole number"),
        (TIMM | {"model__camera__encoder": "resnet1"}, "camera.encoder: timm has no model resnet1; did you mean"),
        (TIMM | {"model__camera__stages": "[2,3,7]"}, r"camera.stages is \[2, 3, 7\], which resnet18 does not"),
        (TIMM | {"model__camera__stages": "[2]"}, "camera.stages is .2.; the pyramid needs two maps"),
        (TIMM | {"model__camera__stages": "[3,2]"}, "camera.stages is .3, 2."),
    ],
)  # fmt: skip
def test_mistakes_of_a_config_name_its_field(
    fields: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "spconv" else find(name))
    with pytest.raises(UserError, match=f"config field model.{told}"):
        BevModel(load(ROOT, "finetune", **fields).model)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(ROOT, "finetune", **TIMM, model__camera__pretrained="true").model

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no net")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(
        UserError, match="timm:resnet18: its weights .*offline mode is on.*set model.camera.pretrained=false"
    ):
        BevModel(cfg)


def test_configs_are_checked_and_load_back() -> None:
    for cfg in (TOY, ModelConfig()):
        values = config.parse_yaml(config.to_yaml(cfg), "test")
        assert config.fitted(ModelConfig, values, "") == values
        assert config.help_text(ModelConfig).count("\n    \n") == 0  # every field has its words
    with pytest.raises(UserError, match="sees something"):
        only("lidar", only("camera"))
    with pytest.raises(UserError, match="mode=hard needs a cap"):
        replace(TOY.lidar, mode="hard")


def test_depth_lss_needs_the_lidar() -> None:
    cfg = only("camera", replace(TOY, camera=replace(TOY.camera, view="depth_lss", widths=[4, 8, 8, 16])))
    with pytest.raises(UserError, match="needs the LiDAR's points"):
        BevModel(bare(cfg))(cameras=camera_input())
    assert BevModel(bare(cfg))(lidar_input(), camera_input()).camera.shape == (2, 32, 48, 48)
    with pytest.raises(UserError, match="needs maps of stride 8, not 4"):
        BevModel(replace(cfg, camera=replace(cfg.camera, widths=[4, 8, 8])))
