"""`LabelledLoader`: endless batches of labelled images, the same for any number of ranks and loader processes.

A loader has one or more named streams (labelled and unlabelled images, or one per domain), each with its share of
every global batch. Position p of a stream is its item number p since the start of the run; which item that is and
which view of it is shown are pure functions of (seed, stream name, p). So global batch number b is the same
whatever came before it, who loads it and how many ranks share it, and a run resumes from the batch number alone.

A bad image gives its place to the next position's item, which is then shown twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmkd.allocator import start_loader_process
from vlmkd.config import LabelledDataConfig, require
from vlmkd.data.batch import ImageLabel, check_image_label_batch
from vlmkd.data.decode import BadImageError
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import UNLABELLED, Item
from vlmkd.data.pipeline import serves, stack_units
from vlmkd.data.samples import BadSample, checked_size, views_of
from vlmkd.data.teacher_outputs import TeacherOutputs, read_item, view_rng
from vlmkd.data.transforms import View, ViewConfig, normalise
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

log = logging.getLogger(__name__)

_MIN_READ = 1000  # images before max_bad_share is applied to a set that is larger
_LOG_EVERY = 100  # bad images of one reason per log line, after the first
_NAMES_KEPT = 5
_ORDERS_KEPT = 2  # passes of a stream that one batch may span without ordering anew


@dataclass(frozen=True)
class Stream:
    """Images of one kind, and how many of them are in every global batch."""

    items: Sequence[Item]
    batch: int
    """Images of every global batch, over all ranks and accumulation steps."""
    sampling: Literal["shuffle", "replacement"] = "shuffle"
    """`shuffle`: every item once a pass, each pass in an order of its own, batches running over the border; or
    `replacement`: each draw uniform over all items."""


@dataclass(frozen=True)
class _Settings:
    """What a loader process needs beside the streams."""

    views: ViewConfig
    view_count: int
    seed: int
    spec: ImageSpec
    teacher_specs: tuple[ImageSpec, ...]
    stored: TeacherOutputs | None
    max_pixels: int


@dataclass(slots=True)
class _Row:
    """One image of a batch."""

    item: Item
    stream: int
    pixels: Tensor
    """uint8 [h,w,3] at the student's input size."""
    teacher_pixels: list[Tensor]
    """uint8 [h',w',3] per teacher that the student's pixels do not serve."""
    embed: Tensor | None = None
    """[D] from the stored outputs."""


class _Delivery(TypedDict):
    """A batch of one rank, or the error that ends the run; and what was read on the way."""

    batch: ImageLabel | None
    read: int
    bad: list[BadSample]
    error: str


