"""What a teacher said of chats, stored by data_tools/embed_chats.py: a store as in `teacher_outputs`, with other columns.

R positions that are learned (those that predict a token of an answer), of all chats of a part one behind the other:

    log_probs [R,k], ids int32 [R,k]   its likeliest next tokens at the temperature of cache.json
    log_tail [R]                       the logarithm of the mass of all others
    counts int64 [N]                   how many of the R each chat has

or, of N preference pairs, `sums` [N,2]: log-probabilities of the whole answers, the preferred one first.

A chat of a file is stored under the sha256 of its record, one of a shard under its key. The digest beside it is that of the
tokens, of what is learned, and of the image files, so that another template, tokenizer, length or image is noticed.

And what a frozen vision tower gives for pictures, stored by data_tools/embed_pictures.py: `features` [N,F,C] of N pictures,
F places of width C, under the sha256 of the image file.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmkd.data.samples import RawSample
from vlmkd.data.teacher_outputs import Store, StoreInfo


@dataclass(frozen=True, kw_only=True)
class ChatOutputsInfo(StoreInfo):
    """What `cache.json` says about a folder."""

    unit: ClassVar[str] = "chats"
    content: ClassVar[str] = "other tokens or images"
    tools: ClassVar[str] = "data_tools/embed_chats.py"
    pairs: bool
    """Preference pairs, not conversations."""
    template: str
    """As data.template."""
    tokenizer: str
    """sha256 over the vocabulary."""
    image_tokens: int
    """Places of an image."""
    max_length: int
    """As data.max_length."""
    temperature: float = 1.0
    """Of the softmax."""
    vocabulary: int = 0
    """First entries of the output embedding that the softmax is over; of pairs all, written 0."""
    k: int = 0
    """Entries of a position that are stored."""
    precision: str = "fp32"
    """Of the teacher's weights."""


_FIELDS = {
    "pairs": "the stage takes preference pairs",
    "template": "data.template",
    "tokenizer": "the tokenizer's vocabulary",
    "image_tokens": "the places of an image",
    "image_spec": "the student's input",
    "max_length": "data.max_length",
    "temperature": "loss.temperature",
    "vocabulary": "the vocabulary of the loss (loss.vocabulary, or the student's)",
    "digest": "the teacher",
}
"""What a run and its stored teacher have to have alike, as a user knows it."""


class ChatOutputs(Store):
    """Reader of a folder."""

    kind = ChatOutputsInfo

    def check(
        self, wanted: ChatOutputsInfo, *, shards: Sequence[str], keys: Sequence[str], max_missing_share: float
    ) -> None:
        """As `TeacherOutputs.check`, for what the run's folder would say; an empty digest is of any teacher."""
        fits = bool(self.info.set_name) == bool(keys)
        differences = [] if fits else ["it is of files" if shards else "it is of shards"]
        for name, told in _FIELDS.items():
            ours, theirs = getattr(wanted, name), getattr(self.info, name)
            if ours != theirs and (name != "digest" or ours):
                differences.append(f"{told}: {_short(ours)}, in the outputs {_short(theirs)}")
        self.refuse(differences, shards, keys, max_missing_share)


@dataclass(frozen=True, kw_only=True)
class FeaturesInfo(StoreInfo):
    """What `cache.json` says about a folder of features; its `digest` is of the tower, as `tower_digest` has it."""

    unit: ClassVar[str] = "pictures"
    content: ClassVar[str] = "another picture"
    tools: ClassVar[str] = "data_tools/embed_pictures.py"
    places: int
    """F."""
    width: int
    """C."""


class Features(Store):
    """Reader of a folder."""

    kind = FeaturesInfo

    def of(self, picture: bytes) -> Tensor | None:
        """float32 [F,C] of an image file, or None."""
        entry = self.get(picture_key(picture))
        return None if entry is None else entry.columns["features"].float()


def picture_key(picture: bytes) -> str:
    """The name that an image file is stored by."""
    return hashlib.sha256(picture).hexdigest()


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else f"{value}"


def chat_key(raw: RawSample) -> str:
    """The name that a chat is stored by: its own where it is of a shard, else that of its record's content."""
    return raw.key if raw.shard else record_key(raw.members.get("json", b""))


def record_key(record: bytes) -> str:
    """The name of a record, as JSON."""
    return hashlib.sha256(record).hexdigest()


def chat_bytes(rows: Sequence[tuple[list[int], list[int]]], images: Sequence[bytes]) -> bytes:
    """What the digest of a chat is over."""
    parts = [array("q", [len(ids), *ids, *targets]).tobytes() for ids, targets in rows]
    return b"".join(parts + [hashlib.sha256(image).digest() for image in images])
