"""DHO's configuration: which images have labels, teacher, student and its heads, losses, and how the heads are mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from projects.dho.objective import USES_FEATURES, USES_LABELS, USES_LOGITS, Method, term_weights
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
from vlmkd.datasets.splits import Fewer, ListKind
from vlmkd.models.class_vectors import Normalise
from vlmkd.models.heads import KdHead

SearchEnd = Annotated[float, Range(0.1, above=True)]
TWO_HEADS = ("dho",)
"""Methods with a head of its own for the teacher."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which training images have labels: one of shots, percent and list_file, or (kd, kd_feature) none of them."""

    shots: Count = 0
    """Labelled images of every class, drawn by Tip-Adapter's rule."""
    percent: Annotated[float, Range(0, 100)] = 0.0
    """Labelled share of the training images by the cascade rule (1 and 10 are the published ImageNet lists); 100: all."""
    list_file: str = ""
    """A list of labelled images, as `vlmkd.datasets.splits.write_list` writes it, or SimCLR's."""
    list_kind: ListKind = "cascade"
    """The rule that made `list_file`; the two are never mixed in one table."""
    seed: Seed = 1
    """Seed of the few-shot draw (published runs: 1) and of the held-out images."""
    fewer: Fewer = "refuse"
    """What happens to a class with fewer images than shots (the released code: repeat; no published run meets one)."""
    unlabelled_includes_labelled: bool = False
    """Draw unlabelled batches from all training images (paper) instead of the rest (released code)."""
    pool_per_class: Count = 0
    """Use only so many training images of a class altogether, for small experiments; 0: all."""
    validation: Literal["train", "val", "none"] = "train"
    """Images that choose alpha, beta and the step: held out of the training split, the set's own val split, or none."""
    validation_per_class: Positive = 8
    """Images a class held out with validation=train; at most half of what the labelled ones leave of a class."""

    @property
    def given(self) -> int:
        """How many of the ways to say which images have labels are used."""
        return sum([bool(self.shots), bool(self.percent), bool(self.list_file)])


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher: image embeddings, computed or stored, and what makes class logits of them."""

    model: str = ""
    """Any name that vlmkd.models.clip.load_clip takes; empty: its outputs are stored (data.teacher_outputs)."""
    pretrained: str = ""
    """open_clip tag or weights file."""
    class_vectors: str = ""
    """File of class vectors; empty: the model's text tower makes them."""
    prompts: Literal["set", "ensemble"] = "set"
    """The data set's own prompts, or the seven of the ImageNet runs; also for student.head_init=text."""
    templates: list[str] = field(default_factory=list)
    """Other prompts in their place, with `{}` for the class name."""
    normalise: Normalise = "each_and_mean"
    """Which text features are made unit vectors; the released code has `each` for open_clip teachers."""
    scale: Amount = 100.0
    """Factor of the cosines; 0: the model's own logit scale."""
    adapter: str = ""
    """A Tip-Adapter-F file of the same model (train_tip_adapter.py): the few-shot teacher."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Backbone and heads."""

    backbone: str = ""
    """Any name that vlmkd.models.backbones.load_backbone takes, e.g. `torchvision:resnet18` or `clip:ViT-B-16@openai`."""
    pretrained: bool = True
    """Start from the backbone's published weights; false: at random."""
    weights: str = ""
    """A local file or `zoo:NAME` in the place of the published weights, e.g. DINO's ResNet-50."""
    image_size: Count = 0
    """Input size; 0: that of the weights. A CLIP has its own only."""
    head_init: Literal["default", "text"] = "default"
    """`text`: both heads start as the class vectors of the student's own text tower (CLIP students)."""
    text_init: Normalise = "each_and_mean"
    """Normalisation of these class vectors; the released code has `none`."""
    kd_head: KdHead = "linear"
    """`linear` (CNN students), `cosine` (paper, CLIP students) or `scaled_linear` (released code, CLIP students)."""
    batch_norm_statistics: Literal["joint", "separate"] = "joint"
    """One forward pass over labelled and unlabelled images (ImageNet scripts), or one each (fine-grained script)."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The method and its weights."""

    method: Method = "dho"
    """`dho`, or a baseline with one head: ce, kd, ce_kd, pcgrad, kd_feature, ce_kd_feature."""
    ce_share: Share = 0.5
    """lambda: weight of the cross entropy; 1 - lambda is the teacher's."""
    balance: Literal["convex", "sum"] = "convex"
    """`convex`: lambda L_CE + (1 - lambda) L_KD; `sum`: L_CE + L_KD (released low-shot script)."""
    temperature: AboveZero = 2.0
    """Temperature of both distributions in L_KD, whose square multiplies it."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How the answers of the two heads are mixed: alpha softmax(ce) + (1 - alpha) softmax(kd / beta)."""

    mode: Literal["search", "fixed"] = "search"
    """`search`: the pair with the most right answers on the validation images; `fixed`: the values below."""
    alpha: Share = 0.5
    """Weight of the cross-entropy head with mode=fixed."""
    beta: AboveZero = 0.5
    """Temperature of the distillation head with mode=fixed."""


