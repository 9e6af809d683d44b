"""Where the loader's raw samples come from: streamed shards, or items by position.

What a logical worker draws is a function of the seed and of what was drawn before, so a source goes on from a few numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlmkd.config import DataConfig
from vlmkd.data import shards as sharding
from vlmkd.data.labelled import UNLABELLED, Item
from vlmkd.data.samples import RawSample, members
from vlmkd.errors import UserError

log = logging.getLogger(__name__)

_MOST_BAD = 1000  # in a row, after which no good sample is looked for
_ORDERS_KEPT = 2  # passes of a stream that one batch may span without ordering anew

_Rows = Iterator[tuple[str, Iterator[RawSample]]]
"""A batch: for each row what it is of, and candidates, the first good one of which is taken."""


# ---------------------------------------------------------------------------------------------------------- shards


class ShardSource:
    """Shards of several sources, drawn by weight; every logical worker has its share of the shards.

    A run resumed with other ranks, workers, shuffling or sources goes on with a fresh stream, which the seed and the number
    of batches so far settle.
    """

    hint = "mend the shards (`python data_tools/check_shards.py SHARDS` lists them)"

    def __init__(
        self,
        cfg: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        field: str = "data.sources",
        whole: bool = False,
    ) -> None:
        """`field`: what the run's config calls its sources. `whole`: read all members of a sample."""
        if not cfg.sources:
            told = "is empty; add one, e.g. data.sources.0.shards=['emoji:train']"
            raise UserError(f"config field data.sources {told}")
        self.cfg, self.rank, self.world_size, self.batch_size = cfg, rank, world_size, micro_batch_size
        self.field, self.members, self.salt = field, None if whole else members(cfg), f"{seed}"
        self.samples_per_epoch = cfg.samples_per_epoch
        """Samples of one pass over the data, of all ranks together; 0: not known."""
        self.shards: list[list[str]] = []
        for number, source in enumerate(cfg.sources):
            where = f"config field {field}" + (f".{number}.shards" if field == "data.sources" else "")
            self.shards.append(sharding.expand(source.shards, where))
            sharding.check_count(len(self.shards[-1]), world_size, cfg.workers, where)
        weighted = [[source.weight, urls] for source, urls in zip(cfg.sources, self.shards, strict=True)]
        self._layout = {
            "seed": seed,
            "ranks": world_size,
            "data.workers": max(cfg.workers, 1),
            "data.shuffle_buffer": cfg.shuffle_buffer,
            field: digest_of(weighted),
        }

    def stream(self, worker: int, workers: int, delivered: int, state: Any) -> _Mixture:
        """What logical worker `worker` of the rank draws after `delivered` batches of all its workers."""
        return _Mixture(self, self.rank * workers + worker, self.world_size * workers, state)

    def state_dict(self) -> dict[str, Any]:
        return {"layout": dict(self._layout), "salt": self.salt}

    def resume(self, state: dict[str, Any], delivered: int) -> tuple[int, bool]:
        """Batches to go on after, and whether the states of the workers still hold; says what has changed."""
        before = state["layout"]
        told = [
            f"{name} changed" + ("" if name == self.field else f" from {before.get(name)} to {value}")
            for name, value in self._layout.items()
            if before.get(name) != value
        ]
        if not told:
            self.salt = state["salt"]
            return delivered, True
        self.salt = f"{self._layout['seed']}/from{delivered}"
        afresh = "%s: the data stream starts afresh after batch %d instead of continuing"
        log.warning(afresh, "; ".join(told), delivered)
        return delivered, False

    def describe(self) -> dict[str, Any]:
        sources = [
            {
                "shards": len(urls),
                "digest": digest_of(urls),
                "samples": sharding.known_samples(urls),
                "weight": source.weight,
                "teacher_caches": list(source.teacher_caches),
            }
            for source, urls in zip(self.cfg.sources, self.shards, strict=True)
        ]
        return {"kind": "webdataset", "sources": sources}