class Draws:
    """Which item, and which view of it, each position of one stream is."""

    def __init__(self, name: str, stream: Stream, seed: int, view_count: int) -> None:
        self._salt, self._stream, self._view_count = f"{seed}/{name}", stream, view_count
        self._orders: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Index of the item, and number of its view: of the pass, or drawn too when sampling with replacement."""
        number = len(self._stream.items)
        if self._stream.sampling == "replacement":
            rng = random.Random(f"{self._salt}/draw/{position}")
            index = rng.randrange(number)
            return index, rng.randrange(self._view_count) if self._view_count else position
        turn, place = divmod(position, number)
        return self._order(turn)[place], turn % self._view_count if self._view_count else turn

    def _order(self, turn: int) -> list[int]:
        if turn not in self._orders:
            order = list(range(len(self._stream.items)))
            random.Random(f"{self._salt}/order/{turn}").shuffle(order)
            while len(self._orders) >= _ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[turn] = order
        return self._orders[turn]


class _Batches(Dataset[_Delivery]):
    """Delivery number n of one rank."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        settings: _Settings,
        rank: int,
        world_size: int,
        accumulation: int,
        encoded: Mapping[ImageRef, bytes],
    ) -> None:
        self._streams, self._settings = list(streams.items()), settings
        self._rank, self._world_size, self._accumulation = rank, world_size, accumulation
        self._encoded = encoded
        self._draws = [
            Draws(name, stream, settings.seed, settings.view_count) for name, stream in self._streams
        ]
        self._own = [spec for spec in settings.teacher_specs if not serves(settings.spec, spec)]

    def __getitem__(self, number: int) -> _Delivery:
        delivery = _Delivery(batch=None, read=0, bad=[], error="")
        try:
            delivery["batch"] = self._collate(self._rows(number, delivery))
        except UserError as error:
            delivery["error"] = str(error)
        return delivery

    def _rows(self, number: int, delivery: _Delivery) -> list[_Row]:
        step, part = divmod(number, self._accumulation)
        shares = self._world_size * self._accumulation
        rows = []
        for stream_id, (_, stream) in enumerate(self._streams):
            share = stream.batch // shares
            start = step * stream.batch + (part * self._world_size + self._rank) * share
            rows += [self._row(stream_id, start + offset, delivery) for offset in range(share)]
        return rows

    def _row(self, stream_id: int, position: int, delivery: _Delivery) -> _Row:
        name, stream = self._streams[stream_id]
        failed: list[BadSample] = []
        for candidate in range(position, position + min(len(stream.items), _MIN_READ)):
            index, view_number = self._draws[stream_id][candidate]
            row = self._load(stream.items[index], view_number)
            delivery["read"] += 1
            if isinstance(row, _Row):
                row.stream = stream_id
                return row
            failed.append(row)
            delivery["bad"].append(row)
        reasons = _count_text(Counter(bad.reason for bad in failed))
        raise UserError(
            f"stream {name}: {len(failed)} images in a row were bad ({reasons}); last: {failed[-1].name} "
            f"{failed[-1].detail}; mend the data set"
        )

    def _load(self, item: Item, view_number: int) -> _Row | BadSample:
        settings = self._settings
        image = self._encoded.get(item.image) or read_item(item)
        view: View | None = None
        embed: Tensor | None = None
        if settings.stored is not None:
            entry = settings.stored.get_checked(item.key, image)
            if entry is None:
                return BadSample("missing_teacher_embedding", item.key, f"is not in {settings.stored.folder}")
            stored_view = view_number if settings.stored.replays else 0
            embed = entry.image_embeds[stored_view]
            view = entry.views[stored_view] if settings.stored.replays else None
        try:
            size = checked_size(image, settings.max_pixels)
            if view is None:
                view = settings.views.draw(*size, view_rng(settings.seed, item.key, view_number))
            pixels = views_of(image, size, [view], [settings.spec, *self._own])[0]
        except BadImageError as error:
            return BadSample(error.reason, item.key, str(error))
        return _Row(item, 0, pixels[0], pixels[1:], embed)

    def _collate(self, rows: list[_Row]) -> ImageLabel:
        spec = self._settings.spec
        batch = ImageLabel(
            images=normalise([row.pixels for row in rows], spec),
            labels=torch.tensor([row.item.label for row in rows], dtype=torch.int64),
            domains=torch.tensor([row.item.domain for row in rows], dtype=torch.int64),
            stream_ids=torch.tensor([row.stream for row in rows], dtype=torch.int64),
            keys=[row.item.key for row in rows],
            positions={"worker": self._rank, "raw": 0},
            skipped={},
        )
        if self._settings.teacher_specs:
            own = iter(range(len(self._own)))
            batch["teacher_images"] = [
                None if serves(spec, teacher) else self._teacher_images(rows, next(own), teacher)
                for teacher in self._settings.teacher_specs
            ]
        if self._settings.stored is not None:
            embeds = stack_units([row.embed for row in rows if row.embed is not None])
            batch["teacher_image_embeds"] = [embeds]
            batch["teacher_valid"] = [embeds.any(dim=1)]  # a masked answer is stored as zeros
        return batch

    @staticmethod
    def _teacher_images(rows: list[_Row], index: int, spec: ImageSpec) -> Tensor:
        return normalise([row.teacher_pixels[index] for row in rows], spec)


