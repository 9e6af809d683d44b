"""One step of each stage: cross entropy, mimic distillation, preference distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.experts import balance, mark_valid, sparse_layers
from projects.llava_mod.on_policy import is_on_policy, own_answers
from projects.llava_mod.taid import TaidSchedule
from projects.llava_mod.words import said, words_loss
from vlmkd.chat_ids import IGNORED, IMAGE_ID
from vlmkd.chat_runs import ChatTask, stored_teacher
from vlmkd.data.chats import ChatTokens
from vlmkd.export.mllm import ChatParts
from vlmkd.losses.preference import AnswerLogProbs, answer_log_probs, preference_loss
from vlmkd.losses.tokens import Teacher, TeacherStates, TokenLoss, TokenObjective, token_loss
from vlmkd.models.mllm import Mllm
from vlmkd.train.engine import Engine
from vlmkd.train.task import Batch, StepOutput, combine

Losses = tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]
"""By name, their weights, and numbers for the log."""


class LlavaModTask(ChatTask):
    """A student, and from d2d on the frozen teacher, where that one is not stored."""

    checker = "projects.llava_mod.student"

    def __init__(
        self, cfg: LlavaModConfig, parts: ChatParts, tokens: ChatTokens, teacher: ChatParts | None
    ) -> None:
        super().__init__(parts, tokens, teacher)
        self.cfg = cfg
        self.taid = TaidSchedule(cfg.loss.taid, cfg.steps) if cfg.loss.taid < 1 else None

    def prepare(self, batch: Batch, step: int) -> Batch:
        """In a share of the steps, all ranks' alike, the student's own answers in the place of the data's."""
        loss = self.cfg.loss
        if not is_on_policy(self.cfg.seed, step, loss.on_policy):
            return batch
        assert self.teacher is not None
        with self.watch.span("sample"), Engine.whole_weights([self.core]), self.teacher_head():
            shared = min(len(self.core.head.weight), len(self.teacher.module.head.weight))
            most, heat = loss.sample_tokens, loss.sample_temperature
            return own_answers(self.predictor(), batch, shared, most_tokens=most, temperature=heat)

    def step(self, batch: Batch, step: int) -> StepOutput:
        """docs/papers/llava_mod.md, eq. 3 (adapt, sft), 4, 5 and 7 (d2d, d2s), 6 (prefer), 11 (words)."""
        if self.cfg.stage == "words":
            return self._words(batch)
        valid = batch["segments"] > 0
        mark_valid(self.core, valid)
        share = 1.0 if self.taid is None else self.taid.at(step)
        with self.watch.span("teacher"), torch.no_grad(), self.looks() as looks:
            seen = None if self.teacher is None else self.teacher.module(batch)

        def losses(hidden: Tensor) -> Losses:
            with self.watch.span("loss"), self.teacher_head():
                terms, weights, metrics = self._terms(batch, hidden, seen, share)
                if sparse_layers(self.core) and self.cfg.moe.aux:
                    terms["balance"] = self._balance(valid)
                    weights["balance"] = self.cfg.moe.aux
            return terms, weights, metrics

        terms, weights, metrics = self.student({**batch, **looks}, then=losses)
        output = combine(terms, weights)
        output.metrics = metrics | {"cut": batch["cut"]}
        return output

    def _balance(self, valid: Tensor) -> Tensor:
        """Of all rows; of pairs as published, that of the preferred rows and that of the rejected ones, added."""
        counts = self.cfg.parity.aux_counts
        if self.cfg.stage != "prefer":
            return balance(self.core, valid, counts)
        preferred = (torch.arange(len(valid), device=valid.device) < len(valid) // 2)[:, None]
        return balance(self.core, valid & preferred, counts) + balance(self.core, valid & ~preferred, counts)

    def _terms(self, batch: Batch, hidden: Tensor, seen: Tensor | None, share: float) -> Losses:
        """`share`: the teacher's in the target, 1 without TAID."""
        if self.cfg.stage == "prefer":
            return self._preference(batch, hidden, seen)
        loss = self.cfg.loss
        learned = mimicked = batch["targets"] != IGNORED
        if self.cfg.parity.unshifted_mask and seen is not None:
            mimicked = torch.cat([torch.zeros_like(learned[:, :1]), learned[:, :-1]], dim=1)
        teacher: Teacher | None = stored_teacher(batch)
        if seen is not None and self.teacher is not None:
            head = self.teacher.module.head
            teacher = TeacherStates(seen[mimicked], head.weight, head.bias)
        alone, sampled = teacher is None, "sampled" in batch
        objective = TokenObjective(
            divergence=loss.divergence, temperature=loss.temperature, vocabulary=loss.vocabulary, chunk=loss.chunk,
            skew=loss.skew, beta=loss.jsd_beta, taid=share, weight=0.0 if alone else loss.kd, ce_weight=1.0 if alone else 0.0 if sampled else loss.ce,
        )  # fmt: skip
        found = self._token_loss(batch["targets"][learned], hidden, learned, mimicked, teacher, objective)
        rows = found.num_rows.clamp_min(1)
        labels = found.num_labels.clamp_min(1)
        metrics = {"next_token": found.ce / labels}
        if not alone:
            metrics |= {
                "kl": found.divergence / rows,
                "soft_ce": (found.divergence + found.entropy) / rows,
                "agreement": found.agreement / rows,
            }
        if self.taid is not None:
            self.taid.add(found.divergence + found.entropy, found.num_rows)
            metrics["taid"] = rows.new_tensor(share)
        if sampled:  # next to those of the data's answers, not mixed with them
            metrics = {f"sampled/{name}": value for name, value in metrics.items()}
            metrics["sampled/tokens"] = rows / len(batch["input_ids"])
        name = "next_token" if alone else "mimic"
        return {name: found.total / rows}, {name: 1.0}, metrics

    def _token_loss(
        self, labels: Tensor, hidden: Tensor, learned: Tensor, mimicked: Tensor, teacher: Teacher | None, o: TokenObjective
    ) -> TokenLoss:  # fmt: skip
        """In one walk, or in two where the divergence is not at the positions of the cross entropy."""
        head = self.core.head

        def walk(
            rows: Tensor, teacher: Teacher | None, o: TokenObjective, labels: Tensor | None = None
        ) -> TokenLoss:
            return token_loss(hidden[rows], head.weight, teacher, o, labels=labels, bias=head.bias)

        if mimicked is learned:
            return walk(learned, teacher, o, labels)
        found = walk(mimicked, teacher, replace(o, ce_weight=0.0))
        said = walk(learned, None, replace(o, weight=0.0), labels)
        return found._replace(total=found.total + said.total, ce=said.ce, num_labels=said.num_labels)

    def _preference(self, batch: Batch, hidden: Tensor, seen: Tensor | None) -> Losses:
        """The first half of the rows is preferred, the second rejected."""
        own = self._answers(self.core, hidden, batch)
        if seen is not None and self.teacher is not None:
            with torch.no_grad():
                reference = self._answers(self.teacher.module, seen, batch).sums
        else:
            reference = batch["teacher_sums"].to(own.sums.dtype)
        loss, half = self.cfg.loss, len(reference) // 2
        policy = AnswerLogProbs(*(x[:half] for x in own)), AnswerLogProbs(*(x[half:] for x in own))
        found = preference_loss(
            loss.preferences(), policy, (reference[:half], reference[half:]), beta=loss.beta,
            label_smoothing=loss.label_smoothing, by_length=loss.by_length,
        )  # fmt: skip
        chosen, rejected = found.chosen_rewards, found.rejected_rewards
        metrics = {
            "reward_chosen": chosen.mean(),
            "reward_rejected": rejected.mean(),
            "reward_margin": (chosen - rejected).mean(),
            "preferred": (chosen > rejected).float().mean(),
            "saturated": (torch.cat([chosen, rejected]).abs() > 5).float().mean(),
            "logps/chosen": policy[0].sums.detach().mean(),
            "logps/rejected": policy[1].sums.detach().mean(),
        }
        if len(found.terms) > 1:
            metrics |= {f"preference/{kind}": term.mean() for kind, term in found.terms.items()}
        return {"preference": found.loss.mean()}, {"preference": 1.0}, metrics

    def _answers(self, model: Mllm, hidden: Tensor, batch: Batch) -> AnswerLogProbs:
        """Log-probability of each row's learned tokens, and how many there are."""
        head, chunk = model.head, self.cfg.loss.chunk
        return answer_log_probs(hidden, head.weight, batch["targets"], bias=head.bias, chunk=chunk)

    def _words(self, batch: Batch) -> StepOutput:
        def losses(embeds: Tensor) -> dict[str, Tensor]:
            table: Tensor = self.core.decoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
            words = said(batch["targets"], len(table))
            named, length = words_loss(embeds, batch["input_ids"] == IMAGE_ID, words, table)
            return {"words": named, "length": length}

        return combine(self.student(batch, then=losses, decode=False), {"words": 1.0, "length": 1.0})

    def weight(self, batch: Batch) -> float:
        """Tokens that are learned, or pairs, or chats."""
        if self.cfg.stage in ("prefer", "words"):
            return len(batch["keys"])
        return float((batch["targets"] != IGNORED).sum())

    def state(self) -> dict[str, Any]:
        return {} if self.taid is None else {"taid": self.taid.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.taid is not None:
            self.taid.load_state(state["taid"])

    def tags(self) -> dict[str, str | int | float]:
        """Stage and sparse layers."""
        return {"stage": self.cfg.stage, "moe": self.cfg.moe.mode}
