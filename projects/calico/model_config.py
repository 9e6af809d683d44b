"""What a BEV model is made of: the paper's sizes are the defaults, `TOY` those of the toy world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from projects.calico.networks.center import CIRCLES, NUSCENES_TASKS
from projects.calico.networks.seg import MAP_CLASSES
from vlmkd.config import AboveZero, Amount, BelowOne, Count, Positive, Range, require

Bounds = Annotated[list[float], Range(-1000, 1000, length=6)]
"""Of a grid: the lower corner (x, y, z), then the upper one, metres."""
Heights = Annotated[list[float], Range(-1000, 1000, length=2, ascending=True)]
Cell = Annotated[list[float], Range(above=True, length=3)]
Widths = Annotated[list[int], Range(1)]
Layers = Annotated[list[int], Range()]
Ups = Annotated[list[float], Range(above=True)]
Size = Annotated[list[int], Range(1, length=2)]
Squares = Annotated[list[float], Range()]
Bins = Annotated[list[float], Range(above=True, length=3)]


def _of(*values: int) -> list[int]:
    """A default that is a list."""
    return field(default_factory=lambda: list(values))


@dataclass(frozen=True, kw_only=True)
class LidarConfig:
    """The LiDAR branch: points to the map that PRC trains and RAD teaches."""

    encoder: Literal["pillars", "voxels", "none"] = "pillars"
    """`pillars` and SECOND, `voxels` and sparse convolutions, or `none` for a model that sees images only."""
    cell: Cell = field(default_factory=lambda: [0.2, 0.2, 8.0])
    """Metres of a pillar (as high as the grid) or a voxel; the paper's voxels are 0.075, 0.075, 0.2."""
    channels: Widths = _of(64, 64)
    """Of the pillars' layers; of voxels the first stage's, which doubles from stage to stage, and the last layer's."""
    mode: Literal["dynamic", "hard"] = "dynamic"
    """Pillars: all points, or capped and padded as released weights expect."""
    max_points: Count = 0
    """Points of a voxel that are averaged, the first so many (BEVFusion: 10), or of a hard pillar (20); 0: all."""
    layers: Layers = _of(3, 5, 5)
    """SECOND behind pillars: convolutions of a stage beside its first."""
    widths: Widths = _of(64, 128, 256)
    """SECOND behind pillars: channels of its stages."""
    strides: Widths = _of(2, 2, 2)
    """SECOND behind pillars: strides of its stages."""
    fpn_widths: Widths = _of(128, 128, 128)
    """SECOND behind pillars: channels that each stage gives to the map."""
    ups: Ups = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """SECOND behind pillars: how many times each stage's size the map is."""
    backend: Literal["torch", "spconv"] = "torch"
    """What convolves voxels."""

    def __post_init__(self) -> None:
        capped = self.mode == "dynamic" or self.max_points > 0
        require(capped, "model.lidar.max_points", "is 0; mode=hard needs a cap, such as 20")


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """The camera branch: images to a map of the same cells."""

    encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model, `tiny` for the toy world's, or `none` for a model that sees points only."""
    pretrained: bool = True
    """Start from timm's ImageNet weights."""
    stages: Layers = _of(1, 2, 3)
    """timm's feature maps that are read, from fine to coarse; of a ResNet 2, 3, 4."""
    widths: Widths = _of(16, 32, 64)
    """Channels of `tiny`."""
    drop_path: BelowOne = 0.2
    """Stochastic depth of the timm model."""
    image_size: Size = _of(256, 704)
    """Rows and columns of the network's images."""
    neck: Positive = 256
    """Channels of the pyramid."""
    view: Literal["lss", "depth_lss"] = "lss"
    """`depth_lss` also reads the LiDAR's depths, and can be no student of RAD."""
    channels: Positive = 80
    """Channels of the map."""
    depth: Bins = field(default_factory=lambda: [1.0, 60.0, 0.5])
    """Depth bins: first, end, step, metres."""
    cell: AboveZero = 0.4
    """Metres of a cell into which features are summed."""
    height: Heights = field(default_factory=lambda: [-10.0, 10.0])
    """Lowest and highest z of what is summed."""
    downsample: Positive = 2
    """The map's cells are so many times as large; 1 leaves out the convolutions that do it."""
    pixel_grid: Literal["corner", "center"] = "corner"
    """Pixel of a feature: spread from the first to the last (BEVFusion's), or the middle of its patch."""
    rounding: Literal["floor", "trunc"] = "floor"
    """`trunc` repeats BEVFusion's cells for released weights."""
    pool: Literal["index_add", "sparse", "sorted"] = "index_add"
    """How cells are summed; `sorted` is the same to the last bit on every run on a GPU."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """From the maps of the modalities to what the heads read."""

    fuser: Positive = 256
    """Channels after both maps were concatenated; a model of one modality has no fuser."""
    layers: Layers = _of(5, 5)
    """SECOND: convolutions of a stage beside its first; empty for no decoder."""
    widths: Widths = _of(128, 256)
    """SECOND: channels of its stages."""
    strides: Widths = _of(1, 2)
    """SECOND: strides of its stages."""
    fpn_widths: Widths = _of(256, 256)
    """SECOND: channels that each stage gives to the map."""
    ups: Ups = field(default_factory=lambda: [1.0, 2.0])
    """SECOND: how many times each stage's size the map is."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What is predicted."""

    detection: Literal["transfusion", "center", "none"] = "transfusion"
    """Head for boxes."""
    width: Positive = 128
    """Channels inside the detection head (CenterPoint: 64)."""
    queries: Positive = 200
    """Boxes of a frame (transfusion)."""
    hidden: Positive = 256
    """Width of the feed-forward layer (transfusion)."""
    tasks: list[str] = field(default_factory=lambda: ["+".join(task) for task in NUSCENES_TASKS])
    """Classes that share a heat map, joined by + (center); empty: all share one."""
    nms: Literal["rotated", "circle", "none"] = "rotated"
    """Suppression (center)."""
    circles: Squares = field(default_factory=lambda: list(CIRCLES))
    """Squared distance of each task below which the lower score goes (center, nms=circle)."""
    least_score: Annotated[float, Range(0, 1)] = 0.0
    """Boxes below are left out (CenterPoint: 0.1)."""
    box_weight: Amount = 0.25
    """Of the loss of boxes beside that of the heat map."""
    map: bool = True
    """Whether there is a head for map segmentation."""
    map_width: Count = 0
    """Channels inside it; 0: as many as it reads."""
    map_range: Bounds = field(default_factory=lambda: [-50.0, -50.0, -10.0, 50.0, 50.0, 10.0])
    """Where the map's labels lie."""
    map_cell: AboveZero = 0.5
    """Metres of a label's cell."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything between a batch and its boxes and maps."""

    range: Bounds = field(default_factory=lambda: [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0])
    """Where points count and boxes are found."""
    point_features: Positive = 5
    """Numbers of a point: x, y, z, intensity, time lag."""
    norm_momentum: BelowOne = 0.01
    """How fast BatchNorm's statistics of the LiDAR branch and the decoder follow (BEVFusion's; short runs need 0.1)."""
    classes: list[str] = field(default_factory=lambda: [name for task in NUSCENES_TASKS for name in task])
    """Of boxes, in the order of their labels."""
    map_classes: list[str] = field(default_factory=lambda: list(MAP_CLASSES))
    """Of the map."""
    lidar: LidarConfig = field(default_factory=LidarConfig)
    """LiDAR branch."""
    camera: CameraConfig = field(default_factory=CameraConfig)
    """Camera branch."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Fuser and decoder; built when there is a head."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Heads."""

    def __post_init__(self) -> None:
        seen = self.lidar.encoder != "none" or self.camera.encoder != "none"
        require(
            seen, "model.camera.encoder", "is none, and so is model.lidar.encoder; a model sees something"
        )


