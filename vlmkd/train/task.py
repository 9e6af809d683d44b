"""The contract between a paper's method and the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmkd.train.timing import Stopwatch

if TYPE_CHECKING:
    from vlmkd.config import OptimConfig, RunConfig
    from vlmkd.evaluation.base import Result

Batch = dict[str, Any]
"""One micro-batch: `keys`, the names of its samples, and whatever the loader and the task agree on, nested as they like."""


@dataclass
class StepOutput:
    """What one micro-batch gives the loop."""

    loss: Tensor
    """Scalar to back-propagate: a mean over what `Task.weight` counts."""
    terms: dict[str, Tensor]
    """Weighted, detached scalars that sum to `loss`."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Other detached scalars for the log."""


class Task:
    """A student, its frozen teachers, and the order in which they are called.

    Not an nn.Module: so the teacher cannot leak into the optimiser, the ZeRO partition or a checkpoint. After
    start-up `student` is DeepSpeed's wrapper, and calling it goes through the engine.
    """

    student: nn.Module
    """Holds every trainable parameter; called once per step."""
    teachers: list[nn.Module]
    """Frozen, in eval mode, outside the student, never checkpointed; empty when cached or none."""
    without_teacher: str = ""
    """The override that trains on the labels alone, where the method has one: advice for users of a bad teacher."""
    watch: Stopwatch
    """Times the parts of a step: `with self.watch.span("teacher"): ...`; spans `teacher` and `loss` are logged."""

    def step(self, batch: Batch, step: int) -> StepOutput:
        """Forward pass and losses of one micro-batch at optimiser step `step`."""
        raise AssertionError(f"{type(self).__name__} does not define step()")

    def weight(self, batch: Batch) -> float:
        """What a micro-batch's loss is a mean over: its rows, or e.g. the tokens that are learned.

        An optimiser step trains on the mean over this number in all its micro-batches on all ranks. A loss of the batch
        as a set (contrastive) has no such mean, and its micro-batches are equally large.
        """
        return len(batch["keys"])

    def items(self, batch: Batch) -> dict[str, float]:
        """How much of what a micro-batch holds, by kind; the log tells each as a rate."""
        return {"samples": len(batch["keys"])}

    def flops(self, batch: Batch) -> float:
        """Floating-point operations that a micro-batch asks of the models, forward and backward; 0: not known."""
        return 0.0

    def param_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Optimiser groups; the default splits decayed from undecayed parameters."""
        from vlmkd.train.optim import decay_groups

        return decay_groups(self.student, optim)

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        """Learning rate at optimiser step `step` as a share of the peak."""
        from vlmkd.train.optim import lr_factor

        return lr_factor(step, cfg.steps, cfg.optim)

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """Parameters that the engine clamps to [low, high] after each optimiser step, master weights included."""
        return []

    def masters(self) -> list[nn.Parameter]:
        """Parameters that `master_value` reads in fp32 whatever the training precision, after each optimiser step."""
        return []

    def after_update(self, step: int) -> None:
        """Called after each optimiser step and its clamps (averages)."""

    def after_evaluation(self, results: list[Result], step: int) -> bool:
        """Called after each evaluation of the student, the closing one too; True ends the run."""
        return False

    def state(self) -> dict[str, Any]:
        """Tensors and numbers beside the parameters that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""

    def predictor(self) -> Any:
        """What evaluators receive (see vlmkd.evaluation.base)."""
        raise AssertionError(f"{type(self).__name__} does not define predictor()")

    def final_predictors(self) -> dict[str, Any]:
        """Other weights of the student by name (averages, the best so far), evaluated once when training has ended.

        The last of them is what is exported.
        """
        return {}

    def teacher_predictors(self) -> dict[str, Any]:
        """Predictors of the loaded teachers by name, evaluated once beside the student."""
        return {}

    def teacher_logits(self, embeds: Tensor) -> Tensor | None:
        """Class logits [N, C] of the teacher's image embeddings [N, D]; None where it has no classes."""
        return None

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the exported student (`student`) and of the loaded teachers, under their predictors' names."""
        return {}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the student into `folder` from its complete `weights` (rank 0 only)."""
        raise AssertionError(f"{type(self).__name__} does not define export()")

    def check_export(self, folder: Path) -> None:
        """Reload `folder` with an outside library in a fresh process and compare its outputs with what was exported."""
        raise AssertionError(f"{type(self).__name__} does not define check_export()")


def master_value(parameter: Tensor) -> Tensor:
    """`parameter` in fp32 (float64 stays): its master weight where the engine gave it one, with gradients to it.

    Rounding a parameter to bf16 may turn a decision that hangs on it; see `Task.masters`.
    """
    value = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    master: Tensor | None = getattr(parameter, "master", None)
    return value if master is None else master + (value - value.detach())


def combine(terms: dict[str, Tensor], weights: dict[str, float]) -> StepOutput:
    """Sum `terms` times `weights`; every term needs a weight and every weight a term.

    A caller leaves out a term whose weight is zero, so that it is not computed.
    """
    if terms.keys() != weights.keys():
        raise ValueError(f"terms {sorted(terms)} and weights {sorted(weights)} must have the same names")
    weighted = {name: term * weights[name] for name, term in terms.items()}
    loss = torch.stack([term.float() for term in weighted.values()]).sum()
    return StepOutput(loss=loss, terms={name: term.detach() for name, term in weighted.items()})


def frozen(module: nn.Module) -> nn.Module:
    """`module` in eval mode with gradients off."""
    return module.eval().requires_grad_(False)
