"""`build_loader`: endless, deterministic, exactly resumable batches for one rank.

Every rank has `max(data.workers, 1)` logical workers. Each emits complete batches from its own stream, and the rank
takes one from each in turn. A batch travels with the state its worker had after the batch's last raw sample; the
loader's state is the newest such state of each worker, so batches that were only prefetched do not count.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmkd.allocator import start_loader_process
from vlmkd.config import DataConfig
from vlmkd.data import shards as sharding
from vlmkd.data.batch import check_batch
from vlmkd.data.pipeline import Pipeline, Sample, TeacherView, Tokenizer
from vlmkd.data.samples import BadSample, members, view_config
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

log = logging.getLogger(__name__)

_MIN_READ = 1000  # samples before data.max_bad_share is applied, if the run has not ended
_LOG_EVERY = 100  # bad samples of one reason per log line, after the first
_NAMES_KEPT = 5
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([\w ]+)|exited)")

Batch = dict[str, Any]


class Loader(Protocol):
    """Endless batches; the loop counts steps, not epochs."""

    skipped: dict[str, int]
    """Bad samples so far on this rank, by reason."""
    samples_per_epoch: int
    """Samples of one pass over the data, of all ranks together; 0: not known."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` continues after the last batch that was handed out."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; call it before iterating."""
        ...

    def describe(self) -> dict[str, Any]:
        """What went into the run, for data.json."""
        ...

    def check_bad_share(self) -> None:
        """Called at the end of a run: judge what was read, however little.

        Raises:
            UserError: more than `data.max_bad_share` of it was bad.
        """
        ...


def build_loader(
    cfg: DataConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    image_spec: ImageSpec,
    tokenizer: Tokenizer,
    teacher_views: Sequence[TeacherView] = (),
    teacher_digests: Sequence[str] | None = None,
    start_step: int = 0,
) -> Loader:
    """The training loader that `cfg` describes.

    Args:
        teacher_views: input and tokenizer of each teacher that runs beside the student; None where the student's do.
        teacher_digests: sha256 of each teacher that the config names, which the caches must be of; None: unchecked.
        start_step: a run that starts here without a loader state draws another stream than one from step 0.

    Raises:
        UserError: missing, empty or too few shards, bad weights, a teacher cache that does not fit.
    """
    if cfg.kind == "synthetic":
        from vlmkd.data.synthetic import SyntheticLoader

        return SyntheticLoader(
            cfg, seed=seed, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size,
            image_spec=image_spec, tokenizer=tokenizer, teacher_views=teacher_views,
        )  # fmt: skip
    shard_lists = _shard_lists(cfg, world_size)
    caches = _open_caches(cfg, shard_lists, image_spec, teacher_digests)
    pipeline = Pipeline(cfg, image_spec, tokenizer, teacher_views, caches)
    topology = {
        "seed": seed,
        "ranks": world_size,
        "data.workers": max(cfg.workers, 1),
        "data.shuffle_buffer": cfg.shuffle_buffer,
        "data.sources": _digest(
            [[source.weight, urls] for source, urls in zip(cfg.sources, shard_lists, strict=True)]
        ),
    }
    salt = f"{seed}/from{start_step}" if start_step else f"{seed}"
    return ShardLoader(
        cfg, shard_lists, pipeline, image_spec, micro_batch_size, rank, world_size, topology, salt
    )


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Turn torch's error about a loader process that died, which may come at any line of the body, into a UserError."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        death = _DEATH.match(str(error))
        if death is None and isinstance(error, RuntimeError):
            raise
        signal = death[1] if death else None  # the other two: it died while it handed a batch over
        killed = f"by signal {signal}, as when memory runs out" if signal else "before its work was done"
        raise UserError(
            f"a loader process ended {killed}; lower data.workers (0 loads in the training process), and for shards "
            "data.shuffle_buffer, or free memory, then start the same command again"
        ) from None


def _shard_lists(cfg: DataConfig, world_size: int) -> list[list[str]]:
    if not cfg.sources:
        raise UserError(
            "config field data.sources is empty; add one, e.g. data.sources.0.shards=['emoji:train']"
        )
    lists = []
    for number, source in enumerate(cfg.sources):
        where = f"config field data.sources.{number}.shards"
        urls = sharding.expand(list(source.shards), where)
        sharding.check_count(len(urls), world_size, cfg.workers, where)
        lists.append(urls)
    return lists


def _open_caches(
    cfg: DataConfig, shard_lists: list[list[str]], spec: ImageSpec, digests: Sequence[str] | None
) -> list[list[TeacherOutputs]]:
    numbers = {len(source.teacher_caches) for source in cfg.sources}
    if numbers == {0}:
        return []
    if len(numbers) > 1 or (digests is not None and numbers != {len(digests)}):
        raise UserError(
            f"config field data.sources.N.teacher_caches: sources name {sorted(numbers)} caches"
            + (f" for {len(digests)} teachers" if digests is not None else "")
            + "; every source needs one per teacher, or all none"
        )
    views = view_config(cfg)
    caches = []
    for source, urls in zip(cfg.sources, shard_lists, strict=True):
        caches.append([TeacherOutputs(folder) for folder in source.teacher_caches])
        for number, cache in enumerate(caches[-1]):
            digest = digests[number] if digests is not None else None
            cache.check(views, spec.fill, shards=urls, digest=digest)
    return caches


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- one worker


class _Mixture:
    """Endless (source number, raw sample) of one logical worker, sources drawn by weight."""

    def __init__(
        self,
        cfg: DataConfig,
        shard_lists: list[list[str]],
        salt: str,
        worker: int,
        workers: int,
        state: dict[str, Any] | None,
    ) -> None:
        self._salt, self._worker = salt, worker
        self._weights = [source.weight for source in cfg.sources]
        self.given = state["given"] if state else 0
        read = partial(_read, wanted=members(cfg), shard_cache=cfg.shard_cache)
        self._streams = [
            sharding.ShardStream(
                urls,
                read,
                salt=f"{salt}/{number}",
                worker=worker,
                workers=workers,
                shuffle=round(cfg.shuffle_buffer * self._weights[number] / sum(self._weights)),
                state=state["sources"][number] if state else None,
            )
            for number, urls in enumerate(shard_lists)
        ]

    def __next__(self) -> tuple[int, sharding.RawSample]:
        source = 0
        if len(self._streams) > 1:
            rng = random.Random(f"{self._salt}/mix/{self._worker}/{self.given}")
            source = rng.choices(range(len(self._streams)), self._weights)[0]
        self.given += 1
        return source, next(self._streams[source])

    @property
    def passes(self) -> int:
        """Complete passes through the source that is the furthest behind."""
        return min(stream.passes for stream in self._streams)

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given, "sources": [stream.state_dict() for stream in self._streams]}


def _read(url: str, *, wanted: frozenset[str], shard_cache: str, skip: int) -> Iterator[sharding.RawSample]:
    return sharding.read_shard(url, wanted, skip=skip, shard_cache=shard_cache)


class _Deliveries(IterableDataset[dict[str, Any]]):
    """What the logical workers of one rank deliver: a batch, or an error that ends the run."""

    def __init__(
        self,
        cfg: DataConfig,
        shard_lists: list[list[str]],
        pipeline: Pipeline,
        batch_size: int,
        rank: int,
        world_size: int,
        salt: str,
        states: list[dict[str, Any] | None],
        delivered: int,
    ) -> None:
        self._cfg, self._shard_lists, self._pipeline = cfg, shard_lists, pipeline
        self._batch_size, self._rank, self._world_size, self._salt = batch_size, rank, world_size, salt
        self._states, self._delivered = states, delivered

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        if info is not None:
            torch.set_num_threads(1)
        # torch takes from process 0 first, so process 0 must carry the worker whose turn it is.
        local = ((info.id if info is not None else 0) + self._delivered) % len(self._states)
        try:
            yield from self._batches(local)
        except UserError as error:
            yield {"error": str(error)}

    def _batches(self, local: int) -> Iterator[dict[str, Any]]:
        number = len(self._states)
        worker = self._rank * number + local
        stream = _Mixture(
            self._cfg, self._shard_lists, self._salt, worker, self._world_size * number, self._states[local]
        )
        tally = _Tally(self._states[local])
        good: list[Sample] = []
        bad: list[tuple[str, str, str]] = []
        while True:
            source, raw = next(stream)
            rng = random.Random(f"{self._salt}/{source}/{raw.position[0]}/{raw.name}")
            sample = self._pipeline.process(raw, source, rng)
            tally.count(isinstance(sample, BadSample), stream.passes)
            if isinstance(sample, BadSample):
                bad.append((sample.reason, sample.name, sample.detail))
                if tally.hopeless(stream.passes):
                    raise UserError(_all_bad(bad, tally.streak))
                continue
            good.append(sample)
            if len(good) == self._batch_size:
                batch = self._pipeline.collate(good)
                batch["positions"] = {"worker": worker, "raw": stream.given}
                state = {**stream.state_dict(), **tally.state_dict()}
                yield {"batch": batch, "local": local, "state": state, "bad": bad}
                good, bad = [], []


class _Tally:
    """How many raw samples of a worker were read and bad: in all, in its first pass, and in a row."""

    def __init__(self, state: dict[str, Any] | None) -> None:
        self.read: int = state["tally"][0] if state else 0
        self.bad: int = state["tally"][1] if state else 0
        self.first_pass: list[int] | None = state["first_pass"] if state else None
        self.streak = 0
        self._streak_start = 0

    def count(self, bad: bool, passes: int) -> None:
        """Count one raw sample of a stream that has finished `passes` passes before it."""
        if passes >= 1 and self.first_pass is None:
            self.first_pass = [self.read, self.bad]
        self.read += 1
        self.bad += bad
        if self.streak == 0:
            self._streak_start = passes
        self.streak = self.streak + 1 if bad else 0

    def hopeless(self, passes: int) -> bool:
        """Whether a thousand samples in a row, or a whole pass, were bad."""
        return self.streak >= _MIN_READ or (self.streak > 0 and passes - self._streak_start >= 2)

    def state_dict(self) -> dict[str, Any]:
        return {"tally": [self.read, self.bad], "first_pass": self.first_pass}


def _all_bad(bad: list[tuple[str, str, str]], streak: int) -> str:
    reasons = _count_text(Counter(reason for reason, _, _ in bad[-streak:]))
    return (
        f"data.sources: {streak} samples in a row were bad ({reasons}); last: {bad[-1][1]} {bad[-1][2]}; "
        f"look with `python data_tools/check_shards.py SHARDS`"
    )


def _count_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))


# ----------------------------------------------------------------------------------------------------- one rank


class ShardLoader:
    """Endless batches of one rank from shards; see the module's docstring and `build_loader`."""

    def __init__(
        self,
        cfg: DataConfig,
        shard_lists: list[list[str]],
        pipeline: Pipeline,
        image_spec: ImageSpec,
        batch_size: int,
        rank: int,
        world_size: int,
        topology: dict[str, Any],
        salt: str,
    ) -> None:
        self._cfg, self._shard_lists, self._pipeline, self._spec = cfg, shard_lists, pipeline, image_spec
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._topology, self._salt = topology, salt
        self.samples_per_epoch = cfg.samples_per_epoch
        self._delivered = 0
        self._states: list[dict[str, Any] | None] = [None] * max(cfg.workers, 1)
        self._read = 0
        self._names: list[str] = []
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        """Batches after the last one that was handed out.

        Raises:
            UserError: too many bad samples, an empty or unreadable source, a teacher cache of other samples.
            RuntimeError: a loader process died.
        """
        deliveries = _Deliveries(
            self._cfg, self._shard_lists, self._pipeline, self._batch_size, self._rank, self._world_size,
            self._salt, list(self._states), self._delivered,
        )  # fmt: skip
        source = DataLoader(
            deliveries,
            batch_size=None,
            num_workers=self._cfg.workers,
            collate_fn=_unchanged,
            worker_init_fn=start_loader_process,
            pin_memory=torch.cuda.is_available(),
        )
        first = True
        for delivery in source:
            if "error" in delivery:
                raise UserError(delivery["error"])
            self._account(delivery)
            batch = delivery["batch"]
            batch["skipped"] = dict(self.skipped)
            if first:
                check_batch(batch, self._spec, self._batch_size)
                first = False
            yield batch

    def _account(self, delivery: dict[str, Any]) -> None:
        local = delivery["local"]
        self._read += delivery["state"]["tally"][0] - (self._states[local] or {"tally": [0]})["tally"][0]
        self._states[local] = delivery["state"]
        self._delivered += 1
        for reason, name, detail in delivery["bad"]:
            count = self.skipped[reason] = self.skipped.get(reason, 0) + 1
            if len(self._names) < _NAMES_KEPT:
                self._names.append(f"{name} ({reason})")
            if count == 1 or count % _LOG_EVERY == 0:
                log.warning(
                    "skipped %s: %s %s (%d such on rank %d so far)", name, reason, detail, count, self._rank
                )
        if self._read >= _MIN_READ:
            self._refuse_if_many(sum(self.skipped.values()), self._read)
        firsts = [state["first_pass"] for state in self._states if state and state["first_pass"]]
        if len(firsts) == len(self._states):  # a small set is judged by one whole pass
            self._refuse_if_many(sum(bad for _, bad in firsts), sum(read for read, _ in firsts))

    def check_bad_share(self) -> None:
        """See `Loader`."""
        self._refuse_if_many(sum(self.skipped.values()), self._read)

    def _refuse_if_many(self, bad: int, read: int) -> None:
        if bad > self._cfg.max_bad_share * read:
            raise UserError(
                f"data.max_bad_share={self._cfg.max_bad_share}: {bad} of {read} samples were bad "
                f"({_count_text(self.skipped)}), first {', '.join(self._names)}; mend the shards "
                f"(`python data_tools/check_shards.py SHARDS` lists them) or raise data.max_bad_share"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; some hundred bytes per worker."""
        return {
            "topology": dict(self._topology),
            "salt": self._salt,
            "delivered": self._delivered,
            "workers": list(self._states),
            "read": self._read,
            "names": list(self._names),
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly, or, when the state is of other ranks, workers, shuffling or sources, on a fresh stream.

        The fresh stream is drawn from the seed and the number of batches so far, the same on every rank; a warning
        says what changed.
        """
        self._delivered, self._read = state["delivered"], state["read"]
        self._names, self.skipped = list(state["names"]), dict(state["skipped"])
        changed = [name for name, value in self._topology.items() if state["topology"].get(name) != value]
        if not changed:
            self._salt = state["salt"]
            self._states = list(state["workers"])
            return
        self._salt = f"{self._topology['seed']}/from{self._delivered}"
        self._states = [None] * len(self._states)
        told = "; ".join(
            f"{name} changed"
            if name == "data.sources"
            else f"{name} changed from {state['topology'].get(name)} to {self._topology[name]}"
            for name in changed
        )
        log.warning(
            "%s: the data stream starts afresh after batch %d instead of continuing", told, self._delivered
        )

    def describe(self) -> dict[str, Any]:
        """Shard counts, digests of the shard lists, sample counts where known, and what was skipped."""
        sources = [
            {
                "shards": len(urls),
                "digest": _digest(urls),
                "samples": sharding.known_samples(urls),
                "weight": source.weight,
                "teacher_caches": list(source.teacher_caches),
            }
            for source, urls in zip(self._cfg.sources, self._shard_lists, strict=True)
        ]
        return {
            "kind": "webdataset",
            "sources": sources,
            "rank": self._rank,
            "read": self._read,
            "skipped": dict(self.skipped),
            "first_bad": list(self._names),
        }


def _unchanged(delivery: Any) -> Any:
    return delivery