@dataclass(frozen=True, kw_only=True)
class ShiftedSetConfig:
    """One more set that the trained student classifies at the end (distribution shift)."""

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
    """`linear` (fine-grained sets) and `warmup_times_cosine` (low-shot ImageNet): schedules.py; the others are the core's."""


@dataclass(frozen=True, kw_only=True)
class DhoConfig(RunConfig):
    """One run of DHO or of a baseline: a student for one data set and one set of labels."""

    batch_size: Positive = 128
    """Global batch: labelled and unlabelled images of an optimiser step over all ranks."""
    labelled_batch: Count = 0
    """Labelled images of every global batch; 0: half of it (loss.method=ce: all; kd, kd_feature: none)."""
    epoch: Literal["labelled", "unlabelled"] = "unlabelled"
    """Whose images an epoch passes over, as of steps=200ep; its last batch need not be whole."""
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
    """Export the weights of the best validation accuracy, or those of the last step."""
    test_sets: list[ShiftedSetConfig] = field(default_factory=list)
    """Further sets to test on, beside the test split of data.set."""
    grad_cosine_every: Count = 0
    """Measure the cosine of the two losses' gradients every so many steps (a forward and two backward passes more); 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data.set), "data.set", "is empty; name a data set, e.g. emoji or folder:PATH")
        require(bool(self.student.backbone), "student.backbone", "is empty; e.g. torchvision:resnet18")
        require(
            self.student.head_init == "default" or self.student.backbone.startswith("clip:"),
            "student.head_init",
            f"is text, but {self.student.backbone} has no text tower; use a clip: backbone or head_init=default",
        )
        warmup = self.optim.warmup_steps
        require(
            self.optim.schedule != "warmup_times_cosine"
            or not in_steps_already(self.steps, warmup)
            or 0 < warmup < self.steps,
            "optim.warmup_steps",
            f"is {warmup}; warmup_times_cosine needs it above 0 and below steps={self.steps}",
        )
        self._check_loss()
        self._check_split()
        self._check_teacher()
        self._check_mixing()

    def _check_loss(self) -> None:
        loss = self.loss
        both = len(term_weights(loss.method, loss.ce_share, loss.balance)) == 2
        require(
            0 < loss.ce_share < 1 or not both,
            "loss.ce_share",
            f"is {loss.ce_share}; it is above 0 and below 1, and loss.method=ce or kd is one loss alone",
        )
        require(
            both or not self.grad_cosine_every,
            "grad_cosine_every",
            f"needs two losses; loss.method={loss.method} has one",
        )
        needs_whole = bool(self.grad_cosine_every) or loss.method == "pcgrad"
        require(
            not needs_whole or self.deepspeed.zero_stage < 3,
            "deepspeed.zero_stage",
            "is 3, but gradient cosines and pcgrad need whole weights on each rank; use 1 or 2",
        )
        require(
            loss.method in TWO_HEADS or self.student.kd_head == "linear",
            "student.kd_head",
            f"has no effect with loss.method={loss.method}, which has one head",
        )
        require(
            loss.method != "kd_feature" or self.student.head_init == "default",
            "student.head_init",
            "has no effect with loss.method=kd_feature, which has no trained head",
        )
        share = self.labelled_images
        if not self.uses_labels:
            fits = share == 0
        else:
            fits = share == self.batch_size if loss.method == "ce" else 0 < share < self.batch_size
        require(
            fits,
            "labelled_batch",
            f"is {self.labelled_batch}; of batch_size={self.batch_size} some images are labelled and some are not "
            "(loss.method=ce: all are; kd and kd_feature: none is)",
        )

    def _check_split(self) -> None:
        split = self.split
        if self.uses_labels:
            require(split.given == 1, "split", "needs exactly one of shots, percent and list_file")
        else:
            require(
                not split.given,
                "split",
                f"names labelled images, but loss.method={self.loss.method} uses no labels; set split.shots=0",
            )
        require(
            split.list_kind == "cascade" or bool(split.list_file),
            "split.list_kind",
            "goes with split.list_file, and only with it",
        )

    def _check_teacher(self) -> None:
        teacher = self.teacher
        stored = bool(self.data.teacher_outputs)
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
            "is empty; name a CLIP, or give data.teacher_outputs and teacher.class_vectors (or teacher.adapter)",
        )
        require(
            not (teacher.adapter and teacher.class_vectors),
            "teacher.adapter",
            "brings its own class vectors; leave teacher.class_vectors empty",
        )
        require(
            not teacher.adapter or teacher.scale == 100.0,
            "teacher.scale",
            f"is {teacher.scale}; a Tip-Adapter is trained with 100",
        )
        require(
            not teacher.adapter or self.loss.method in USES_LOGITS,
            "teacher.adapter",
            f"has no effect with loss.method={self.loss.method}, which uses image embeddings alone",
        )
        require(
            not (teacher.class_vectors and (teacher.templates or teacher.prompts != "set")),
            "teacher.class_vectors",
            "are made of prompts already; leave teacher.templates and teacher.prompts as they are",
        )

    def _check_mixing(self) -> None:
        mixing = self.mixing
        searches = self.loss.method in TWO_HEADS and mixing.mode == "search"
        require(
            self.split.validation != "none" or not (searches or self.selection == "best"),
            "split.validation",
            "is none, but mixing.mode=search and selection=best need validation images; the test set is not for that",
        )
        require(
            self.selection == "last" or bool(self.evaluation.every_steps),
            "selection",
            "is best, but evaluation.every_steps is 0: only the last weights are ever looked at; set either",
        )
        require(
            self.selection == "last" or self.deepspeed.zero_stage < 3,
            "selection",
            "is best, which needs whole weights on each rank; use deepspeed.zero_stage 1 or 2, or selection=last",
        )

    @property
    def two_heads(self) -> bool:
        """Whether the student has a head for the teacher beside that for labels."""
        return self.loss.method in TWO_HEADS

    @property
    def labelled_images(self) -> int:
        """Labelled images of every global batch."""
        if not self.uses_labels:
            return self.labelled_batch
        whole = self.batch_size if self.loss.method == "ce" else self.batch_size // 2
        return self.labelled_batch or whole

    @property
    def uses_features(self) -> bool:
        """Whether the student imitates the teacher's image embedding."""
        return self.loss.method in USES_FEATURES

    @property
    def uses_labels(self) -> bool:
        """Whether labels reach the student."""
        return self.loss.method in USES_LABELS


