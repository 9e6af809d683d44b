"""What a BEV model is made of; the paper's sizes are the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Annotated, Any, ClassVar, Literal

from projects.calico.maps import LAYERS
from vlmkd.config import AboveZero, BelowOne, Count, Positive, Range, Share, require

Bounds = Annotated[list[float], Range(-1000, 1000, length=6)]
"""Of a grid: the lower corner (x, y, z), then the upper one, metres."""
Heights = Annotated[list[float], Range(-1000, 1000, length=2, ascending=True)]
Three = Annotated[list[float], Range(above=True, length=3)]
Widths = Annotated[list[int], Range(1)]
Layers = Annotated[list[int], Range()]
Ups = Annotated[list[float], Range(above=True)]
Size = Annotated[list[int], Range(1, length=2)]
Squares = Annotated[list[float], Range()]

TASKS = (
    "car", "truck+construction_vehicle", "bus+trailer", "barrier", "motorcycle+bicycle", "pedestrian+traffic_cone",
)  # fmt: skip
"""CenterPoint's groups of nuScenes' classes."""


POINT = 5
"""Numbers of a point: x, y, z, intensity, time lag."""


def listed(*values: Any) -> Any:
    """A default that is a list."""
    return field(default_factory=lambda: list(values))


@dataclass(frozen=True, kw_only=True)
class SecondConfig:
    """SECOND and its pyramid; without layers there is none."""

    where: ClassVar[str] = ""
    """The config field that it is."""
    layers: Layers = listed(3, 5, 5)
    """SECOND: convolutions of a stage beside its first."""
    widths: Widths = listed(64, 128, 256)
    """SECOND: channels of its stages."""
    strides: Widths = listed(2, 2, 2)
    """SECOND: strides of its stages."""
    fpn_widths: Widths = listed(128, 128, 128)
    """SECOND: channels that each stage gives to the map."""
    ups: Ups = listed(0.5, 1.0, 2.0)
    """SECOND: how many times each stage's size the map is."""

    def __post_init__(self) -> None:
        if not self.layers:
            return
        for name in ("widths", "strides", "fpn_widths", "ups"):
            count, told = len(getattr(self, name)), f"numbers for the {len(self.layers)} stages of layers"
            require(count == len(self.layers), f"{self.where}.{name}", f"has {count} {told}")
        told = f"are {self.ups} for strides {self.strides}, which give maps of different sizes or none of whole cells"
        require(len(self.sizes) == 1 and min(self.sizes).is_integer(), f"{self.where}.ups", told)

    @property
    def sizes(self) -> set[float]:
        """The size of the input's map over that of each stage's contribution to the output."""
        return {total / up for total, up in zip(accumulate(self.strides, mul), self.ups, strict=True)}


