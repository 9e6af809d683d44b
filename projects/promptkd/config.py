"""Every field of PromptKD's runs: the prompted teacher (stage 1), its class vectors, and the student (stage 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlmkd.config import (
    AboveZero,
    Amount,
    BelowOne,
    Count,
    Duration,
    LabelledDataConfig,
    Length,
    OptimConfig,
    Positive,
    Processes,
    RunConfig,
    Seed,
    require,
)
from vlmkd.datasets.splits import Fewer

TRAINING_TEMPLATE = "a photo of a {}."
"""The prompt of both stages in every published run."""

Setting = Literal["base_to_novel", "cross_dataset", "domain_generalization"]
"""Which images are trained on, and which classes are evaluated (docs/papers/promptkd.md#the-method)."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A CLIP with a ViT image tower, as vlmkd.models.clip.load_clip takes it."""

    model: str = ""
    """Architecture (OpenAI's weights: the `-quickgelu` name), JSON config, `local-dir:`, `hf:` or `zoo:NAME`."""
    pretrained: str = ""
    """open_clip tag or weights file; empty: the folder's own weights."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Deep prompts of the teacher (docs/papers/promptkd.md, eq. 1 and 2)."""

    image_depth: Count = 9
    """Image blocks with prompts of their own; 0: none."""
    image_length: Positive = 4
    """Prompts of an image block."""
    text_depth: Positive = 9
    """Text blocks with prompts of their own."""
    text_length: Positive = 4
    """Prompts of a text block, in place of the first words."""
    template: str = TRAINING_TEMPLATE
    """Words around the class name; prompts replace the first, or stand before the name where those are too few."""
    init: str = "a photo of a"
    """Words that the first text prompts start from; empty, or too few: at random."""


@dataclass(frozen=True, kw_only=True)
class StudentPromptConfig:
    """Deep visual prompts of the student."""

    depth: Count = 9
    """Image blocks with prompts of their own; 0: the projector alone is trained."""
    length: Positive = 4
    """Prompts of a block."""


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Gaussian-weighted average of the prompts over the epochs (GPA; docs/papers/promptkd.md, eq. 10)."""

    mean: Amount = 15.0
    """Epoch (from 1) with the largest weight."""
    std: Amount = 1.0
    """Width of the Gaussian in epochs; 0 turns the average off."""


@dataclass(frozen=True, kw_only=True)
class PromptSRCLossConfig:
    """Weights of PromptSRC's terms; 0 leaves a term out."""

    ce: AboveZero = 1.0
    """Cross-entropy with the labels."""
    text: Amount = 25.0
    """L1 distance of the class vectors to the frozen ones."""
    image: Amount = 10.0
    """L1 distance of the image embeddings to the frozen ones."""
    logit: Amount = 1.0
    """KL to the frozen model's logits, mean over images and classes."""


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """The frozen teacher of stage 2."""

    prompts: str = ""
    """Export of a teacher run, published checkpoint or `zoo:NAME`, or folder of published teachers; empty: `clip` as it
    is, with the data set's own templates."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """The CLIP under the prompts; an export folder names its own."""

    @property
    def named(self) -> bool:
        """Whether there is any."""
        return bool(self.prompts or self.clip.model)


@dataclass(frozen=True, kw_only=True)
class DistillLossConfig:
    """PromptKD's only term (docs/papers/promptkd.md, eq. 13)."""

    weight: AboveZero = 1000.0
    """Published: 200 for FGVCAircraft, Flowers102 and DTD, 1000 for the others."""
    temperature: AboveZero = 1.0
    """Divides both logits."""
    reduction: Literal["element", "batch"] = "element"
    """`element`: mean over images and classes (the code; the weights belong to it); `batch`: sum over classes."""


@dataclass(frozen=True, kw_only=True)
class PromptKDOptimConfig(OptimConfig):
    """Optimiser and schedule."""

    schedule: Literal["epoch_cosine", "cosine", "wsd", "constant"] = "epoch_cosine"  # type: ignore[assignment]
    """`epoch_cosine` changes between epochs only (objective.py); the others are the core's."""
    first_epoch_lr: Amount = 1e-5
    """Rate during the first epoch of `epoch_cosine`."""
    warmup_steps: Duration = 0
    """Linear warm-up: lr * (step + 1) / warmup_steps."""

    def __post_init__(self) -> None:
        require(
            self.schedule != "epoch_cosine" or not self.warmup_steps,
            "optim.warmup_steps",
            f"is {self.warmup_steps}, but epoch_cosine warms up in its first epoch; set it to 0",
        )


def published_optim() -> PromptKDOptimConfig:
    """SGD of every run of both stages (docs/papers/promptkd.md#recipe)."""
    return PromptKDOptimConfig(
        name="sgd", lr=0.005, momentum=0.9, weight_decay=5e-4, decay_all=True, clip_grad_norm=0.0
    )


@dataclass(frozen=True, kw_only=True)
class PromptKDConfig(RunConfig):
    """What the two training stages share."""

    steps: Length = "20ep"  # type: ignore[assignment]
    """Epochs (`20ep`) of as many whole batches as the images make, examples (`1e6ex`) or optimiser steps."""
    batch_size: Positive = 8
    """Global batch: images per optimiser step over all ranks."""
    optim: PromptKDOptimConfig = field(default_factory=published_optim)
    """Optimiser and schedule."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """The data set and the training views."""
    select: Literal["last", "val", "upstream"] = "last"
    """Weights that are exported: the last, the best on validation images, or, as the reference reports, on *test* images."""
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """Type of the towers' matrix products; all else is fp32. fp16 needs a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.select == "last" or bool(self.evaluation.every_steps),
            "select",
            f"is {self.select}, but evaluation.every_steps is 0; set it, e.g. evaluation.every_steps=1ep",
        )
        require(
            self.deepspeed.precision == "fp32",
            "deepspeed.precision",
            f"is {self.deepspeed.precision}; prompts and statistics stay fp32: set autocast=bf16 instead",
        )
        require(
            self.deepspeed.zero_stage < 3,
            "deepspeed.zero_stage",
            "is 3, but weights are averaged whole; use 1 or 2",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(PromptKDConfig):
    """Stage 1: prompts of both towers by PromptSRC, with the labels of a few images a class."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    """The frozen CLIP."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """Depth, number and start of the prompts."""
    classes: Literal["base", "all"] = "base"
    """Classes whose labels are used: the first half (base-to-novel), or all (few-shot; the other settings' ImageNet)."""
    shots: Count = 16
    """Labelled images a class; 0: the whole training split."""
    fewer: Fewer = "refuse"
    """What happens to a class with fewer images than shots (released code: keep)."""
    loss: PromptSRCLossConfig = field(default_factory=PromptSRCLossConfig)
    """Weights of the terms."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """Average over the epochs, which is exported."""
    frozen_templates: str = "openai60"
    """Prompts of the frozen class vectors: `openai60` of PromptSRC, `set` (the data set's own), or a text file."""
    classes_per_chunk: Count = 0
    """Classes of a pass of the text tower, each computed again in the backward pass to save memory; 0: all in one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.clip.model), "clip.model", "is empty; name the CLIP whose prompts are learned")
        require(
            "{}" in self.prompts.template or "{c}" in self.prompts.template,
            "prompts.template",
            f"is {self.prompts.template!r}, without {{}} for the class name",
        )
        require(
            not self.data.teacher_outputs, "data.teacher_outputs", "has no effect: stage 1 has no teacher"
        )


@dataclass(frozen=True, kw_only=True)
class StudentConfig(PromptKDConfig):
    """Stage 2: visual prompts and a projector, without labels, by KL to the teacher's logits over all classes."""

    student: ClipConfig = field(default_factory=ClipConfig)
    """The student's CLIP, of which image tower and logit scale are used."""
    prompts: StudentPromptConfig = field(default_factory=StudentPromptConfig)
    """The student's prompts."""
    projector_layers: Positive = 2
    """Linear layers, BatchNorm and ReLU between them."""
    teacher: TeacherSource = field(default_factory=TeacherSource)
    """Not loaded where class_vectors and data.teacher_outputs hold what it says."""
    class_vectors: str = ""
    """File of build_bank.py; empty: computed from the teacher when the run starts."""
    text_every_step: bool = False
    """Run the teacher's text tower at every step, as the reference does; for measuring only."""
    protocol: Setting = "base_to_novel"
    """Images that are trained on, and classes that are evaluated."""
    shots: Count = 0
    """Unlabelled images a class, picked by their labels (ablation); 0: the whole training split."""
    fewer: Fewer = "refuse"
    """What happens to a class with fewer images than shots."""
    hold_out: BelowOne = 0.5
    """domain_generalization: share of the only split that is for the test; 0: all is trained and tested on, as published."""
    loss: DistillLossConfig = field(default_factory=DistillLossConfig)
    """The KL term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.student.model), "student.model", "is empty; name the CLIP of the student")
        stored = bool(self.class_vectors) and bool(self.data.teacher_outputs)
        require(
            self.teacher.named or stored,
            "teacher",
            "is empty; name its prompts or clip.model, or give class_vectors and data.teacher_outputs",
        )
        require(
            not (self.text_every_step and self.class_vectors),
            "text_every_step",
            "computes class vectors; leave class_vectors empty",
        )
        if self.protocol == "domain_generalization":
            require(not self.shots, "shots", f"has no effect with protocol={self.protocol}; set hold_out")
            require(self.select != "val", "select", "is val, but these sets have one split; use last")


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """build_bank.py: class vectors of a teacher, and where asked its image embeddings."""

    out: str = ""
    """File of the class vectors, e.g. runs/dtd/class_vectors.safetensors."""
    teacher: TeacherSource = field(default_factory=TeacherSource)
    """The teacher."""
    protocol: Setting = "base_to_novel"
    """The student's: which teacher is taken from a folder of published ones."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """The data set and the views, whose outputs go to data.teacher_outputs."""
    image_views: Count = 0
    """Views of each image whose embeddings are stored too; 0: class vectors only."""
    split: Literal["train", "test"] = "train"
    """Split of the stored images; `test` for the sets of domain_generalization."""
    seed: Seed = 0
    """Seed of the views."""
    batch_size: Positive = 64
    """Images per forward pass."""
    threads: Processes = 0
    """CPU threads; 0: torch's default."""

    def __post_init__(self) -> None:
        require(bool(self.out), "out", "is empty; name the file that is written")
        require(bool(self.data.set), "data.set", "is empty; name the data set of the classes")
        require(self.teacher.named, "teacher", "is empty; name its prompts, or clip.model for a plain CLIP")
        require(
            (self.image_views > 0) == bool(self.data.teacher_outputs),
            "data.teacher_outputs",
            "is the folder that image_views are written to; give both or neither",
        )