@dataclass(frozen=True, kw_only=True)
class TipAdapterConfig:
    """One few-shot teacher."""

    run_dir: str = ""
    """Folder of the result."""
    seed: Seed = 1
    """Seed of views and order; which images are labelled is split.seed's."""
    threads: Processes = 0
    """CPU threads; 0: torch's default."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Data set and training views."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Labelled and validation images."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The CLIP that is adapted."""
    cache_passes: Positive = 10
    """Augmented views of each image whose mean feature is its key."""
    cache_features: Literal["raw", "unit"] = "raw"
    """Average the features before (released code) or after normalising them."""
    views: Count = 0
    """Augmented views of each image that training goes through; 0: a new one each epoch."""
    epochs: Positive = 200
    """Passes over the labelled images."""
    batch_size: Positive = 256
    """Images of an optimiser step."""
    lr: Amount = 1e-3
    """Peak learning rate of AdamW; cosine to zero."""
    eps: Amount = 1e-4
    """Epsilon of AdamW."""
    weight_decay: Amount = 0.01
    """Decay of the keys."""
    init_alpha: Amount = 1.17
    """alpha while the keys are trained."""
    init_beta: Amount = 1.0
    """beta while the keys are trained."""
    search_beta: SearchEnd = 7.0
    """Upper end of the search of beta, which starts at 0.1."""
    search_alpha: SearchEnd = 3.0
    """Upper end of the search of alpha, which starts at 0.1."""
    embed_batch_size: Positive = 64
    """Images of a forward pass of the CLIP."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", "is empty; set it, e.g. run_dir=runs/my_teacher")
        require(bool(self.data.set), "data.set", "is empty; name a data set, e.g. emoji or folder:PATH")
        require(self.split.shots > 0, "split.shots", f"is {self.split.shots}; a cache needs at least 1")
        require(
            self.split.validation != "none",
            "split.validation",
            "is none, but the epoch, alpha and beta are chosen on validation images",
        )
        require(bool(self.teacher.model), "teacher.model", "is empty; name the CLIP that is adapted")
        require(not self.teacher.adapter, "teacher.adapter", "is what this program makes; leave it empty")
        require(
            self.teacher.scale == 100.0, "teacher.scale", f"is {self.teacher.scale}; a Tip-Adapter has 100"
        )
        require(
            not self.data.teacher_outputs and not self.data.view_count,
            "data.teacher_outputs",
            "and data.view_count have no effect here; views is the number of views",
        )