class _Mixture:
    """Endless raw samples of one logical worker."""

    def __init__(self, source: ShardSource, worker: int, workers: int, state: Any) -> None:
        cfg, self._source, self._worker = source.cfg, source, worker
        self._weights = [part.weight for part in cfg.sources]
        self._given: int = state["given"] if state else 0
        self._streams = [
            sharding.ShardStream(
                urls,
                partial(sharding.read_shard, members=source.members, shard_cache=cfg.shard_cache),
                salt=f"{source.salt}/{number}",
                worker=worker,
                workers=workers,
                shuffle=round(cfg.shuffle_buffer * self._weights[number] / sum(self._weights)),
                state=state["sources"][number] if state else None,
            )
            for number, urls in enumerate(source.shards)
        ]

    @property
    def passes(self) -> int:
        """Over the source that is the furthest behind."""
        return min(stream.passes for stream in self._streams)

    @property
    def positions(self) -> dict[str, int]:
        """Where it stands: see `Pipeline.collate`."""
        return {"worker": self._worker, "raw": self._given}

    def rows(self) -> _Rows:
        """The next batch."""
        for _ in range(self._source.batch_size):
            yield self._source.field, self._candidates()

    def _candidates(self) -> Iterator[RawSample]:
        """Raw samples until a thousand, or a whole pass, were bad."""
        start, salt = self.passes, self._source.salt
        for _ in range(_MOST_BAD):
            if self.passes - start >= 2:
                return
            rng = random.Random(f"{salt}/mix/{self._worker}/{self._given}")
            number = rng.choices(range(len(self._streams)), self._weights)[0]
            self._given += 1
            raw = next(self._streams[number])
            raw.source, raw.seed = number, f"{salt}/{number}/{raw.position[0]}/{raw.name}"
            yield raw

    def state_dict(self) -> dict[str, Any]:
        return {"given": self._given, "sources": [stream.state_dict() for stream in self._streams]}


# ----------------------------------------------------------------------------------------------------------- items


@dataclass(frozen=True)
class Stream:
    """Items of one kind, and how many of them are in every global batch."""

    items: Sequence[Any]
    """As `vlmkd.data.labelled.Item`: a `key` that no other item has, and `members()`, what the pipeline is given of it."""
    batch: int
    """Items of every global batch, over all ranks and accumulation steps."""
    replacement: bool = False
    """Each draw is uniform over all items; else each pass has every item once, and batches run over its border."""


