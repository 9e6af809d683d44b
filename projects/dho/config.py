"""Every field of a DHO run and of its few-shot teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from projects.dho.lists import ListKind
from projects.dho.objective import TERMS, Balance, Method
from vlmkd.config import (
    AboveZero,
    Amount,
    Count,
    LabelledDataConfig,
    OptimConfig,
    Positive,
    Processes,
    Range,
    RunConfig,
    Seed,
    Share,
    in_steps_already,
    require,
)
from vlmkd.datasets.splits import Fewer
from vlmkd.models.class_vectors import Normalise
from vlmkd.models.heads import KdHead

SearchEnd = Annotated[float, Range(0.1, above=True)]
EMPTY_SET = "is empty; name a data set, e.g. emoji or folder:PATH"


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which training images have labels: one of shots, percent and list_file, or none (kd, kd_feature)."""

    shots: Count = 0
    """Labelled images of every class, drawn by Tip-Adapter's rule."""
    percent: Annotated[float, Range(0, 100)] = 0.0
    """Per cent of the training images with labels, by the cascade rule (1 and 10: the published ImageNet lists)."""
    list_file: str = ""
    """A list of labelled images by `data_tools/make_split.py --percent`, or SimCLR's."""
    list_kind: ListKind = "cascade"
    """The rule that made `list_file`."""
    seed: Seed = 1
    """Seed of the few-shot draw (published runs: 1) and of the held-out images."""
    fewer: Fewer = "refuse"
    """What happens to a class with fewer images than shots (released code: repeat)."""
    unlabelled_includes_labelled: bool = False
    """Draw unlabelled batches from all training images (paper), not the rest (released code)."""
    pool_per_class: Count = 0
    """Training images of a class that are used at all, for small experiments; 0: all."""
    validation: Literal["train", "val", "none"] = "train"
    """Images that choose alpha, beta and the step: held out of `train`, the set's own `val`, or none."""
    validation_per_class: Positive = 8
    """Images a class held out with validation=train; at most half of those without a label."""

    @property
    def given(self) -> int:
        """How many of shots, percent and list_file are used."""
        return sum([bool(self.shots), bool(self.percent), bool(self.list_file)])


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher: what makes image embeddings, and class logits of them."""

    model: str = ""
    """What vlmkd.models.clip.load_clip takes; empty: see data.teacher_outputs."""
    pretrained: str = ""
    """open_clip tag or weights file."""
    class_vectors: str = ""
    """File of class vectors; empty: the model's text tower makes them."""
    prompts: Literal["set", "ensemble"] = "set"
    """The data set's own, or the seven of the ImageNet runs; also for student.head_init=text."""
    templates: list[str] = field(default_factory=list)
    """Other prompts in their place, with `{}` for the class name."""
    normalise: Normalise = "each_and_mean"
    """Which text features are made unit vectors; released code: `each` for open_clip teachers."""
    scale: Amount = 100.0
    """Factor of the cosines; 0: the model's own logit scale."""
    adapter: str = ""
    """A Tip-Adapter-F file of the same model (train_tip_adapter.py): the few-shot teacher."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Backbone and heads."""

    backbone: str = ""
    """What vlmkd.models.backbones.load_backbone takes, e.g. `torchvision:resnet18`, `clip:ViT-B-16@openai`."""
    pretrained: bool = True
    """Start from published weights; false: at random."""
    weights: str = ""
    """A file or `zoo:NAME` in place of the published weights, e.g. DINO's ResNet-50."""
    image_size: Count = 0
    """Input size; 0: that of the weights. A CLIP has its own only."""
    head_init: Literal["default", "text"] = "default"
    """`text`: heads start as class vectors of the student's own text tower (CLIP students)."""
    text_init: Normalise = "each_and_mean"
    """Normalisation of these class vectors; the released code has `none`."""
    kd_head: KdHead = "linear"
    """`linear` (CNN students), `cosine` (paper, CLIP students) or `scaled_linear` (released code, CLIP students)."""
    batch_norm_statistics: Literal["joint", "separate"] = "joint"
    """One forward pass for all images (ImageNet scripts), or one each for labelled and unlabelled (fine-grained)."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The method and its weights."""

    method: Method = "dho"
    """`dho`, or a baseline with one head: ce, kd, ce_kd, pcgrad, kd_feature, ce_kd_feature."""
    ce_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """lambda: weight of the cross entropy; 1 - lambda is the teacher's. loss.method=ce or kd is one loss alone."""
    balance: Balance = "convex"
    """`convex`: lambda L_CE + (1 - lambda) L_KD; `sum`: L_CE + L_KD (released low-shot script)."""
    temperature: AboveZero = 2.0
    """Temperature of both distributions in L_KD, whose square multiplies it."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """The answer of two heads: alpha softmax(ce) + (1 - alpha) softmax(kd / beta)."""

    mode: Literal["search", "fixed"] = "search"
    """The best pair on the validation images, or the values below."""
    alpha: Share = 0.5
    """Weight of the CE head with mode=fixed."""
    beta: AboveZero = 0.5
    """Temperature of the KD head with mode=fixed."""


@dataclass(frozen=True, kw_only=True)
class ShiftedSetConfig:
    """A set that the trained student classifies too (distribution shift)."""

    set: str = ""
    """As data.set, e.g. imagenetv2, imagenet-sketch, imagenet-r, imagenet-a."""
    root: str = ""
    """Folder of the data sets on disk."""
    split: str = "test"
    """Its split."""


@dataclass(frozen=True, kw_only=True)
class DhoOptimConfig(OptimConfig):
    """Optimiser and schedule."""

    schedule: Literal["cosine", "wsd", "constant", "linear", "warmup_times_cosine"] = "cosine"  # type: ignore[assignment]
    """`linear` (fine-grained sets), `warmup_times_cosine` (low-shot ImageNet): schedules.py; else the core's."""


