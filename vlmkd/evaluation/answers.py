"""Answers of a multimodal model to questions about images: how it is asked, and how what it says is scored.

A question is a record as in `vlmkd.data.chats` whose last turn is the true answer. `kind` says how it is scored: `exists`
by POPE's rule, `caption` by CHAIR against the record's `things`, everything else by equal words.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import eq
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from vlmkd import distributed
from vlmkd.data.chat_outputs import Features
from vlmkd.data.chats import IMAGE, ChatItem, ChatTokens, turns_of
from vlmkd.data.samples import BadSample
from vlmkd.data.transforms import eval_transform
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result, progress, spread
from vlmkd.evaluation.images import UNREADABLE
from vlmkd.files import one_line
from vlmkd.image_spec import ImageSpec
from vlmkd.models.mllm import Mllm
from vlmkd.models.towers import evaluating
from vlmkd.results import Meaning, share

SHOWN = 24
"""Questions of a set whose pictures are kept for the report."""


class ChatModel:
    def __init__(
        self,
        name: str,
        model: Mllm,
        tokens: ChatTokens,
        image_spec: ImageSpec,
        features: Features | None = None,
    ) -> None:
        """`features`: what the tower gives for pictures, where that is stored."""
        self.name, self.model, self.tokens, self.image_spec = name, model, tokens, image_spec
        self._features = features
        self._transform = eval_transform(image_spec)

    @torch.no_grad()
    def answer(
        self,
        asked: Sequence[tuple[Sequence[bytes], Sequence[tuple[str, str]], str]],
        *,
        most_tokens: int,
        temperature: float = 0.0,
        **options: Any,
    ) -> list[str]:
        """Answers to (images, turns before, question), together: rows are padded on the left, each has its own end.

        `temperature` 0 is greedy; a decoder's own settings, such as Qwen's penalty on repetitions, take no part. `options`
        go to `generate` of transformers, e.g. a streamer.
        """
        for files, turns, question in asked:
            named = sum(text.count(IMAGE) for text in (question, *itertools.chain.from_iterable(turns)))
            if named != len(files):
                told = f"{named} {IMAGE} for {len(files)} images; write one for each"
                raise UserError(f"{question[:60]!r} and what was said before have {told}")
        rows = [self.tokens.prompt(turns, question) for _, turns, question in asked]
        images = self.pictures_of([data for images, _, _ in asked for data in images])
        options |= {"most_tokens": most_tokens, "temperature": temperature}
        said = self.complete(rows, images, torch.arange(len(images)), **options)
        texts = [self.tokens.tokenizer.decode(row, skip_special_tokens=True) for row in said]
        return [text.replace(IMAGE, "").strip() for text in texts]  # in a next turn it would ask for an image

    @torch.no_grad()
    def complete(
        self,
        rows: Sequence[Sequence[int]],
        images: torch.Tensor,
        image_rows: torch.Tensor,
        *,
        most_tokens: int,
        temperature: float = 0.0,
        **options: Any,
    ) -> list[list[int]]:
        """Ids that follow each row of ids, with the end where it came; images as in a batch of `ChatPipeline`."""
        device = next(self.model.parameters()).device
        pad, end = self.tokens.tokenizer.pad_token_id or 0, self.tokens.end
        ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
        masks = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
        padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
        settings = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        options = settings | (sampled if temperature else {"do_sample": False}) | options
        with evaluating(self.model):
            embeds = self.model.embed(padded, images.to(device), image_rows.to(device))
            said = self.model.decoder.generate(  # type: ignore[operator]
                inputs_embeds=embeds, attention_mask=masks, max_new_tokens=most_tokens, eos_token_id=end,
                pad_token_id=pad, **options,
            )  # fmt: skip
        return [row[: row.index(end) + 1] if end in row else row for row in said.tolist()]

    def pictures_of(self, files: Sequence[bytes]) -> torch.Tensor:
        """[I, 3, h, w], also of no image; features [I, N, C] where those of all are stored."""
        found = [self._features.of(data) for data in files] if self._features else []
        stored = [one for one in found if one is not None]
        if files and len(stored) == len(files):
            return torch.stack(stored)
        try:
            pictures = [self._transform(Image.open(io.BytesIO(data))) for data in files]
        except UNREADABLE as error:
            told = f"the image cannot be read ({one_line(error).partition(' <')[0]}); name another"
            raise UserError(told) from None
        return torch.stack(pictures) if pictures else torch.zeros(0, 3, *self.image_spec.size)


@dataclass(frozen=True)
class Question:
    item: ChatItem
    turns: list[tuple[str, str]]
    text: str
    truth: str

    @classmethod
    def of(cls, item: ChatItem) -> Question:
        """A record as a question.

        Raises:
            UserError: it lacks an answer, or as a caption its things.
        """
        try:
            *before, (text, truth) = turns_of(item.record.get("conversations"))
        except BadSample as error:
            raise UserError(f"question {item.key} {error}; correct the record") from None
        found = cls(item, before, text, truth)
        if found.kind == "caption" and not isinstance(item.record.get("things"), list):
            raise UserError(f"question {item.key} is of kind caption and has no list `things`; add it")
        return found

    @property
    def kind(self) -> str:
        return str(self.item.record.get("kind", "answer"))


class Answers:
    """Asks every question of a file, and scores by kind."""

    name = "answers"

    def __init__(
        self,
        items: Sequence[ChatItem],
        dataset: str,
        *,
        vocabulary: Iterable[str] = (),
        attributions: Sequence[str] = (),
    ) -> None:
        """`vocabulary`: all things that a caption may name; `attributions`: whose pictures they are, for the report."""
        self.dataset, self.attributions, self._vocabulary = dataset, list(attributions), list(vocabulary)
        # Questions of about one length are asked together.
        self.questions = sorted(
            (Question.of(item) for item in items), key=lambda one: (one.kind, len(one.text))
        )

    def run(self, predictor: ChatModel, context: Context) -> list[Result]:
        said = ask(predictor, self.questions, context, self.dataset)
        pairs = [(one, said[one.item.key]) for one in self.questions]
        metrics, meanings = scores(pairs, self._vocabulary)
        details = [
            {"key": one.item.key, "kind": one.kind, "question": one.text, "truth": one.truth, "said": text}
            | ({"before": one.turns} if one.turns else {})
            | verdict(one, text, self._vocabulary)
            for one, text in pairs
        ]
        return [Result(self.name, self.dataset, metrics, len(pairs), {"answers": details}, meanings=meanings)]

    def pictures(self) -> dict[str, list[bytes]]:
        """Key -> images of the questions that the report shows: at most SHOWN, of every kind alike."""
        kinds = [list(own) for _, own in itertools.groupby(self.questions, key=lambda one: one.kind)]
        each = [spread(own, SHOWN // len(kinds) + 1) for own in kinds]
        mixed = [one for row in itertools.zip_longest(*each) for one in row if one is not None]
        return {one.item.key: _images(one.item) for one in mixed[:SHOWN]}


def ask(
    predictor: ChatModel, questions: Sequence[Question], context: Context, title: str, most_tokens: int = 0
) -> dict[str, str]:
    """Key -> answer. Each rank asks its share; all have all answers. `most_tokens` 0: as the kind of question needs."""
    own = [questions[index] for index in distributed.rank_share(len(questions))]
    groups = [own[start : start + context.batch_size] for start in range(0, len(own), context.batch_size)]
    said: dict[str, str] = {}
    for group in progress(groups, len(groups), title, context):
        most = most_tokens or max(64 if one.kind == "caption" else 16 for one in group)
        asked = [(_images(one.item), one.turns, one.text) for one in group]
        keys = [one.item.key for one in group]
        try:
            said |= zip(keys, predictor.answer(asked, most_tokens=most), strict=True)
        except UserError as error:
            raise UserError(f"{title}, question {', '.join(keys)}: {error}") from None
    return {key: text for part in distributed.gather_objects(said) for key, text in part.items()}


def _images(item: ChatItem) -> list[bytes]:
    return [data for name, data in item.members().items() if name != "json"]


def scores(
    pairs: Sequence[tuple[Question, str]], vocabulary: Sequence[str]
) -> tuple[dict[str, float], dict[str, Meaning]]:
    metrics: dict[str, float] = {}
    meanings: dict[str, Meaning] = {}
    kinds: dict[str, list[tuple[Question, str]]] = {
        kind: [] for kind in sorted({one.kind for one, _ in pairs})
    }
    for one, text in pairs:
        kinds[one.kind].append((one, text))
    for kind, own in kinds.items():
        if kind == "exists":
            metrics |= (found := pope([(one.truth, text) for one, text in own]))
            meanings |= {name: share(main=name == "f1") for name in found}
            meanings["yes_ratio"] = Meaning(unit="share")
        elif kind == "caption":
            metrics |= chair([(one.item.record["things"], text) for one, text in own], vocabulary)
            lower = Meaning(unit="share", higher_is_better=False, main=True)
            meanings |= {"chair_i": lower, "chair_s": lower, "cover": share()}
        else:
            metrics[kind] = fmean(plain(one.truth) == plain(text) for one, text in own)
            meanings[kind] = share(main=len(kinds) == 1)
    rest = kinds.keys() - {"exists", "caption"}
    if len(rest) > 1:
        if "exists" in kinds:  # whose accuracy is another
            metrics["exists"], meanings["exists"] = metrics["accuracy"], share()
        metrics["accuracy"] = fmean(metrics[kind] for kind in rest)
        meanings["accuracy"] = share("mean of kinds", main=True)
    return metrics, meanings


def plain(text: str) -> str:
    """Lower-case words without the full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def verdict(question: Question, text: str, vocabulary: Sequence[str]) -> dict[str, Any]:
    """Whether an answer is `right`; of a caption also `false`, where (begin, end) it names what is not there, and `missing`."""
    if question.kind == "exists":
        return {"right": plain(question.truth).startswith("yes") == says_yes(text)}
    if question.kind != "caption":
        return {"right": plain(question.truth) == plain(text)}
    things, found = question.item.record["things"], mentions(text, vocabulary)
    false = [(begin, end) for begin, end, name in found if name not in things]
    missing = sorted({*things} - {name for _, _, name in found})
    return {"right": not false and not missing, "false": false, "missing": missing}