class ItemSource:
    """Named streams (such as labelled and unlabelled images), with a share each of every global batch.

    Which item is drawn at position p of a stream since the start of the run, and which view of it, are functions of
    (seed, stream name, p). So global batch number b is the same whoever loads it and however many ranks share it, and a
    run resumes from the batch number alone. A bad item gives its place to the next position's, which is then drawn twice.
    """

    hint = "mend the data set"

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int = 1,
        view_count: int = 0,
    ) -> None:
        """Rows of a batch are the rank's equal share of each stream, in their order.

        Args:
            accumulation: batches per rank that make up one global batch.
            view_count: views 0 to `view_count` - 1 of each item, one a pass, then again; 0: a new view each pass.
        """
        shares = world_size * accumulation
        if not streams:
            raise UserError("a loader of items needs at least one stream")
        for name, stream in streams.items():
            if not stream.items:
                raise UserError(f"stream {name} has no images; the split or the class subset is empty")
            if stream.batch < 1 or stream.batch % shares:
                raise UserError(
                    f"stream {name} has {stream.batch} images of every global batch, which {world_size} rank(s) x "
                    f"{accumulation} accumulation step(s) cannot share equally; give a multiple of {shares}"
                )
        self.streams, self.rank, self.world_size = dict(streams), rank, world_size
        self.seed, self.accumulation, self.view_count = seed, accumulation, view_count
        self.samples_per_epoch = sum(len(stream.items) for stream in streams.values())
        self.batch_size = sum(stream.batch for stream in streams.values()) // shares
        self._digests = {name: _digest_of_items(stream.items) for name, stream in streams.items()}
        self._orders: dict[str, dict[int, list[int]]] = {name: {} for name in streams}

    def stream(self, worker: int, workers: int, delivered: int, state: Any) -> _Positions:
        """As a ShardSource's; the number of batches says it all."""
        return _Positions(self, delivered + (worker - delivered) % workers, workers)

    def labelled(self) -> list[Item]:
        return [item for one in self.streams.values() for item in one.items if item.label != UNLABELLED]

    def draw(self, name: str, position: int) -> tuple[int, int]:
        """Index of the item at a stream's position, and the number of its view."""
        stream, salt = self.streams[name], f"{self.seed}/{name}"
        if stream.replacement:
            rng = random.Random(f"{salt}/draw/{position}")
            index = rng.randrange(len(stream.items))
            return index, rng.randrange(self.view_count) if self.view_count else position
        turn, place = divmod(position, len(stream.items))
        orders = self._orders[name]
        if turn not in orders:
            order = list(range(len(stream.items)))
            random.Random(f"{salt}/order/{turn}").shuffle(order)
            while len(orders) >= _ORDERS_KEPT:
                del orders[next(iter(orders))]
            orders[turn] = order
        return orders[turn][place], turn % self.view_count if self.view_count else turn

    def state_dict(self) -> dict[str, Any]:
        return {"accumulation": self.accumulation, "items": dict(self._digests)}

    def resume(self, state: dict[str, Any], delivered: int) -> tuple[int, bool]:
        """As a ShardSource's; any number of ranks and processes may have written the state."""
        whole, rest = divmod(delivered, state["accumulation"])
        assert rest == 0, "a state is saved after whole optimiser steps"
        if changed := [name for name, own in self._digests.items() if state["items"].get(name) != own]:
            told = "items of the stream %s changed: from global batch %d on the order is another one"
            log.warning(told, ", ".join(changed), whole)
        return whole * self.accumulation, False

    def describe(self) -> dict[str, Any]:
        streams = {
            name: {
                "items": len(stream.items),
                "labelled": sum(getattr(item, "label", UNLABELLED) != UNLABELLED for item in stream.items),
                "digest": self._digests[name],
                "batch": stream.batch,
                "replacement": stream.replacement,
            }
            for name, stream in self.streams.items()
        }
        return {"kind": "items", "streams": streams, "view_count": self.view_count}


class _Positions:
    """Batches `number`, `number` + `workers`, ... of one rank."""

    def __init__(self, source: ItemSource, number: int, workers: int) -> None:
        self._source, self._number, self._workers = source, number, workers
        self.passes = 0

    @property
    def positions(self) -> dict[str, int]:
        done = self._number - self._workers + 1
        return {"worker": self._source.rank, "raw": done * self._source.batch_size}

    def rows(self) -> _Rows:
        source = self._source
        step, part = divmod(self._number, source.accumulation)
        for index, (name, stream) in enumerate(source.streams.items()):
            share = stream.batch // (source.world_size * source.accumulation)
            start = step * stream.batch + (part * source.world_size + source.rank) * share
            for position in range(start, start + share):
                yield f"stream {name}", self._candidates(index, name, position)
        self.passes = min(step * stream.batch // len(stream.items) for stream in source.streams.values())
        self._number += self._workers

    def _candidates(self, index: int, name: str, position: int) -> Iterator[RawSample]:
        source, items = self._source, self._source.streams[name].items
        for candidate in range(position, position + min(len(items), _MOST_BAD)):
            number, turn = source.draw(name, candidate)
            item = items[number]
            yield RawSample(
                "", item.key, item.members(), source=index, turn=turn, item=item,
                seed=f"{source.seed}/{item.key}/{turn}",
            )  # fmt: skip

    def state_dict(self) -> None:
        return None


def _digest_of_items(items: Sequence[Any]) -> str:
    """sha256 over keys and, where there are any, labels and domains, in order."""
    state = hashlib.sha256()
    for item in items:
        facts = [item.key, *(getattr(item, name) for name in ("label", "domain") if hasattr(item, name))]
        state.update(json.dumps(facts).encode())
    return state.hexdigest()


def digest_of(value: Any) -> str:
    """sha256 over plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


Source = ShardSource | ItemSource
"""Raw samples of one rank."""
