"""Every field of a LLaVA-MoD run."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from vlmkd.chat_config import ChatRunConfig
from vlmkd.config import AboveZero, Amount, Count, LayerList, Positive, Share, require
from vlmkd.losses.preference import PreferenceKind

Stage = Literal["words", "adapt", "sft", "d2d", "d2s", "prefer"]
FROM_TEACHER: tuple[Stage, ...] = ("d2d", "d2s", "prefer")
SPARSE: tuple[Stage, ...] = ("d2s", "prefer")


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """How the feed-forward layers become sparse (docs/papers/llava_mod.md#architecture)."""

    mode: Literal["none", "sparse", "dense", "first_half", "second_half", "list"] = "none"
    """Which layers: even ones (published), all, a half, or `layers`; none: the student stays dense."""
    layers: LayerList = field(default_factory=list)
    """The layers of mode=list."""
    experts: Positive = 4
    """Experts of a layer."""
    top_k: Positive = 2
    """Experts of a token."""
    backend: Literal["native", "deepspeed"] = "native"
    """Where the experts are: all on each rank, or spread over ranks by DeepSpeed-MoE, at ZeRO stage 1 or 2."""
    expert_parallel: Positive = 1
    """Ranks that share the experts of backend=deepspeed, each of which keeps an equal number of them."""
    aux: Amount = 0.01
    """Weight of the balance losses, summed over layers, and in prefer over preferred and rejected answers."""

    def __post_init__(self) -> None:
        least = f"is {self.top_k}, but a layer has {self.experts} experts (moe.experts)"
        require(self.top_k <= self.experts, "moe.top_k", least)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is learned (docs/papers/llava_mod.md, eq. 3-7)."""

    kd: Amount = 1.0
    """Weight of the divergence from the teacher in d2d and d2s."""
    ce: Amount = 0.0
    """Weight of cross entropy beside it; d2s is published with 1."""
    divergence: Literal["forward", "reverse", "symmetric", "jsd"] = "forward"
    """KL of student from teacher as published, or another."""
    temperature: AboveZero = 1.0
    """Of both models' softmax."""
    vocabulary: Count = 0
    """First entries that the divergence is over; 0: those that both models have."""
    skew: Share = 0.0
    """The student's own share of what the forward divergence is from, or the teacher's of the reverse one's; DistiLLM's alpha."""
    taid: Share = 1.0
    """The teacher's share of the target at first, the rest the student's; it grows to 1 (TAID). 1: the teacher alone."""
    preference: Literal["kto_pair", "sigmoid", "hinge", "ipo", "bco_pair"] = "kto_pair"
    """Of stage prefer."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Weights of several kinds in the place of `preference`, sft too; MPO's are {sigmoid: 0.8, bco_pair: 0.2, sft: 1}."""
    label_smoothing: Share = 0.0
    """Of the sigmoid preference."""
    by_length: bool = False
    """Log-ratios of preferences are means over an answer's tokens, not sums."""
    beta: AboveZero = 0.1
    """Scale of the log-ratios."""
    jsd_beta: Share = 0.5
    """The teacher's share of the mixture that divergence=jsd is from; GKD's beta."""
    on_policy: Share = 0.0
    """Share of the steps of d2d and d2s whose last answers are sampled from the student; GKD's lambda."""
    sample_temperature: Amount = 1.0
    """Of those samples; 0: the likeliest tokens."""
    sample_tokens: Positive = 128
    """Most tokens of a sampled answer."""
    chunk: Positive = 128
    """Rows whose logits are held at a time."""

    def __post_init__(self) -> None:
        skewed = self.skew == 0 or self.divergence in ("forward", "reverse")
        told = "is below 1, and of the forward and the reverse divergence only"
        require(skewed and self.skew < 1, "loss.skew", told)
        kinds = typing.get_args(PreferenceKind)
        for kind in self.mixture:
            require(kind in kinds, f"loss.mixture.{kind}", f"is no kind; choose from {', '.join(kinds)}")
        smooth = not self.label_smoothing or "sigmoid" in self.preferences()
        require(smooth, "loss.label_smoothing", "is of the sigmoid preference only")

    def preferences(self) -> dict[PreferenceKind, float]:
        """Weights of the preference losses."""
        mixture = typing.cast("dict[PreferenceKind, float]", self.mixture)
        return mixture or {self.preference: 1.0}


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """What the released code does otherwise; see the README's deviations."""

    unshifted_mask: bool = False
    """Distil at the positions whose input, not whose prediction, is an answer's token."""
    second_expert: Literal["argmax", "gumbel"] = "argmax"
    """Draw the second expert with Gumbel noise in training."""
    capacity: Amount = 0.0
    """Room of an expert in training, in shares of an even split (released: 1.5); 0: no token is dropped."""
    aux_counts: Literal["first", "all"] = "first"
    """Choices that the balance loss counts; transformers' counts all."""


@dataclass(frozen=True, kw_only=True)
class LlavaModConfig(ChatRunConfig):
    """A run of one stage."""

    stage: Stage = "d2d"
    """`words`, `adapt`: projector, before or through the decoder; `sft`: plain fine-tuning (the teacher, and baselines);
    `d2d`, `d2s`: distillation; `prefer`."""
    train: Literal["stage", "projector", "all"] = "stage"
    """What is trained: as the stage's table says, or the projector alone, or everything but the tower."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """Sparse layers of the student."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses."""
    parity: ParityConfig = field(default_factory=ParityConfig)
    """The released code's behaviour."""

    def __post_init__(self) -> None:
        super().__post_init__()
        told = "is empty; name tower and decoder, or the export of the run before"
        require(self.student.named, "student", told)
        told = "does not go with stage words, which compares the words of rows"
        require(self.stage != "words" or not self.data.pack, "data.pack", told)
        needs, stored = self.stage in FROM_TEACHER, bool(self.data.teacher_outputs)
        told = f"goes with {', '.join(FROM_TEACHER)}, and only with them"
        require(needs == (self.teacher.named or stored), "teacher", f"{told} (or data.teacher_outputs)")
        told = "needs the teacher at other positions than data.teacher_outputs has"
        require(not (stored and self.parity.unshifted_mask), "parity.unshifted_mask", told)
        live = self.stage in ("d2d", "d2s") and not stored
        told = "goes with d2d and d2s only, and needs the teacher itself; leave data.teacher_outputs empty"
        require(live or self.loss.taid == 1, "loss.taid", told)
        require(live or not self.loss.on_policy, "loss.on_policy", told)
        grows = self.moe.mode == "none" or self.stage in ("sft", *SPARSE)
        require(grows, "moe.mode", "goes with sft, d2s and prefer only")
        spread = self.moe.backend == "deepspeed"
        require(spread or self.moe.expert_parallel == 1, "moe.expert_parallel", "needs moe.backend=deepspeed")
        told = "is deepspeed, which needs deepspeed.zero_stage 1 or 2"
        require(not spread or self.deepspeed.zero_stage in (1, 2), "moe.backend", told)
        told = "does not go with moe.backend=deepspeed: ranks whose answers differ in length would wait for each other"
        require(not (spread and self.loss.on_policy), "loss.on_policy", told)
        require(bool(self.data.chats), "data.chats", "is empty; name a file of conversations")