@dataclass(frozen=True, kw_only=True)
class LidarConfig(SecondConfig):
    """The LiDAR branch: points to the map that PRC trains and RAD teaches."""

    where: ClassVar[str] = "model.lidar"
    encoder: Literal["pillars", "voxels", "none"] = "pillars"
    """`pillars` and SECOND, `voxels` and sparse convolutions, or `none`: images only."""
    cell: Three = listed(0.2, 0.2, 8.0)
    """Metres of a pillar (as high as the grid) or a voxel; the paper's voxels are 0.075, 0.075, 0.2."""
    channels: Widths = listed(64, 64)
    """Of the pillars' layers; of voxels the first stage's, which later ones double, and the last layer's."""
    mode: Literal["dynamic", "hard"] = "dynamic"
    """Pillars: all points, or capped and padded as released weights expect."""
    max_points: Count = 0
    """First points of a voxel that are averaged (BEVFusion: 10), or of a hard pillar (20); 0: all."""
    backend: Literal["torch", "spconv"] = "torch"
    """What convolves voxels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        capped = self.mode == "dynamic" or self.max_points > 0
        told = f"is {self.channels}; of voxels it is the first stage's width and the last layer's"
        require(self.encoder != "voxels" or len(self.channels) == 2, "model.lidar.channels", told)
        require(capped, "model.lidar.max_points", "is 0; mode=hard needs a cap, such as 20")


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """The camera branch: images to a map of the same cells."""

    encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model, `tiny` (the toy world's), or `none`: points only."""
    pretrained: bool = True
    """Start from timm's ImageNet weights."""
    stages: Annotated[list[int], Range(ascending=True)] = listed(1, 2, 3)
    """timm's feature maps that are read, from fine to coarse; of a ResNet 2, 3, 4."""
    widths: Widths = listed(16, 32, 64)
    """Channels of `tiny`."""
    drop_path: BelowOne = 0.2
    """Stochastic depth of the timm model."""
    image_size: Size = listed(256, 704)
    """Rows and columns of the network's images."""
    neck: Positive = 256
    """Channels of the pyramid."""
    view: Literal["lss", "depth_lss"] = "lss"
    """`depth_lss` also reads the LiDAR's depths, and can be no student of RAD."""
    channels: Positive = 80
    """Channels of the map."""
    depth: Three = listed(1.0, 60.0, 0.5)
    """Depth bins: first, end, step, metres."""
    cell: AboveZero = 0.4
    """Metres of a cell into which features are summed."""
    height: Heights = listed(-10.0, 10.0)
    """Lowest and highest z of what is summed."""
    downsample: Positive = 2
    """The map's cells are so many times as large; 1 leaves out the convolutions that do it."""
    pixel_grid: Literal["corner", "center"] = "corner"
    """Pixel of a feature: spread from the first to the last (BEVFusion's), or the middle of its patch."""
    rounding: Literal["floor", "trunc"] = "floor"
    """`trunc` repeats BEVFusion's cells for released weights."""
    deterministic: bool = False
    """Sum cells the same to the last bit on every run of a GPU."""

    def __post_init__(self) -> None:
        enough = self.encoder != "tiny" or len(self.widths) > 1
        require(
            enough, "model.camera.widths", f"is {self.widths}; tiny gives the maps of its last two stages"
        )
        enough = self.encoder in ("tiny", "none") or len(self.stages) > 1
        require(enough, "model.camera.stages", f"is {self.stages}; the pyramid needs two maps or more")
        first, end, _ = self.depth
        require(first < end, "model.camera.depth", f"is {self.depth}; it is the first bin, the end, the step")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(SecondConfig):
    """From the maps of the modalities to what the heads read."""

    where: ClassVar[str] = "model.decoder"
    fuser: Positive = 256
    """Channels after both maps were concatenated; a model of one modality has no fuser."""
    layers: Layers = listed(5, 5)
    widths: Widths = listed(128, 256)
    strides: Widths = listed(1, 2)
    fpn_widths: Widths = listed(256, 256)
    ups: Ups = listed(1.0, 2.0)


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
    tasks: list[str] = listed(*TASKS)
    """Classes that share a heat map, joined by + (center); empty: all share one."""
    nms: Literal["rotated", "circle", "none"] = "rotated"
    """Suppression (center)."""
    circles: Squares = listed(4.0, 12.0, 10.0, 1.0, 0.85, 0.175)
    """Squared distance of each task below which the lower score goes (center, nms=circle)."""
    least_score: Share = 0.0
    """Boxes below are left out (CenterPoint: 0.1)."""
    map: bool = True
    """Whether there is a head for map segmentation."""
    map_width: Count = 0
    """Channels inside it; 0: as many as it reads."""
    map_range: Bounds = listed(-50.0, -50.0, -10.0, 50.0, 50.0, 10.0)
    """Where the map's labels lie."""
    map_cell: AboveZero = 0.5
    """Metres of a label's cell."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything between a batch and its boxes and maps."""

    range: Bounds = listed(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    """Where points count and boxes are found."""
    norm_momentum: BelowOne = 0.01
    """Of BatchNorm in the LiDAR branch and the decoder (BEVFusion's; short runs need 0.1)."""
    classes: list[str] = listed(*"+".join(TASKS).split("+"))
    """Of boxes, in the order of their labels."""
    map_classes: list[str] = listed(*LAYERS)
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
        high, cell = self.range[5] - self.range[2], self.lidar.cell[2]
        told = f"is {self.lidar.cell}; a pillar is as high as model.range, {high:g} m"
        require(self.lidar.encoder != "pillars" or abs(high - cell) < 1e-4, "model.lidar.cell", told)
