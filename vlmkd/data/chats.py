"""Conversations about images: records, chat templates, and the pipeline that makes batches of tokens of them.

R rows, T tokens, I images of a batch. A record is LLaVA's: `id`, `conversations` (turns with `from` human or gpt, and `value`),
and `image`, a path or several, one for each `<image>` in the text; a preference record has `chosen` and `rejected`,
conversations that differ in their last answer, in place of `conversations`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmkd.chat_ids import IGNORED, IMAGE_ID
from vlmkd.data.chat_outputs import ChatOutputs, ChatOutputsInfo, Features, chat_bytes, chat_key
from vlmkd.data.samples import BadSample, RawSample, checked_size
from vlmkd.data.transforms import eval_transform
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_json, read_text
from vlmkd.image_spec import ImageSpec

log = logging.getLogger(__name__)

IMAGE = "<image>"
ATTRIBUTIONS = "attributions.json"
"""JSON list beside a file of chats: whose pictures they are, as a page must say."""
MOST_IMAGES = 16
REASONS = ("bad_record", "image_count", "nothing_to_learn", "too_long")
"""Why a chat may be dropped, beside the reasons of images."""
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """How a conversation is written; tokens come piece by piece, so that what is learned is known, never searched for."""

    system: str
    turn: str
    """Around a question `{}`, up to where the answer begins."""
    answer: str = "{}"
    """Around an answer; learned."""
    end: str = ""
    """Token behind an answer, learned too; empty: the tokenizer's end-of-sequence token."""
    after: str = ""
    """Behind that, not learned."""


TEMPLATES = {
    # LLaVA v1 on decoders without a BOS token: Qwen in LLaVA-MoD, Phi-2 in MaTVLM.
    "llava": Template(f"{_SYSTEM} ", "USER: {} ASSISTANT:", " {}"),
    "chatml": Template(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
    ),
    "plain": Template("", "{}", "{}\n"),
}


@dataclass(frozen=True)
class ChatItem:
    """A record as an item of a stream."""

    key: str
    record: dict[str, Any]
    folder: str
    """Where its images lie."""

    def content(self) -> bytes:
        """The record as JSON."""
        return json.dumps(self.record).encode()

    def pictures(self) -> list[Path]:
        """Files of its images."""
        image = self.record.get("image") or []
        return [Path(self.folder, name) for name in ([image] if isinstance(image, str) else image)]

    def members(self) -> dict[str, bytes]:
        """The record, and its images as `0`, `1`, ..."""
        files = {"json": self.content()}
        for number, path in enumerate(self.pictures()):
            try:
                files[f"{number}.png"] = path.read_bytes()
            except OSError as error:
                raise UserError(
                    f"image {path} of chat {self.key} cannot be read ({error.strerror}); mend the record or data.images"
                ) from None
        return files


def read_chats(path: str, images: str) -> list[ChatItem]:
    """The records of a LLaVA JSON (or JSONL) file."""
    content = _lines(path) if path.endswith(".jsonl") else read_json(path, "chats")
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise UserError(f"chats {path} must be a list of records with `conversations`; correct the file")
    return [ChatItem(str(record.get("id", number)), record, images) for number, record in enumerate(content)]


def _lines(path: str) -> list[Any]:
    """A record a line."""
    found = []
    # A text in JSON may hold other ends of lines.
    for number, line in enumerate(read_text(path, "chats").split("\n"), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"chats {path}: line {number} is no JSON ({one_line(error)}); correct it"
            ) from None
    return found


def turns_of(conversation: Any) -> list[tuple[str, str]]:
    """(question, answer) of each turn; an answer that comes before any question is dropped.

    Raises:
        BadSample: turns that do not alternate, or hold something else than texts.
    """
    try:
        said = [(str(turn["from"]), str(turn["value"])) for turn in conversation]
    except (TypeError, KeyError):
        raise BadSample("bad_record", "has no list of turns with `from` and `value`") from None
    if said and said[0][0] == "gpt":
        said = said[1:]
    for number, (who, _) in enumerate(said):
        expected = ("human", "gpt")[number % 2]
        if who != expected:
            raise BadSample("bad_record", f"turn {number} is from {who!r} where {expected} must speak")
    if len(said) < 2 or len(said) % 2:
        raise BadSample("nothing_to_learn", "ends without an answer")
    return [(said[index][1], said[index + 1][1]) for index in range(0, len(said), 2)]


