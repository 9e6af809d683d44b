"""Every field of a MaTVLM run: which layers become Mamba-2, what their mixers start from, and what they learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from projects.matvlm.objective import Divergence, LayerReduction, LogitReduction
from projects.matvlm.ssd import CHUNK, Backend
from vlmkd.chat_config import ChatRunConfig
from vlmkd.config import AboveZero, Amount, LayerList, Positive, require


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """How attention becomes Mamba-2 (docs/papers/matvlm.md#from-attention-to-mamba-2)."""

    preset: Amount = 0.0
    """The paper's share of replaced layers, 12.5, 25 or 50 %: its lists for 32 layers, for others the same rule."""
    layers: LayerList = field(default_factory=list)
    """The replaced layers themselves, in place of a preset."""
    start: Literal["attention", "random"] = "attention"
    """Projections from the attention that is replaced (paper), or random ones, for comparison."""
    bias: Literal["never", "auto"] = "never"
    """auto: the projections have biases where the attention has them, copied; never (paper): those are dropped."""
    conv_start: Literal["random", "identity"] = "random"
    """random (paper), or the convolution lets each token pass unchanged at the start."""
    fold_scale: bool = False
    """Multiply the queries' rows by attention's scale (head width^-0.5 in most), which the paper leaves out."""
    norm_start: Amount = 1.0
    """Weight of the gated norm at the start; 1 (paper) gives every head's output a root mean square of 1, whatever attention's was."""
    chunk: Positive = CHUNK
    """Tokens a chunk of the scan; no result depends on it. mamba-ssm's kernels are fastest with 256."""
    backend: Backend = "auto"
    """auto: mamba-ssm's kernels where they import and the tensors are on a GPU, else PyTorch."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is learned (docs/papers/matvlm.md, eq. 10 to 12)."""

    layer: Amount = 1.0
    """Weight of the distance of replaced layers from the teacher's, each fed what the teacher's is."""
    layer_reduction: LayerReduction = "rel_mse"
    """frob (published): a norm, whatever the error; mse, or rel_mse, relative to the teacher's output."""
    logits: Amount = 1.0
    """Weight of the divergence from the teacher's next tokens."""
    logit_reduction: LogitReduction = "answer_mean"
    """batch_sum (published): the sum over all positions, per chat; the mean of them; or that of the answers' tokens."""
    divergence: Divergence = "forward"
    """KL of student from teacher (published), or another; jsd is a true one."""
    temperature: AboveZero = 1.0
    """Of both models' softmax."""
    ce: Amount = 0.0
    """Weight of the cross entropy of the answers; published: 0."""
    padding: bool = False
    """Count padding as the positions of frob, mse, rel_mse, batch_sum and token_mean too (published)."""
    chunk: Positive = 128
    """Positions whose logits are held at a time."""


@dataclass(frozen=True, kw_only=True)
class MatvlmConfig(ChatRunConfig):
    """A run: one stage. `student` is the model before surgery, or the hybrid of the run before; `teacher` may be empty."""

    hybrid: HybridConfig = field(default_factory=HybridConfig)
    """Which layers become Mamba-2."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses."""
    train_projector: bool = True
    """The projector learns beside the mixers (published), or stays."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How `optim.schedule=wsd` falls over `optim.decay_steps` (published: cosine)."""
    dropout: bool = False
    """Keep the decoder's dropout in training (published: 0.1 in Phi-2, in frozen layers too)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        preset, layers = self.hybrid.preset, self.hybrid.layers
        told = f"is {preset:g}; write 12.5, 25 or 50, or give hybrid.layers"
        require(preset in (0, 12.5, 25, 50) and not (preset and layers), "hybrid.preset", told)
        require(self.student.named, "student", "is empty; name tower and decoder, or the export of a run")
        require(
            self.deepspeed.zero_stage < 3 or self.deepspeed.precision == "fp32",
            "deepspeed.zero_stage",
            "is 3 in half precision, where DeepSpeed takes trained weights of one type only, and the mixers keep some in "
            "float32; use 2",
        )
        loss = self.loss
        require(loss.layer + loss.logits + loss.ce > 0, "loss", "has no term with a weight above 0")
        if self.data.teacher_outputs:
            live = "needs the teacher itself"
            require(not loss.layer, "loss.layer", f"{live}; set 0, or leave data.teacher_outputs empty")
            told = f"={loss.logit_reduction} {live}, data.teacher_outputs has answers alone; set answer_mean"
            require(loss.logit_reduction == "answer_mean", "loss.logit_reduction", told)
        require(bool(self.data.chats), "data.chats", "is empty; name a file of conversations")