@dataclass(frozen=True, kw_only=True)
class DhoConfig(RunConfig):
    """One run of DHO or of a baseline: a student for one data set and one set of labels."""

    batch_size: Positive = 128
    """Global batch: labelled and unlabelled images of an optimiser step over all ranks."""
    labelled_batch: Count = 0
    """Labelled images of every global batch; 0: half of it (loss.method=ce: all; kd, kd_feature: none)."""
    epoch: Literal["labelled", "unlabelled"] = "unlabelled"
    """Whose images an epoch (steps=200ep) passes over; its last batch need not be whole."""
    optim: DhoOptimConfig = field(default_factory=DhoOptimConfig)
    """Optimiser and schedule."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Data set and training views."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Labels."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Teacher."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """Student."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """Mixing of the heads."""
    selection: Literal["best", "last"] = "best"
    """Export the weights of the best validation accuracy, or the last."""
    test_sets: list[ShiftedSetConfig] = field(default_factory=list)
    """Further sets to test on, beside the test split of data.set."""
    grad_cosine_every: Count = 0
    """Steps between measurements of the cosine of both losses' gradients, each a forward and two backward passes; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_student()
        self._check_loss()
        self._check_teacher()
        searches = self.two_heads and self.mixing.mode == "search"
        require(
            self.split.validation != "none" or not (searches or self.selection == "best"),
            "split.validation",
            "is none, but mixing.mode=search and selection=best need validation images",
        )
        require(
            self.selection == "last" or bool(self.evaluation.every_steps),
            "selection",
            "is best, but evaluation.every_steps is 0; set either",
        )
        whole = self.selection == "best" or self.loss.method == "pcgrad" or self.grad_cosine_every
        require(
            not whole or self.deepspeed.zero_stage < 3,
            "deepspeed.zero_stage",
            "is 3, but selection=best, gradient cosines and pcgrad need whole weights on each rank; use 1 or 2",
        )
        warmup = self.optim.warmup_steps
        require(
            self.optim.schedule != "warmup_times_cosine"
            or not in_steps_already(self.steps, warmup)
            or 0 < warmup < self.steps,
            "optim.warmup_steps",
            f"is {warmup}; warmup_times_cosine needs it above 0 and below steps={self.steps}",
        )

    def _check_student(self) -> None:
        student, method = self.student, self.loss.method
        require(bool(self.data.set), "data.set", EMPTY_SET)
        require(bool(student.backbone), "student.backbone", "is empty; e.g. torchvision:resnet18")
        require(
            self.two_heads or student.kd_head == "linear",
            "student.kd_head",
            f"has no effect with loss.method={method}, which has one head",
        )
        require(
            student.head_init == "default"
            or (student.backbone.startswith("clip:") and method != "kd_feature"),
            "student.head_init",
            f"is text, which needs a clip: backbone and a trained head, not {student.backbone} with {method}",
        )

    def _check_loss(self) -> None:
        loss, split, share = self.loss, self.split, self.labelled_images
        require(
            not self.grad_cosine_every or len(TERMS[loss.method]) == 2,
            "grad_cosine_every",
            f"needs two losses; loss.method={loss.method} has one",
        )
        some = 0 < share < self.batch_size
        fits = some if self.uses_labels else share == 0
        require(
            share == self.batch_size if loss.method == "ce" else fits,
            "labelled_batch",
            f"is {self.labelled_batch}; some of batch_size={self.batch_size} are labelled and some are not (loss.method=ce: "
            "all are; kd and kd_feature: none is)",
        )
        require(
            split.given == self.uses_labels,
            "split",
            "needs exactly one of shots, percent and list_file"
            if self.uses_labels
            else f"names labelled images, but loss.method={loss.method} uses no labels; set split.shots=0",
        )
        require(
            split.list_kind == "cascade" or bool(split.list_file),
            "split.list_kind",
            "goes with split.list_file, and only with it",
        )

    def _check_teacher(self) -> None:
        teacher, stored = self.teacher, bool(self.data.teacher_outputs)
        if self.loss.method == "ce":
            require(
                not (teacher.model or teacher.class_vectors or teacher.adapter or stored),
                "teacher",
                "is given, but loss.method=ce uses none; drop it and data.teacher_outputs",
            )
            return
        require(
            bool(teacher.model) or (stored and bool(teacher.class_vectors or teacher.adapter)),
            "teacher.model",
            "is empty; name a CLIP, or give data.teacher_outputs and teacher.class_vectors or adapter",
        )
        require(
            not teacher.adapter
            or ("kd" in TERMS[self.loss.method] and not teacher.class_vectors and teacher.scale == 100.0),
            "teacher.adapter",
            "has its own class vectors and scale, for methods that imitate logits; leave it, or those, out",
        )

    @property
    def two_heads(self) -> bool:
        """Whether the student has a head for the teacher too."""
        return self.loss.method == "dho"

    @property
    def labelled_images(self) -> int:
        """Labelled images of every global batch."""
        usual = self.batch_size if self.loss.method == "ce" else self.batch_size // 2
        return self.labelled_batch or usual * self.uses_labels

    @property
    def uses_labels(self) -> bool:
        """Whether labels reach the student."""
        return "ce" in TERMS[self.loss.method]


