"""TinyCLIP's configuration: what is distilled from what, how the student starts, and the losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vlmkd.config import (
    AboveZero,
    Amount,
    BelowOne,
    Count,
    DataConfig,
    Duration,
    EvaluationConfig,
    LayerList,
    Range,
    RunConfig,
    require,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A CLIP: any name that vlmkd.models.clip.load_clip takes."""

    model: str = ""
    """open_clip architecture, JSON model config, `local-dir:FOLDER`, `hf:FOLDER` or `zoo:NAME`."""
    pretrained: str = ""
    """open_clip tag or weights file; empty: random, or the folder's own weights."""


@dataclass(frozen=True, kw_only=True)
class InheritConfig:
    """Manual weight inheritance (docs/papers/tinyclip.md, eq. 14); each tower may come from another source."""

    image_from: ModelConfig = field(default_factory=ModelConfig)
    """Source of the image tower; empty: not inherited."""
    text_from: ModelConfig = field(default_factory=ModelConfig)
    """Source of the text tower; empty: not inherited."""
    layers: Literal["interval_front", "uniform", "list"] = "interval_front"
    """Which layers: every floor(D/K)-th from the front (the released code), evenly spread, or a list."""
    image_layers: LayerList = field(default_factory=list)
    """Source layers of the image tower, with layers=list."""
    text_layers: LayerList = field(default_factory=list)
    """Source layers of the text tower, with layers=list."""
    width: Literal["front", "magnitude", "list"] = "front"
    """Which channels and heads: the leading ones (the released code), those of the largest weights, or lists."""
    image_units: dict[str, list[int]] = field(default_factory=dict)
    """Source units of the image tower by group (hidden, heads, mlp, ...), with width=list; other groups: leading ones."""
    text_units: dict[str, list[int]] = field(default_factory=dict)
    """Source units of the text tower, with width=list."""
    positional: Literal["interpolate", "refuse"] = "interpolate"
    """What happens when the student has another patch grid than the source."""
    allow_activation_change: bool = False
    """Accept a source of another activation (published recipes: GELU students from OpenAI's QuickGELU weights)."""