TOY = ModelConfig(
    range=[-19.2, -19.2, -5.0, 19.2, 19.2, 3.0],
    norm_momentum=0.1,
    classes=["car", "truck", "pedestrian", "cyclist", "barrier"],
    map_classes=["road", "crossing", "walkway"],
    lidar=LidarConfig(
        cell=[0.4, 0.4, 8.0],
        channels=[24],
        layers=[1, 1],
        widths=[32, 64],
        strides=[2, 2],
        fpn_widths=[32, 32],
        ups=[1.0, 2.0],
    ),
    camera=CameraConfig(
        encoder="tiny",
        pretrained=False,
        image_size=[40, 80],
        neck=32,
        channels=32,
        depth=[1.0, 20.0, 1.0],
        cell=0.8,
        downsample=1,
    ),
    decoder=DecoderConfig(fuser=64, layers=[], widths=[], strides=[], fpn_widths=[], ups=[]),
    head=HeadConfig(
        detection="center",
        width=32,
        tasks=[],
        nms="circle",
        circles=[1.0],
        least_score=0.02,
        map_width=32,
        map_range=[-19.2, -19.2, -10.0, 19.2, 19.2, 10.0],
        map_cell=0.4,
    ),
)
"""synthdrive's: 0.4 m pillars on 96x96, a map of 48x48, images of 40x80, 19 depth bins (specification i.2)."""
