"""One step: the student's answers, and its replaced layers on the teacher's inputs, against the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from projects.matvlm.config import MatvlmConfig
from projects.matvlm.mixer import FLOAT32, Mamba2Mixer
from projects.matvlm.objective import layer_loss, logit_loss
from projects.matvlm.surgery import mixers_of
from vlmkd.chat_ids import IGNORED
from vlmkd.chat_runs import ChatTask, stored_teacher
from vlmkd.config import OptimConfig, RunConfig
from vlmkd.data.chats import ChatTokens
from vlmkd.export.mllm import ChatParts
from vlmkd.losses.tokens import TeacherStates, TopK
from vlmkd.train.optim import half_cosine
from vlmkd.train.task import Batch, StepOutput, combine

Losses = tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]
"""By name, their weights, and numbers for the log."""


class MatvlmTask(ChatTask):
    """A hybrid, and the frozen model that it was, where what that one said is not stored."""

    checker = "projects.matvlm.student"

    def __init__(
        self, cfg: MatvlmConfig, parts: ChatParts, tokens: ChatTokens, teacher: ChatParts | None
    ) -> None:
        super().__init__(parts, tokens, teacher)
        self.cfg = cfg
        self.body: Any = parts.module.decoder.model
        self.mamba = [
            index for index, layer in enumerate(self.body.layers) if isinstance(layer.self_attn, Mamba2Mixer)
        ]

    def step(self, batch: Batch, step: int) -> StepOutput:
        """docs/papers/matvlm.md, eq. 12."""
        loss = self.cfg.loss
        masks = mixer_masks(batch["segments"])
        counted = None if loss.padding else batch["segments"] > 0
        teacher = None if self.teacher is None else self.teacher.module
        looks: dict[str, Tensor] = {}
        if teacher is not None:
            with self.watch.span("teacher"), torch.no_grad(), self.looks() as looks:
                with layers_seen(teacher.decoder.model, self.mamba if loss.layer else []) as seen:
                    states = teacher(batch)

        def losses(hidden: Tensor) -> Losses:
            head = self.core.head
            with self.watch.span("loss"), self.teacher_head():
                wanted: TeacherStates | TopK | None = stored_teacher(batch)
                if teacher is not None:
                    wanted = TeacherStates(states, teacher.head.weight, teacher.head.bias)
                assert wanted is not None
                found = logit_loss(
                    hidden, head.weight, wanted, batch["targets"],
                    reduction=loss.logit_reduction, samples=len(batch["keys"]), counted=counted,
                    divergence=loss.divergence, temperature=loss.temperature, weight=loss.logits, ce_weight=loss.ce,
                    bias=head.bias, chunk=loss.chunk,
                )  # fmt: skip
            terms, weights = {"token": found.total}, {"token": 1.0}
            metrics = {"kl": found.divergence, "next_token": found.ce, "agreement": found.agreement}
            if loss.layer and teacher is not None:
                pairs = teacher_forced(self.body, teacher.decoder.model, seen, masks)
                terms["layer"] = layer_loss(pairs, loss.layer_reduction, counted)
                weights["layer"] = loss.layer
                with torch.no_grad():
                    metrics["layer_error"] = layer_loss(pairs, "rel_mse", counted) / len(pairs)
            return terms, weights, metrics

        terms, weights, metrics = self.student({**batch, **looks}, then=losses, **masks)
        output = combine(terms, weights)
        output.metrics = metrics | {"cut": batch["cut"]}
        return output

    def weight(self, batch: Batch) -> float:
        """What the divergence is divided by: chats, tokens, or tokens of answers."""
        reduction = self.cfg.loss.logit_reduction
        if reduction == "batch_sum":
            return len(batch["keys"])
        if reduction == "answer_mean":
            return float((batch["targets"] != IGNORED).sum())
        return float(batch["segments"].numel() if self.cfg.loss.padding else (batch["segments"] > 0).sum())

    def param_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """As by default, but what stays float32 beside half precision has a group of its own, because ZeRO joins a group."""
        exact = {id(getattr(mixer, name)) for mixer in mixers_of(self.core).values() for name in FLOAT32}
        groups = []
        for group in super().param_groups(optim):
            for kind, apart in (("", False), ("/float32", True)):
                members = [p for p in group["params"] if (id(p) in exact) == apart]
                if members:
                    groups.append({**group, "name": group["name"] + kind, "params": members})
        return groups

    def lr_factor(self, step: int, cfg: RunConfig) -> float:
        """As by default; the fall of `wsd` is a cosine where `decay` says so."""
        factor = super().lr_factor(step, cfg)
        falls = cfg.optim.schedule == "wsd" and step >= cfg.optim.warmup_steps
        return half_cosine(1 - factor) if falls and self.cfg.decay == "cosine" else factor

    def tags(self) -> dict[str, str | int | float]:
        """Share of replaced layers, in per cent, and what they started from."""
        share = round(100 * len(self.mamba) / len(self.body.layers), 1)
        return {"mamba": share, "start": self.cfg.hybrid.start}


def mixer_masks(segments: Tensor) -> dict[str, Tensor]:
    """What mixers need of rows of chats [R, T]: where their tokens are, and which chat each is of where rows are packed."""
    masks = {"token_mask": segments > 0}
    return masks | ({"seq_idx": segments} if int(segments.max()) > 1 else {})


@contextmanager
def layers_seen(body: Any, layers: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Inside, a forward pass of `body` leaves input and output [R, T, D] of each of these layers."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[index] = (args[0] if args else kwargs["hidden_states"], _states(output))

    handles = [
        body.layers[index].register_forward_hook(partial(keep, index), with_kwargs=True) for index in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def teacher_forced(
    student: Any, teacher: Any, seen: Mapping[int, tuple[Tensor, Tensor]], masks: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Outputs [R, T, D] of the student's layers on what the teacher's got, and the teacher's; of the last one normed."""
    pairs = []
    for index, (given, wanted) in sorted(seen.items()):
        found = _states(student.layers[index](given, **masks))
        if index == len(student.layers) - 1:
            norms = [getattr(body, "final_layernorm", None) or body.norm for body in (student, teacher)]
            found, wanted = norms[0](found), norms[1](wanted)
        pairs.append((found, wanted))
    return pairs


def _states(output: Any) -> Tensor:
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states