@dataclass(frozen=True, kw_only=True)
class LogitScaleConfig:
    """Temperature of the affinities: logit_scale = 1 / temperature."""

    mode: Literal["fixed", "learned"] = "fixed"
    """`fixed` pins student and teachers (published scripts); `learned` trains the student's, teachers keep theirs."""
    value: AboveZero = 50.0
    """Scale with mode=fixed, for student and teachers."""
    legacy_first_step: bool = False
    """Replay the released code, whose student runs step 0 at 1 / 0.07 before it is pinned."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms; 0 leaves a term out."""

    affinity: Amount = 1.0
    """Affinity mimicking (docs/papers/tinyclip.md, eq. 5; alpha of the released code)."""
    affinity_reduction: Literal["half", "sum"] = "half"
    """`half` averages the two directions (released code), `sum` adds them (paper)."""
    affinity_chunk: Count = 0
    """Memory of the tiled affinity loss: at most 2 * chunk * B numbers at once; 0: dense."""
    contrastive: Amount = 0.0
    """Hard-label image-text loss (1 - alpha of the released code)."""
    contrastive_kind: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's InfoNCE or SigLIP's pairwise sigmoid loss."""
    feature: Amount = 0.0
    """Feature distillation FD (CLIP-KD; its weight is 2000)."""
    interactive: Amount = 0.0
    """Interactive contrastive loss ICL (CLIP-KD)."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """One zero-shot classification set."""

    name: str = ""
    """Name in tables and logs; empty: the last part of `data`."""
    data: str = ""
    """ImageNet-layout folder, webdataset shards, or `emoji:unseen_drawing` / `emoji:unseen_concept`."""
    class_names: str = ""
    """`imagenet`, or a text file with one class per line; empty: the data set's own classnames.txt."""
    templates: str = ""
    """`openai`, `simple`, or a text file with `{}` or `{c}` per line; empty: the data set's own, else `openai`."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """One image-text retrieval set."""

    name: str = ""
    """Name in tables and logs; empty: the last part of `data`."""
    data: str = ""
    """Image folder of a captions file, webdataset shards, or an `emoji:` test set."""
    captions: str = ""
    """COCO or Karpathy captions JSON for an image folder."""


@dataclass(frozen=True, kw_only=True)
class SetsConfig(EvaluationConfig):
    """When evaluations run, and on which sets."""

    zero_shot: list[ZeroShotConfig] = field(default_factory=list)
    """Zero-shot classification sets."""
    retrieval: list[RetrievalConfig] = field(default_factory=list)
    """Retrieval sets."""


@dataclass(frozen=True, kw_only=True)
class TinyCLIPConfig(RunConfig):
    """What both kinds of TinyCLIP runs share."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training stream."""
    evaluation: SetsConfig = field(default_factory=SetsConfig)
    """Evaluations."""

    student: ModelConfig = field(default_factory=ModelConfig)
    """The student; `local-dir:RUN/export` starts it from an earlier stage."""
    teachers: list[ModelConfig] = field(default_factory=list)
    """Frozen teachers, their affinities averaged; with teacher caches they are only compared with them, or may be empty."""
    logit_scale: LogitScaleConfig = field(default_factory=LogitScaleConfig)
    """Temperature."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.student.model),
            "student.model",
            "is empty; name an architecture, a JSON file or local-dir:FOLDER",
        )
        mimics = self.loss.affinity + self.loss.feature + self.loss.interactive > 0
        require(
            mimics or self.loss.contrastive > 0, "loss", "has all weights 0; give at least one term a weight"
        )
        require(
            self.has_teacher == mimics,
            "teachers",
            "is empty but a distillation term has a weight; name a teacher or a teacher cache"
            if mimics
            else "is given but loss.affinity, loss.feature and loss.interactive are all 0; drop it or weigh a term",
        )
        require(
            not self.logit_scale.legacy_first_step or self.logit_scale.mode == "fixed",
            "logit_scale.legacy_first_step",
            "goes with logit_scale.mode=fixed",
        )

    @property
    def cached(self) -> bool:
        """Whether teacher embeddings come from caches."""
        return any(source.teacher_caches for source in self.data.sources)

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher, loaded or cached."""
        return bool(self.teachers) or self.cached


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TinyCLIPConfig):
    """Distil a student that starts at random, by manual inheritance, or from an earlier stage."""

    inherit: InheritConfig = field(default_factory=InheritConfig)
    """Manual inheritance into the student."""
    ema_decay: BelowOne = 0.0
    """Decay of a moving average of the student, which is then evaluated and exported; 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.ema_decay == 0.0 or self.deepspeed.zero_stage < 3,
            "ema_decay",
            "needs whole weights on each rank; use deepspeed.zero_stage 1 or 2, or ema_decay=0",
        )
        for choice, what in (("width", "units"), ("layers", "layers")):
            listed = any(getattr(self.inherit, f"{tower}_{what}") for tower in ("image", "text"))
            require(
                listed == (getattr(self.inherit, choice) == "list"),
                f"inherit.image_{what}",
                f"and inherit.text_{what} go with inherit.{choice}=list, and only with it",
            )


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Learned masks (docs/papers/tinyclip.md, eq. 15-21)."""

    start_sparsity: BelowOne = 0.0
    """Target at step 0; absolute, relative to the full model."""
    target_sparsity: BelowOne = 0.25
    """Share of the transformer weights to remove."""
    sparsity_warmup_steps: Duration = 1000
    """Steps over which the target rises linearly."""
    lr: Amount = 0.02
    """Learning rate of the log alphas."""
    multiplier_lr: Amount = 0.02
    """Learning rate of the Lagrange multipliers, which ascend."""
    sides: Literal["one", "two"] = "one"
    """`one` penalises only missing sparsity (released code), `two` any deviation (paper)."""
    joint: bool = True
    """One sparsity over both towers, so that their split is learned."""
    full_model: str = ""
    """Full-size architecture of a pruned student that does not know its own (a published `auto` checkpoint)."""
    freeze_pruned: bool = False
    """Units that an earlier stage removed cannot come back."""
    round_to: Annotated[int, Range(1, 64)] = 1
    """Round kept widths to multiples of 1 (off), 8, 16 or 64 when fusing."""
    legacy_projection_scale: bool = False
    """Replay the released fusing, which scales the output projections too and drops the bias of empty attention."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig(TinyCLIPConfig):
    """Learn which units to keep while distilling; the export is the fused dense student, which `distill` trains on."""

    masks: MaskSettings = field(default_factory=MaskSettings)
    """Masks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        masks = self.masks
        require(
            masks.start_sparsity <= masks.target_sparsity,
            "masks.target_sparsity",
            f"is {masks.target_sparsity}, below masks.start_sparsity={masks.start_sparsity}",
        )
        require(
            masks.round_to in (1, 8, 16, 64), "masks.round_to", f"is {masks.round_to}; choose 1, 8, 16 or 64"
        )