def parts_of(members: Mapping[str, bytes]) -> tuple[list[list[tuple[str, str]]], list[bytes]]:
    """The turns of a chat's conversation, or of its preferred and its rejected one, and its image files.

    Raises:
        BadSample: no record, turns that `turns_of` refuses, or another number of images than the turns name.
    """
    try:
        record = json.loads(members.get("json", b"null"))
    except ValueError as error:
        raise BadSample("bad_record", str(error)) from None
    if not isinstance(record, dict):
        raise BadSample("bad_record", "has no record in json")
    names = ("chosen", "rejected") if "chosen" in record else ("conversations",)
    talks = [turns_of(record.get(name)) for name in names]
    images = [data for name, data in members.items() if name.rpartition(".")[2] in _PICTURES]
    for turns in talks:
        asked = sum(text.count(IMAGE) for turn in turns for text in turn)
        if asked != len(images) or asked > MOST_IMAGES:
            raise BadSample("image_count", f"has {asked} {IMAGE} and {len(images)} images")
    return talks, images


class ChatTokens:
    """Token ids of conversations by one tokenizer and template."""

    def __init__(self, tokenizer: Any, template: str, image_tokens: int) -> None:
        """`tokenizer` of transformers; `image_tokens` features stand for each image."""
        if template not in TEMPLATES:
            raise UserError(
                f"config field data.template is {template!r}; choose one of {', '.join(TEMPLATES)}"
            )
        self.tokenizer, self.template, self.image_tokens = tokenizer, TEMPLATES[template], image_tokens
        self.template_name = template
        end = self.template.end or tokenizer.eos_token
        if end not in tokenizer.get_vocab():
            told = (
                f"ends answers with {end}, which the tokenizer does not have"
                if end
                else "needs a tokenizer with an end"
            )
            raise UserError(f"config field data.template: {template} {told}; choose another")
        self.end: int = tokenizer.convert_tokens_to_ids(end)
        """Id behind every answer."""

    def prompt(self, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
        """Ids up to where the answer to `question` begins, after `turns`."""
        ids, _ = self.encode(turns)
        return ids + self._asked(question, first=not turns)

    def encode(self, turns: Iterable[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them are learned: answers with their ends."""
        shape = self.template
        pieces: list[tuple[list[int], bool]] = []
        for question, answer in turns:
            pieces += [
                (self._asked(question, first=not pieces), False),
                ([*self._ids(shape.answer.format(answer)), self.end], True),
                (self._ids(shape.after), False),
            ]
        ids = [token for piece, _ in pieces for token in piece]
        return ids, [counts for piece, counts in pieces for _ in piece]

    def _asked(self, question: str, *, first: bool) -> list[int]:
        """A question's turn. The first goes with the system's text: in a whole text a space is one token with what follows."""
        turn = self.template.turn.format(question)
        return self._ids(self.template.system + turn if first else turn)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(text.split(IMAGE)):
            ids += [IMAGE_ID] * (self.image_tokens if number else 0)
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def shown(self, ids: Sequence[int], targets: Sequence[int]) -> str:
        """A row as text, images as [image], what is learned in << >>: target t is what position t predicts."""
        text, learned = "", [False, *(target != IGNORED for target in targets[:-1])]
        of_kind = groupby(zip(ids, learned, strict=True), lambda pair: (pair[0] == IMAGE_ID, pair[1]))
        for (is_image, counts), run in of_kind:
            piece = "[image]" if is_image else self.tokenizer.decode([token for token, _ in run])
            text += f"<<{piece}>>" if counts else piece
        return text


@dataclass(slots=True)
class Chat:
    """A chat, or a pair of preferred and rejected ones about the same images, ready to be collated."""

    name: str
    rows: list[tuple[list[int], list[int]]]
    """Ids and targets of each conversation."""
    images: list[Tensor]
    """float32 [3,h,w], or [F,C] where features are stored."""
    cut: int = 0
    """Rows that were longer than the limit."""
    said: dict[str, Tensor] = field(default_factory=dict)
    """What a stored teacher said of it: see `vlmkd.data.chat_outputs`."""


class ChatPipeline:
    """Chats with images and without; rows are padded on the right, or packed."""

    def __init__(
        self,
        tokens: ChatTokens,
        image_spec: ImageSpec,
        *,
        max_length: int = 2048,
        pack: bool = False,
        max_pixels: int = 89_478_485,
        stored: ChatOutputs | None = None,
        features: Features | None = None,
    ) -> None:
        """A longer conversation loses its end; one that would lose an image or all that is learned is dropped.

        `pack`: several chats share a row of at most `max_length` tokens; see `Batch` in `collate`. `stored`: a teacher that
        does not run; `features`: what a tower that does not run gives for the pictures.
        """
        self.tokens, self._spec, self._length, self._pack = tokens, image_spec, max_length, pack
        self._max_pixels, self._transform = max_pixels, eval_transform(image_spec)
        self.stored, self._features = stored, features

    def process(self, raw: RawSample) -> Chat:
        """A chat's ids, targets and images."""
        if raw.reason:
            raise BadSample(raw.reason, raw.detail)
        talks, images = parts_of(raw.members)
        try:
            rows = [self._row(turns) for turns in talks]
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample("bad_record", str(error)) from None
        cut = sum(was_cut for _, _, was_cut in rows)
        pictures = [self._picture(data) for data in images]
        chat = Chat(raw.name, [(ids, targets) for ids, targets, _ in rows], pictures, cut)
        if self.stored is not None:
            digest = hashlib.sha256(chat_bytes(chat.rows, images)).digest()
            entry = self.stored.get(chat_key(raw), raw.shard, digest, f"chat {raw.name}")
            if entry is None:
                raise BadSample("missing_teacher_embedding", f"is not in {self.stored.folder}")
            chat.said = entry.columns
        return chat

    def _row(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int], bool]:
        ids, learned = self.tokens.encode(turns)
        cut = len(ids) > self._length
        if IMAGE_ID in ids[self._length :]:
            raise BadSample("too_long", f"has an image beyond the first {self._length} tokens")
        ids, learned = ids[: self._length], learned[: self._length]
        targets = [
            token if counts and token != IMAGE_ID else IGNORED
            for token, counts in zip(ids[1:], learned[1:], strict=True)
        ]
        if all(target == IGNORED for target in targets):
            where = f"within the first {self._length} tokens" if cut else "in its answers"
            raise BadSample("too_long" if cut else "nothing_to_learn", f"has nothing to learn {where}")
        return ids, [*targets, IGNORED], cut

    def _picture(self, data: bytes) -> Tensor:
        if self._features is None:
            return decoded(data, self._transform, self._max_pixels)
        found = self._features.of(data)
        if found is None:
            raise BadSample("missing_features", f"has a picture that is not in {self._features.folder}")
        return found

    def collate(self, samples: list[Chat]) -> dict[str, Any]:
        """`input_ids`, `targets` int64 [R,T]; `segments` int64 [R,T]: 1, 2, ... for the chats of a row, 0 for padding.

        `images` float32 [I,3,h,w], or [I,F,C] where features are stored, and `image_rows` int64: which of them stands at
        each place of an image, in the order of the places. Rows of pairs: all that are preferred, then all that are rejected.
        Of a stored teacher `teacher_log_probs`, `teacher_ids` [P,k], `teacher_log_tail` [P] at the P targets in their order,
        or of pairs `teacher_sums` [R].
        """
        if len({len(sample.rows) for sample in samples}) > 1:
            raise UserError("data: preference records and plain ones do not go into one run; split the file")
        ends = list(accumulate(len(sample.images) for sample in samples))
        image_rows = [range(end - len(one.images), end) for one, end in zip(samples, ends, strict=True)]
        image_rows *= len(samples[0].rows)
        rows = [sample.rows[number] for number in range(len(samples[0].rows)) for sample in samples]
        lengths = [len(ids) for ids, _ in rows]
        pairs = len(samples[0].rows) > 1  # stay apart, so that each is found by its row
        bins = _packed(lengths, self._length) if self._pack and not pairs else [[n] for n in range(len(rows))]
        order = list(chain.from_iterable(bins))
        places = [[place for place, n in enumerate(own, 1) for _ in rows[n][0]] for own in bins]
        ids, targets = (
            [list(chain.from_iterable(rows[n][part] for n in own)) for own in bins] for part in (0, 1)
        )
        pad = self.tokens.tokenizer.pad_token_id or 0
        columns = {"input_ids": (ids, pad), "targets": (targets, IGNORED), "segments": (places, 0)}
        images = [image for sample in samples for image in sample.images]
        return {
            "keys": [sample.name for sample in samples],
            **{
                name: pad_sequence([torch.tensor(row) for row in values], True, filler)
                for name, (values, filler) in columns.items()
            },
            "images": torch.stack(images) if images else torch.zeros(0, *self._shape()),
            "image_rows": torch.tensor([index for n in order for index in image_rows[n]], dtype=torch.int64),
            "cut": torch.tensor(float(sum(sample.cut for sample in samples))),
            **_said([sample.said for sample in samples], order),
        }

    def _shape(self) -> tuple[int, ...]:
        info = self._features and self._features.info
        return (info.places, info.width) if info else (3, *self._spec.size)

    def check(self, batch: dict[str, Any], size: int) -> None:
        """See `Pipeline`; shows the first row with what is learned marked."""
        ids, learned = batch["input_ids"], batch["targets"] != IGNORED
        places = int((ids == IMAGE_ID).sum())
        assert places == len(batch["image_rows"]) * self.tokens.image_tokens, (
            "an image lost some of its places"
        )
        for name, count in (("teacher_ids", int(learned.sum())), ("teacher_sums", len(learned))):
            assert len(batch.get(name, range(count))) == count, "other rows"
        assert len(batch["keys"]) == size and ids.shape == batch["targets"].shape == batch["segments"].shape
        length = int((batch["segments"][0] > 0).sum())
        row = self.tokens.shown(ids[0, :length].tolist(), batch["targets"][0, :length].tolist())
        log.info("the first row, what is learned in << >>:\n%s", row)

    def outputs_info(self, **teachers: Any) -> ChatOutputsInfo:
        """What is said of stored outputs for these tokens; `teachers`: the fields that they do not settle."""
        vocabulary = json.dumps(sorted(self.tokens.tokenizer.get_vocab().items())).encode()
        return ChatOutputsInfo(
            image_spec=self._spec, template=self.tokens.template_name, image_tokens=self.tokens.image_tokens,
            tokenizer=hashlib.sha256(vocabulary).hexdigest(), max_length=self._length, **teachers,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """See `Pipeline`."""
        facts = {
            "max_length": self._length,
            "pack": self._pack,
            "image_tokens": self.tokens.image_tokens,
            "features": str(self._features.folder) if self._features else None,
        }
        if self.stored is None:
            return {**facts, "teacher_outputs": None}
        info = self.stored.info
        told = {"folder": str(self.stored.folder), "teacher": info.source, "digest": info.digest, "k": info.k}
        return {**facts, "teacher_outputs": told}


_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


def decoded(picture: bytes, transform: Callable[[Image.Image], Tensor], max_pixels: int) -> Tensor:
    """What `transform` makes of an image file.

    Raises:
        BadSample: it has more than `max_pixels`, or cannot be decoded.
    """
    checked_size(picture, max_pixels)
    try:
        return transform(Image.open(io.BytesIO(picture)))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample("undecodable_image", f"{type(error).__name__}: {error}") from None


def _said(said: Sequence[dict[str, Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
    """Columns of a batch, from those of its chats; `order` is that of their rows, where a chat has one."""
    if not said[0]:
        return {}
    if "sums" in said[0]:
        return {"teacher_sums": torch.stack([one["sums"] for one in said]).T.flatten()}
    return {f"teacher_{name}": torch.cat([said[n][name] for n in order]) for name in said[0]}


def _packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """First fit: the members of each row, every row at most `room` long."""
    bins: list[list[int]] = []
    free: list[int] = []
    for number, length in enumerate(lengths):
        place = next((n for n, left in enumerate(free) if length <= left), len(bins))
        if place == len(bins):
            bins.append([])
            free.append(room)
        bins[place].append(number)
        free[place] -= length
    return bins
