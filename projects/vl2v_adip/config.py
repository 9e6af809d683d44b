"""VL2V-ADiP's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlmkd.config import (
    AboveZero,
    Amount,
    Count,
    Duration,
    LabelledDataConfig,
    Positive,
    RunConfig,
    Seed,
    Share,
    in_steps_already,
    require,
)

Method = Literal[
    "align", "distill", "one_stage", "vl2v_sd", "kd_image", "kd_text", "kd_kl", "kd_cos", "simkd", "erm", "lp", "lp_ft",
    "miro",
]  # fmt: skip
FROZEN_BACKBONE: tuple[Method, ...] = ("align", "lp")
"""Methods of train_align.py, which train what lies behind the backbone."""
LINEAR_HEAD: tuple[Method, ...] = ("erm", "lp", "lp_ft", "kd_kl", "kd_cos", "miro")
"""Methods with a linear head; the others classify by the teacher's class vectors."""
WITHOUT_TEACHER: tuple[Method, ...] = ("erm", "lp", "lp_ft", "miro")
CONTINUES: dict[Method, Method] = {"distill": "align", "lp_ft": "lp"}
"""Second stages, and the stage of the same fold that they start from."""


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """Which domain is held out, and how each domain is split."""

    test_domain: str = ""
    """Name of the held-out domain."""
    trial_seed: Seed = 0
    """Seed of DomainBed's 80/20 split; the published tables average over 0, 1 and 2."""
    seen_classes: Count = 0
    """Open set: train on the first so many classes, test on all in the held-out domain; 0: all."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The backbone that is distilled into."""

    backbone: str = ""
    """A name for vlmkd.models.backbones.load_backbone."""
    pretrained: bool = True
    """Start from the backbone's published weights; false: at random."""
    weights: str = ""
    """A local file in the place of the published weights."""
    image_size: Count = 0
    """Input size; 0: that of the weights. A CLIP has its own only."""
    freeze_bn: bool = True
    """BatchNorm statistics never move; its affine parameters train."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher."""

    model: str = ""
    """A name for vlmkd.models.clip.load_clip; empty: only stored outputs and class vectors."""
    pretrained: str = ""
    """open_clip tag or weights file."""
    class_vectors: str = ""
    """File of class vectors; empty: the model's text tower makes them."""
    templates: list[str] = field(default_factory=list)
    """Prompts with `{}` for the class name; empty: the data set's own."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses."""

    image_weight: Share = 0.5
    """lambda, the image term's; 1 - lambda is the text term's (align, distill, one_stage, vl2v_sd)."""
    kd_weight: Amount = 0.5
    """Weight of the teacher's term beside the cross entropy (kd_kl, kd_cos)."""
    temperature: AboveZero = 0.1
    """Divides the logits of kd_kl and kd_cos, where CLIP's are already times 100."""
    miro_weight: Amount = 0.1
    """Weight of MIRO's regulariser (miro)."""
    legacy_kl: bool = False
    """Replay the released kd_kl: probabilities where logarithms belong; for comparison only."""


@dataclass(frozen=True, kw_only=True)
class SwadConfig:
    """Weight averaging over the loss valley (valley.py)."""

    enabled: bool = True
    """Average; false exports the best single weights only."""
    semantics: Literal["reference", "clean"] = "reference"
    """`reference` repeats the released code, `clean` takes every step of the chosen window once."""
    segment_reset: Literal["every_eval", "vl2v_default"] = "every_eval"
    """After `every_eval` (SWAD), or `vl2v_default`: those at multiples of 1000 above 2500 (most released scripts)."""
    n_converge: Positive = 3
    """Evaluations that a minimum must outlast."""
    n_tolerance: Positive = 6
    """Evaluations in a row above the threshold that end the valley."""
    tolerance_ratio: Amount = 0.3
    """Threshold above the mean loss at convergence, as a share of it."""

    def __post_init__(self) -> None:
        apart = self.semantics == "reference" or self.segment_reset == "every_eval"
        told = "is vl2v_default, whose segments overlap; it needs swad.semantics=reference"
        require(apart, "swad.segment_reset", told)