class _Onwards(Sampler[int]):
    """Delivery numbers from `start` on, without end."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


class LabelledLoader:
    """Endless ImageLabel batches of one rank; see the module's docstring. Implements `vlmkd.data.loader.Loader`.

    Args:
        streams: by name; rows of a batch are the rank's equal share of each, in this order.
        views: distribution of the views; ignored where stored views are replayed.
        view_count: views 0 to `view_count` - 1 of each image, one a pass, then again; 0: a new view each pass, or
            with replayed outputs all the stored ones.
        seed: of order and views, the same on every rank.
        accumulation: batches per rank that make up one global batch.
        teacher_specs: input of each teacher that runs beside the student.
        teacher_embeds: stored outputs of a teacher that does not.
        max_bad_share: share of bad images above which the run stops, after one pass, 1,000 images or at the end.
        keep_encoded_mb: the files are kept in memory when all together have at most this size.

    Raises:
        UserError: an empty stream, a share that the ranks cannot divide, or more views than are stored.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        views: ViewConfig,
        view_count: int = 0,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int = 1,
        image_spec: ImageSpec,
        teacher_specs: Sequence[ImageSpec] = (),
        teacher_embeds: TeacherOutputs | None = None,
        workers: int = 2,
        max_pixels: int = 89_478_485,
        max_bad_share: float = 0.05,
        keep_encoded_mb: int = 512,
    ) -> None:
        _check_streams(streams, world_size, accumulation)
        if teacher_embeds is not None and teacher_embeds.replays:
            held = teacher_embeds.view_count
            require(
                view_count <= held,
                "data.view_count",
                f"is {view_count}, but {teacher_embeds.folder} holds {held} views an image",
            )
            view_count = view_count or held
        self._settings = _Settings(
            views, view_count, seed, image_spec, tuple(teacher_specs), teacher_embeds, max_pixels
        )
        self._streams = dict(streams)
        self._rank, self._world_size, self._accumulation = rank, world_size, accumulation
        self._workers, self._max_bad_share, self._keep_mb = workers, max_bad_share, keep_encoded_mb
        self.batch_size = sum(stream.batch for stream in streams.values()) // (world_size * accumulation)
        self.samples_per_epoch = sum(len(stream.items) for stream in streams.values())
        self._digests = {name: _digest(stream.items) for name, stream in streams.items()}
        self._delivered = 0
        self._read = 0
        self._names: list[str] = []
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches after the last one that was handed out.

        Raises:
            UserError: a missing file, too many bad images, or stored outputs of other images.
        """
        dataset = _Batches(
            self._streams, self._settings, self._rank, self._world_size, self._accumulation,
            _read_all(self._streams, self._keep_mb * 1_000_000),
        )  # fmt: skip
        source = DataLoader(
            dataset,
            batch_size=None,
            sampler=_Onwards(self._delivered),
            num_workers=self._workers,
            collate_fn=_unchanged,
            worker_init_fn=start_loader_process,
            pin_memory=torch.cuda.is_available(),
        )
        first = True
        for delivery in source:
            self._account(delivery)
            if delivery["batch"] is None:
                raise UserError(delivery["error"])
            batch: dict[str, Any] = {**delivery["batch"]}
            batch["positions"] = {"worker": self._rank, "raw": self._delivered * self.batch_size}
            batch["skipped"] = dict(self.skipped)
            if first:
                check_image_label_batch(batch, self._settings.spec, self.batch_size)
                first = False
            yield batch

    def _account(self, delivery: _Delivery) -> None:
        self._delivered += 1
        self._read += delivery["read"]
        for bad in delivery["bad"]:
            count = self.skipped[bad.reason] = self.skipped.get(bad.reason, 0) + 1
            named = f"{bad.name} ({bad.reason})"
            if len(self._names) < _NAMES_KEPT and named not in self._names:
                self._names.append(named)
            if count == 1 or count % _LOG_EVERY == 0:
                log.warning(
                    "skipped %s: %s %s (%d such on rank %d so far)",
                    bad.name, bad.reason, bad.detail, count, self._rank,
                )  # fmt: skip
        if self._read >= min(_MIN_READ, self.samples_per_epoch):
            self.check_bad_share()

    def check_bad_share(self) -> None:
        """See `vlmkd.data.loader.Loader`."""
        total = sum(self.skipped.values())
        if total > self._max_bad_share * self._read:
            raise UserError(
                f"data.max_bad_share={self._max_bad_share}: {total} of {self._read} images were bad "
                f"({_count_text(self.skipped)}), first {', '.join(self._names)}; mend the data set or raise "
                f"data.max_bad_share"
            )

    @property
    def stored(self) -> TeacherOutputs | None:
        """The stored teacher outputs that the batches bring."""
        return self._settings.stored

    def labelled(self) -> list[Item]:
        """The training images with a label, each once a stream."""
        return [
            item for stream in self._streams.values() for item in stream.items if item.label != UNLABELLED
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: a position and what was counted."""
        return {
            "delivered": self._delivered,
            "accumulation": self._accumulation,
            "items": dict(self._digests),
            "read": self._read,
            "names": list(self._names),
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last global batch of `state`, whatever number of ranks and processes wrote it.

        A warning names the streams whose items have changed since: their order goes on from the same position.
        """
        whole, rest = divmod(state["delivered"], state["accumulation"])
        assert rest == 0, "a state is saved after whole optimiser steps"
        self._delivered = whole * self._accumulation
        self._read, self._names = state["read"], list(state["names"])
        self.skipped = dict(state["skipped"])
        changed = [name for name, digest in self._digests.items() if state["items"].get(name) != digest]
        if changed:
            log.warning(
                "items of the stream %s changed since the state was saved: from global batch %d on the order is "
                "another one",
                ", ".join(changed), whole,
            )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Streams with the number and digest of their items, the teacher outputs, and what was skipped."""
        stored = self._settings.stored
        return {
            "kind": "labelled",
            "streams": {
                name: {
                    "items": len(stream.items),
                    "labelled": sum(item.label != UNLABELLED for item in stream.items),
                    "digest": self._digests[name],
                    "batch": stream.batch,
                    "sampling": stream.sampling,
                }
                for name, stream in self._streams.items()
            },
            "view_count": self._settings.view_count,
            "teacher_outputs": None
            if stored is None
            else {
                "folder": str(stored.folder),
                "teacher": stored.info.source,
                "digest": stored.info.digest,
                "view": stored.teacher_view,
                "views": stored.view_count,
            },
            "rank": self._rank,
            "read": self._read,
            "skipped": dict(self.skipped),
            "first_bad": list(self._names),
        }


def build_labelled_loader(
    cfg: LabelledDataConfig,
    streams: Mapping[str, Stream],
    *,
    seed: int,
    rank: int,
    world_size: int,
    accumulation: int = 1,
    image_spec: ImageSpec,
    teacher_specs: Sequence[ImageSpec] = (),
    teacher_digest: str | None = None,
) -> LabelledLoader:
    """The loader that `cfg` describes, with its stored teacher outputs, if it names any, checked against the run.

    Args:
        image_spec: the student's input, before `data.interpolation`, which is of the view and so the teachers' too.
        teacher_digest: digest of the teacher that the config names, which stored outputs must be of; None: unchecked.
    """
    views = labelled_views(cfg)
    stored = TeacherOutputs(cfg.teacher_outputs, cfg.teacher_view) if cfg.teacher_outputs else None
    if stored is not None:
        items = [item for stream in streams.values() for item in stream.items]
        stored.check(
            views, image_spec.fill, items=items, digest=teacher_digest, max_missing_share=cfg.max_bad_share
        )
    if cfg.interpolation != "model":
        image_spec, *teacher_specs = (
            replace(spec, interpolation=cfg.interpolation) for spec in (image_spec, *teacher_specs)
        )
    return LabelledLoader(
        streams, views=views, view_count=cfg.view_count, seed=seed, rank=rank, world_size=world_size,
        accumulation=accumulation, image_spec=image_spec, teacher_specs=teacher_specs, teacher_embeds=stored,
        workers=cfg.workers, max_pixels=cfg.max_pixels, max_bad_share=cfg.max_bad_share,
        keep_encoded_mb=cfg.keep_encoded_mb,
    )  # fmt: skip


def labelled_views(cfg: LabelledDataConfig) -> ViewConfig:
    """The distribution of training views that `cfg` asks for."""
    scale, ratio = (cfg.crop_scale[0], cfg.crop_scale[1]), (cfg.crop_ratio[0], cfg.crop_ratio[1])
    return ViewConfig(scale, ratio, cfg.flip, cfg.color_jitter, cfg.hue, cfg.grayscale)


def _check_streams(streams: Mapping[str, Stream], world_size: int, accumulation: int) -> None:
    shares = world_size * accumulation
    if not streams:
        raise UserError("a labelled loader needs at least one stream")
    for name, stream in streams.items():
        if not stream.items:
            raise UserError(f"stream {name} has no images; the split or the class subset is empty")
        if stream.batch < 1 or stream.batch % shares:
            raise UserError(
                f"stream {name} has {stream.batch} images of every global batch, which {world_size} rank(s) x "
                f"{accumulation} accumulation step(s) cannot share equally; give a multiple of {shares}"
            )
        if stream.sampling not in ("shuffle", "replacement"):
            raise UserError(f"stream {name} has sampling {stream.sampling!r}; choose shuffle or replacement")


def _read_all(streams: Mapping[str, Stream], limit: int) -> dict[ImageRef, bytes]:
    """Every image of the streams by its place, or nothing when all together have more than `limit` bytes."""
    refs: dict[ImageRef, Item] = {}
    total = 0
    for item in itertools.chain.from_iterable(stream.items for stream in streams.values()):
        if item.image in refs:
            continue
        total += _size(item)
        if total > limit:
            return {}
        refs[item.image] = item
    return {ref: read_item(item) for ref, item in refs.items()}


def _size(item: Item) -> int:
    if item.image.size >= 0:
        return item.image.size
    try:
        return os.stat(item.image.path).st_size
    except OSError as error:
        raise UserError(
            f"image {item.image} of {item.key} cannot be read ({error.strerror}); mend the data set's folder"
        ) from None


def _digest(items: Sequence[Item]) -> str:
    """sha256 over keys, labels and domains, in order."""
    state = hashlib.sha256()
    for item in items:
        state.update(json.dumps([item.key, item.label, item.domain]).encode())
    return state.hexdigest()


def _count_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))


def _unchanged(delivery: Any) -> Any:
    return delivery
