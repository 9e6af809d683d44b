"""CALICO's configuration: one class for all stages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from projects.calico.model_config import ModelConfig, listed
from vlmkd.config import (
    AboveZero,
    Amount,
    BelowOne,
    Count,
    EvaluationConfig,
    Positive,
    Processes,
    Range,
    RatioRange,
    RunConfig,
    Share,
    require,
)

Stage = Literal["prc", "rad", "joint", "finetune"]
Degrees = Annotated[float, Range(0, 180)]
Distances = Annotated[list[float], Range(above=True, ascending=True)]
UNTRAINED = "untrained"


@dataclass(frozen=True, kw_only=True)
class SceneDataConfig:
    """Training frames and what is done to them: without a value of its own, nothing."""

    info: str = ""
    """Folder or info file of the training frames; see `projects.calico.frames.open_frames`."""
    root: str = ""
    """Folder that an info file's paths are below; empty: its own."""
    fraction: Positive = 100
    """Per cent of the drives: every round(100 / fraction)-th in the order of the data set; 5, 10, 20, 50 or 100."""
    split_file: str = ""
    """Drives of one's own in the place of a fraction, a name a line."""
    sweeps: Count = 9
    """Past sweeps of a nuScenes frame; training draws them from those that the info file has."""
    workers: Processes = 2
    """Loader processes per rank; 0 loads in the training process. Does not change the batches."""
    rotation: Degrees = 0.0
    """About z, uniform in plus or minus so many degrees."""
    scale: RatioRange = listed(1.0, 1.0)
    """Uniform in this range."""
    flip: bool = False
    """Mirror x and y, each with probability 1/2."""
    shift: Amount = 0.0
    """Standard deviation of a shift along each axis, metres."""
    drop: BelowOne = 0.0
    """Share of the points left out of each view, never those that are contrasted."""
    image_resize: RatioRange = listed(0.48, 0.48)
    """Factor on a picture's sides in training, uniform in this range; then the bottom is cropped."""
    image_rotation: Degrees = 0.0
    """Of a picture, uniform in plus or minus so many degrees."""
    image_flip: bool = False
    """Mirror a picture with probability 1/2."""
    eval_resize: AboveZero = 0.48
    """Factor on a picture's sides in evaluations."""
    balance: bool = False
    """Draw frames so that every class is in an equal share of the draws (CBGS), which makes an epoch longer."""
    paste: str = ""
    """File of objects that are pasted into frames; where it is missing, it is made from the labelled drives."""
    paste_epochs: Count = 0
    """Epochs after which no more is pasted; 0: until the end."""


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """Regions of the key sweeps."""

    preset: Literal["default", "prototype"] = "default"
    """Numbers that they are found by (projects/calico/regions.py)."""
    cache: str = ""
    """Folder written by `python -m projects.calico.region_cache`; empty: found anew for each view."""


@dataclass(frozen=True, kw_only=True)
class PrcConfig:
    """Point-region contrast, and how points are sampled for every stage before fine-tuning."""

    arm: Literal["prc", "plrc", "rapc", "pointcontrast", "box_clip"] = "prc"
    """What is contrasted; all but the first are for comparison."""
    alpha: Share = 0.5
    """Weight of PLRC; 1 - alpha is RAPC's (arm=prc)."""
    tau: AboveZero = 0.1
    """Temperature."""
    n_rich: Positive = 1024
    """Points of a frame that belong to regions."""
    n_less: Count = 1024
    """Points of a frame that belong to none. PointContrast draws as many as both together from all points."""
    negatives: Literal["frame", "batch"] = "frame"
    """Whose points are an anchor's negatives."""


@dataclass(frozen=True, kw_only=True)
class RadConfig:
    """Region-aware distillation."""

    arm: Literal["rad", "mse"] = "rad"
    """`mse`: the squared error of features behind a linear layer."""
    tau: AboveZero = 0.1
    """Temperature."""
    weight: Literal["region", "uniform", "centre"] = "region"
    """Each region counts the same, or each point; `centre` is a Gaussian around true boxes, which reads labels."""
    direction: Literal["camera_to_lidar", "symmetric"] = "camera_to_lidar"
    """Whose points are anchors."""
    teacher_ckpt: str = ""
    """Export of the teacher's PRC run; `untrained`: random weights, the control."""
    teacher_projector: Literal["own", "frozen_rapc"] = "own"
    """Trained with the student, or that of the teacher's PRC run."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Exports of earlier stages that branches start from; empty: as the model's config says."""

    lidar: str = ""
    """Of PRC, or any run with a LiDAR branch."""
    camera: str = ""
    """Of RAD, or any run with a camera branch."""