@dataclass(frozen=True, kw_only=True)
class Vl2vConfig(RunConfig):
    """What both scripts share."""

    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Training images and their views; a domain set."""
    fold: FoldConfig = field(default_factory=FoldConfig)
    """The held-out domain."""
    method: Method = "distill"
    """The stage or baseline."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    swad: SwadConfig = field(default_factory=SwadConfig)
    """Weight averaging."""
    init_from: str = ""
    """Export of the earlier stage; empty: the fitting one below `runs`."""
    runs: str = "runs"
    """Folder that is searched for the earlier stage."""
    select_from_step: Duration = 100
    """Evaluations before this step are no candidates for the best weights."""
    watch_target: bool = False
    """Also evaluate the held-out domain during training; nothing is chosen by it."""
    legacy_norm: bool = False
    """Feed student and teacher ImageNet's mean and std whatever their own are (released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        method, teacher, loss, swad = self.method, self.teacher, self.loss, self.swad
        taught = method not in WITHOUT_TEACHER
        named = bool(teacher.model or teacher.class_vectors)
        weighs = method in ("align", "distill", "one_stage", "vl2v_sd")
        no_effect = f"has no effect with method={method}"
        conditions: list[tuple[str, object, str]] = [
            ("data.set", self.data.set, "is empty; name one, e.g. data.set=office_home"),
            ("fold.test_domain", self.fold.test_domain, "is empty; name one, e.g. fold.test_domain=Art"),
            ("student.backbone", self.student.backbone,
             "is empty; name one, e.g. student.backbone=torchvision:resnet50"),
            ("teacher", taught or not (named or self.stored),
             f"{no_effect}; leave it and data.teacher_outputs out"),
            ("teacher", named or not taught,
             "is empty; name teacher.model, or without its weights teacher.class_vectors"),
            ("data.teacher_outputs", not taught or teacher.model or self.stored or method == "kd_text",
             "is empty, but without teacher.model the image embeddings must be stored"),
            ("legacy_norm", not (self.legacy_norm and self.stored),
             "goes with a loaded teacher: stored outputs have its own statistics"),
            ("loss.image_weight", weighs or loss.image_weight == LossConfig().image_weight, no_effect),
            ("loss.legacy_kl", not loss.legacy_kl or method == "kd_kl", "goes with method=kd_kl"),
            ("init_from", not self.init_from or method in CONTINUES,
             f"{no_effect}; {' and '.join(CONTINUES)} start from an earlier stage"),
            ("student.backbone", method != "vl2v_sd" or self.student.backbone.startswith("clip:"),
             "must be the teacher's image tower with method=vl2v_sd: clip:NAME@TAG"),
            ("student.freeze_bn", self.student.freeze_bn or not swad.enabled or swad.semantics == "clean",
             "is false: running statistics are averaged with swad.semantics=clean only"),
            ("fold.seen_classes", not self.fold.seen_classes or method not in LINEAR_HEAD,
             f"needs class vectors; method={method} learns a head for the seen classes only"),
            ("deepspeed.activation_checkpointing", method != "miro" or not self.deepspeed.activation_checkpointing,
             "does not go with method=miro, which looks at every layer once"),
            ("deepspeed.zero_stage", self.deepspeed.zero_stage < 3,
             "is 3, but averages and best weights need whole weights on each rank; use 1 or 2"),
            ("evaluation.every_steps", not swad.enabled or self.evaluation.every_steps,
             "is 0, but SWAD lives on evaluations; set it, or swad.enabled=false"),
            ("select_from_step",
             not in_steps_already(self.steps, self.select_from_step) or self.select_from_step < self.steps,
             f"is {self.select_from_step}; it must be below steps={self.steps}"),
        ]  # fmt: skip
        for path, fits, told in conditions:
            require(bool(fits), path, told)

    @property
    def stored(self) -> bool:
        """Whether the teacher's image embeddings are stored."""
        return bool(self.data.teacher_outputs)


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Vl2vConfig):
    """A first stage, which trains the projector (align) or a linear head (lp) alone."""

    method: Literal["align", "lp"] = "align"
    """The stage."""
    swad: SwadConfig = field(default_factory=lambda: SwadConfig(enabled=False))
    """Weight averaging; off, because the next stage starts from the best weights."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Vl2vConfig):
    """What trains the backbone: distill, one_stage, vl2v_sd and the baselines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        told = f"is {self.method}, which freezes the backbone; use train_align.py"
        require(self.method not in FROZEN_BACKBONE, "method", told)
