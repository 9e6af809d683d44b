"""On-policy distillation (GKD, Agarwal et al. 2024): the student answers, the teacher corrects its tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from vlmkd.chat_ids import IGNORED
from vlmkd.evaluation.answers import ChatModel
from vlmkd.train.task import Batch


def is_on_policy(seed: int, step: int, share: float) -> bool:
    """Whether the answers of optimiser step `step` are sampled: by seed and step alone, so the same on every rank."""
    return random.Random(f"{seed} on_policy {step}").random() < share


def own_answers(
    model: ChatModel, batch: Batch, vocabulary: int, *, most_tokens: int, temperature: float
) -> Batch:
    """The chats of `batch`, a row each, whose last answers are now `model`'s, and alone learned.

    Samples of the whole distribution over the first `vocabulary` entries, each up to its end or `most_tokens`, by
    torch's random state (docs/papers/llava_mod.md, eq. 7).
    """
    prompts = []
    for ids, targets, segments in zip(batch["input_ids"], batch["targets"], batch["segments"], strict=True):
        for number in range(1, int(segments.max()) + 1):
            here = segments == number
            prompts.append(_last_prompt(ids[here].tolist(), targets[here].tolist()))
    beyond = list(range(vocabulary, len(model.model.head.weight)))  # the teacher has no such tokens
    said = model.complete(
        prompts, batch["images"], batch["image_rows"], most_tokens=most_tokens, temperature=temperature,
        suppress_tokens=beyond or None,
    )  # fmt: skip
    rows = list(zip(prompts, said, strict=True))
    columns = {
        "input_ids": ([prompt + answer for prompt, answer in rows], model.tokens.tokenizer.pad_token_id or 0),
        "targets": ([[IGNORED] * (len(prompt) - 1) + answer + [IGNORED] for prompt, answer in rows], IGNORED),
        "segments": ([[1] * len(prompt + answer) for prompt, answer in rows], 0),
    }
    made = {
        name: pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=filler)
        for name, (values, filler) in columns.items()
    }
    return {**batch, **made, "sampled": True}


def _last_prompt(ids: Sequence[int], targets: Sequence[int]) -> list[int]:
    """The ids before a chat's last answer: target t is what position t predicts."""
    place = max(place for place, target in enumerate(targets) if target != IGNORED)
    while place and targets[place - 1] != IGNORED:
        place -= 1
    return list(ids[: place + 1])