def says_yes(text: str) -> bool:
    """POPE's rule: of the text before the first full stop, without commas, "no" if it has the word No, no or not, else "yes"."""
    return not {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split())


def pope(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 of "yes", and share of "yes" among the answers, of (truth, answer)."""
    truths = [plain(truth).startswith("yes") for truth, _ in pairs]
    said = [says_yes(text) for _, text in pairs]
    both = sum(map(min, truths, said))
    precision, recall = both / max(1, sum(said)), both / max(1, sum(truths))
    return {
        "accuracy": sum(map(eq, truths, said)) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "yes_ratio": sum(said) / len(pairs),
    }


def chair(pairs: Sequence[tuple[Sequence[str], str]], vocabulary: Sequence[str]) -> dict[str, float]:
    """CHAIR of (things that are there, caption).

    `chair_i`: share of mentions of what is not there; `chair_s`: share of captions with one; `cover`: share of the things
    that are named.
    """
    count = wrong = bad = there = named = 0
    for things, text in pairs:
        found = [name for _, _, name in mentions(text, vocabulary)]
        false = [name for name in found if name not in things]
        count, wrong, bad = count + len(found), wrong + len(false), bad + bool(false)
        there, named = there + len(things), named + len(set(found) & set(things))
    return {
        "chair_i": wrong / max(1, count),
        "chair_s": bad / max(1, len(pairs)),
        "cover": named / max(1, there),
    }


def mentions(text: str, vocabulary: Sequence[str]) -> list[tuple[int, int, str]]:
    """(begin, end, name) of what a text names: the longest name of `vocabulary` at its place, plurals too."""
    names, pattern = _names(tuple(vocabulary))
    lower = "".join(letter.lower()[:1] for letter in text)  # as long as the text
    spans = [(match.start(), match.end(), match.group()) for match in pattern.finditer(lower)]
    return [(begin, end, names.get(said) or names[said.removesuffix("s")]) for begin, end, said in spans]


@functools.lru_cache(maxsize=8)
def _names(vocabulary: tuple[str, ...]) -> tuple[dict[str, str], re.Pattern[str]]:
    names = {name.lower(): name for name in vocabulary}
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return names, re.compile(rf"\b(?:{either})s?\b" if names else r"(?!)")
