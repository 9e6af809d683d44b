"""The contract between a paper's method and the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmkd.train.optim import decay_groups, lr_factor
from vlmkd.train.timing import Stopwatch

if TYPE_CHECKING:
    from vlmkd.config import OptimConfig, RunConfig
    from vlmkd.evaluation.base import Result
    from vlmkd.train.selection import Selection

Batch = dict[str, Any]
"""`keys`, the names of its samples, and whatever loader and task agree on, nested as they like."""


@dataclass
class StepOutput:
    loss: Tensor
    """Scalar to back-propagate: a mean over what `Task.weight` counts."""
    terms: dict[str, Tensor]
    """Weighted, detached scalars that sum to `loss`."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Other detached scalars for the log."""


class Task:
    """A student, its frozen teachers, and the order in which they are called.

    Not an nn.Module, so that the teacher cannot leak into the optimiser, the ZeRO partition or a checkpoint. After
    start-up `student` is DeepSpeed's wrapper.
    """

    student: nn.Module
    """Holds every trainable parameter; called once per micro-batch."""
    teachers: list[nn.Module]
    """Frozen, in eval mode, outside the student, never checkpointed; empty when cached or none."""
    average: Selection | None = None
    """Takes the place of the present weights in evaluations and the export, once it has any."""
    selections: Sequence[Selection] = ()
    """Other weights, evaluated when training has ended; the last that has any is exported."""
    without_teacher: str = ""
    """The override that trains on labels alone, if any: advice for users of a bad teacher."""
    watch: Stopwatch
    """Times parts of a step, as in `with self.watch.span("teacher"): ...`; the metrics tell each."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        """What optimiser step `step` trains on in place of a micro-batch, as the loader left it, before it is weighed.

        Called under the step's random state.
        """
        return batch

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Forward pass and losses of one micro-batch at optimiser step `step`.

        Every trained parameter takes part, because ZeRO waits for its gradient on all ranks: what a micro-batch has no
        input for gets a blank one, times zero.
        """
        raise NotImplementedError

    def weight(self, batch: Batch) -> float:
        """What a micro-batch's loss is a mean over: its rows, or e.g. the tokens that are learned.

        An optimiser step trains on the mean over all that its micro-batches on all ranks count so. A loss of the batch as
        a set (contrastive) has no such mean, and its micro-batches are equally large.
        """
        return len(batch["keys"])

    def items(self, batch: Batch) -> dict[str, float]:
        """What a micro-batch holds, by kind; the log tells rates."""
        return {"samples": len(batch["keys"])}

    def flops(self, batch: Batch) -> float:
        """FLOPs of the models for a micro-batch, forward and backward; 0: not known."""
        return 0.0

    def param_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Optimiser groups; the default splits decayed from undecayed parameters."""
        return decay_groups(self.student, optim)

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        """Learning rate at optimiser step `step`, as a share of the peak."""
        return lr_factor(step, cfg.steps, cfg.optim)

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """Parameters that are clamped, with their master weights, to [low, high] after each step."""
        return []

    def kept(self) -> list[Selection]:
        return [one for one in (self.average, *self.selections) if one is not None]

    def masters(self) -> list[nn.Parameter]:
        """Parameters that `master_value` reads in fp32 at any precision; by default all, if weights are kept."""
        return [p for p in self.student.parameters() if p.requires_grad] if self.kept() else []

    def after_evaluation(self, results: list[Result], step: int) -> None:
        """Called after each evaluation of the student, with whatever weights."""

    def state(self) -> dict[str, Any]:
        """Tensors and numbers beside the parameters that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...

    def predictor(self) -> Any:
        """What evaluators receive (see vlmkd.predictors): the student with its weights at the call."""
        raise NotImplementedError

    def teacher_predictors(self) -> dict[str, Any]:
        """Predictors of the loaded teachers by name."""
        return {}

    def teacher_logits(self, embeds: Tensor) -> Tensor | None:
        """Class logits [N, C] of the teacher's image embeddings [N, D]; None where it has no classes."""
        return None

    def tags(self) -> dict[str, str | int | float]:
        """What tables may pivot by beside seed and run, e.g. method and held-out domain."""
        return {}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the exported student (`student`) and the loaded teachers, under their predictors' names."""
        return {}

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> Any:
        """On rank 0, write the student into `folder` with the complete `weights` of the selection `name`.

        Returns what `check_exports` compares.
        """
        raise NotImplementedError

    def check_exports(self, written: dict[Path, Any]) -> None:
        """Compare the folders, reloaded by an outside library in a fresh process, with what `export` returned."""
        raise NotImplementedError


@torch.no_grad()
def teacher_image_embeds(batch: Batch, teacher: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Unit vectors [B, D] of a labelled batch's images by its teacher, and which rows [B] it has answered (None: all).

    Stored ones, or those that `teacher` returns (or its `ClipOutput`) from its own view or the student's pixels.
    """
    if "teacher_image_embeds" in batch:
        return batch["teacher_image_embeds"][0], batch["teacher_valid"][0]
    assert teacher is not None
    own = batch["teacher_images"][0]
    found = teacher(batch["images"] if own is None else own, own_statistics=own is not None)
    return found if isinstance(found, Tensor) else found.image_embeds, None


def master_value(parameter: Tensor) -> Tensor:
    """`parameter` in fp32 (float64 stays): its master weight where `Task.masters` asks for it, with gradients to itself.

    Rounded to bf16 it may turn a decision that hangs on it.
    """
    value = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    master: Tensor | None = getattr(parameter, "master", None)
    return value if master is None else master + (value - value.detach())


def combine(terms: dict[str, Tensor], weights: dict[str, float]) -> StepOutput:
    """Sum `terms` times `weights` of the same names; the caller computes no term of weight 0."""
    assert terms.keys() == weights.keys(), f"terms {sorted(terms)} and weights {sorted(weights)}"
    weighted = {name: term * weights[name] for name, term in terms.items()}
    loss = torch.stack([term.float() for term in weighted.values()]).sum()
    return StepOutput(loss=loss, terms={name: term.detach() for name, term in weighted.items()})


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)