@dataclass(frozen=True, kw_only=True)
class TipAdapterConfig:
    """One few-shot teacher."""

    run_dir: str = ""
    """Folder of the result."""
    seed: Seed = 1
    """Seed of views and order."""
    threads: Processes = 0
    """CPU threads; 0: torch's default."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Data set and training views."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Labelled and validation images."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The CLIP that is adapted."""
    cache_passes: Positive = 10
    """Augmented views of each image whose mean feature, not normalised, is its key."""
    views: Count = 0
    """Augmented views of each image in training; 0: a new one each epoch."""
    epochs: Positive = 200
    """Passes over the labelled images."""
    batch_size: Positive = 256
    """Images of an optimiser step."""
    lr: Amount = 1e-3
    """Peak learning rate of AdamW; cosine to zero."""
    init_alpha: Amount = 1.17
    """alpha while the keys are trained; beta is 1."""
    search_beta: SearchEnd = 7.0
    """Upper end of the search of beta, which starts at 0.1."""
    search_alpha: SearchEnd = 3.0
    """Upper end of the search of alpha, which starts at 0.1."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", "is empty; set it, e.g. run_dir=runs/my_teacher")
        require(bool(self.data.set), "data.set", EMPTY_SET)
        require(self.split.shots > 0, "split.shots", f"is {self.split.shots}; a cache needs at least 1")
        chosen_on = self.split.validation
        require(chosen_on != "none", "split.validation", "is none; epoch, alpha and beta are chosen on it")
        require(
            bool(self.teacher.model) and not self.teacher.adapter and self.teacher.scale == 100.0,
            "teacher",
            "needs a model, the CLIP that is adapted; adapter, which is made here, stays empty, and scale is 100",
        )
        require(
            not self.data.teacher_outputs and not self.data.view_count,
            "data.teacher_outputs",
            "and data.view_count have no effect here; views is the number of views",
        )