@dataclass(frozen=True, kw_only=True)
class SceneEvaluationConfig(EvaluationConfig):
    """Frames that fine-tuned models are evaluated on."""

    info: str = ""
    """As data.info; empty: no evaluation."""
    data_root: str = ""
    """As data.root."""
    frames: Count = 0
    """Only so many frames, drawn from all; 0: all."""
    classes: list[str] = listed()
    """Classes that are scored; empty: the model's."""
    distances: Distances = listed(0.5, 1.0, 2.0, 4.0)
    """Of centres, metres, over which AP is averaged; 2 must be one of them."""

    def __post_init__(self) -> None:
        require(2.0 in self.distances, "evaluation.distances", "lacks 2.0, whose matches the errors are of")


@dataclass(frozen=True, kw_only=True)
class CalicoConfig(RunConfig):
    """A run of any stage."""

    stage: Stage = "finetune"
    """`prc` trains the LiDAR branch, `rad` the camera branch, `joint` both at once (for comparison), without labels."""
    data: SceneDataConfig = field(default_factory=SceneDataConfig)
    """Training frames."""
    regions: RegionConfig = field(default_factory=RegionConfig)
    """Regions, before fine-tuning."""
    prc: PrcConfig = field(default_factory=PrcConfig)
    """Point-region contrast (prc, joint)."""
    rad: RadConfig = field(default_factory=RadConfig)
    """Region-aware distillation (rad, joint)."""
    init: InitConfig = field(default_factory=InitConfig)
    """Where branches start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The whole model; stages before fine-tuning take the branches that they train."""
    cycle: BelowOne = 0.0
    """One cycle: the share of the run in which the rate rises from a tenth of its peak; 0: optim.schedule."""
    evaluation: SceneEvaluationConfig = field(default_factory=SceneEvaluationConfig)
    """Evaluations (finetune)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stage, model, rad, init = self.stage, self.model, self.rad, self.init
        points, images = (branch.encoder != "none" for branch in (model.lidar, model.camera))
        heads = model.head.detection != "none" or model.head.map
        distils, before = stage in ("rad", "joint"), stage != "finetune"
        no_effect = f"has no effect with stage={stage}"
        conditions: list[tuple[str, object, str]] = [
            ("data.info", self.data.info, "is empty; name the training frames"),
            ("model.lidar.encoder", points or not before, f"is none, but stage={stage} reads points"),
            ("model.camera.encoder", images or not distils, f"is none, but stage={stage} reads images"),
            ("model.camera.view", not distils or model.camera.view == "lss",
             "is depth_lss, which sees the LiDAR; a student of RAD must not, use lss"),
            ("model.head.detection", heads or before, "is none, and model.head.map false; nothing is predicted"),
            ("rad.teacher_ckpt", bool(rad.teacher_ckpt) == (stage == "rad"),
             "is empty; name the export of a PRC run, or untrained" if stage == "rad" else no_effect),
            ("rad.teacher_projector", rad.teacher_projector == "own" or (
                stage == "rad" and rad.arm == "rad" and rad.teacher_ckpt != UNTRAINED),
             "is frozen_rapc, which a trained teacher of stage=rad alone has"),
            ("rad.weight", rad.arm == "rad" or rad.weight != "centre", "is centre, which goes with rad.arm=rad"),
            ("init.lidar", not init.lidar or (points and stage != "rad"), no_effect),
            ("init.camera", not init.camera or (images and stage != "prc"), no_effect),
            ("prc.arm", stage != "joint" or self.prc.arm != "box_clip", "is box_clip, which goes with stage=prc"),
            ("evaluation.info", not before or not self.evaluation.info,
             f"is given, but stage={stage} trains no head to evaluate"),
            ("data.paste", not before or not (self.data.paste or self.data.balance),
             f"and data.balance need labels, which stage={stage} does not read"),
        ]  # fmt: skip
        for path, holds, message in conditions:
            require(bool(holds), path, message)

    @property
    def reads_labels(self) -> bool:
        """Whether training frames are read with their labels."""
        return self.stage == "finetune" or (self.stage != "prc" and self.rad.weight == "centre")

    @property
    def reads_images(self) -> bool:
        """Whether training frames are read with their pictures."""
        return self.stage != "prc" and self.model.camera.encoder != "none"


def branches(model: ModelConfig, *, lidar: bool, camera: bool) -> ModelConfig:
    """The config of these branches alone, without heads."""
    kept = {"lidar": lidar, "camera": camera}
    gone = {name: replace(getattr(model, name), encoder="none") for name in kept if not kept[name]}
    return replace(model, head=replace(model.head, detection="none", map=False), **gone)
