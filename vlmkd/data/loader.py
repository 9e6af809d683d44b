"""The loader: endless, deterministic, exactly resumable batches for one rank, from any source by any pipeline.

Every rank has `max(workers, 1)` logical workers. Each makes complete batches from a stream of its own, and the rank takes
one from each in turn. A batch travels with the state that its worker had after it; the loader's state is the newest such
state of each worker, so batches that were only prefetched do not count.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmkd.allocator import keep_freed_memory
from vlmkd.config import DataConfig, LabelledDataConfig, require
from vlmkd.data.pipelines import ImagePipeline, Pipeline, Tokenizer
from vlmkd.data.samples import BadSample, view_config
from vlmkd.data.sources import ItemSource, ShardSource, Source, Stream
from vlmkd.data.synthetic import DrawnPair
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

log = logging.getLogger(__name__)

_MIN_READ = 1000  # samples before the share of bad ones is judged, if neither a pass nor the run has ended
_LOG_EVERY = 100  # bad samples of one reason per log line, after the first
_NAMES_KEPT = 5
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([\w ]+)|exited)")


class _Deliveries(IterableDataset[dict[str, Any]]):
    """What the logical workers of one rank deliver: a batch, or an error that ends the run."""

    def __init__(
        self, source: Source, pipeline: Pipeline[Any], states: Sequence[Any], delivered: int
    ) -> None:
        self._source, self._pipeline, self._states, self._delivered = source, pipeline, states, delivered

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        # torch takes from process 0 first, so process 0 must carry the worker whose turn it is.
        local = ((info.id if info is not None else 0) + self._delivered) % len(self._states)
        try:
            yield from self._of_worker(local)
        except UserError as error:
            yield {"error": str(error)}

    def _of_worker(self, local: int) -> Iterator[dict[str, Any]]:
        workers, state = len(self._states), self._states[local] or {}
        stream = self._source.stream(local, workers, self._delivered, state.get("stream"))
        read, bad = state.get("tally", [0, 0])
        first_pass: list[int] | None = state.get("first_pass")
        while True:
            samples: list[Any] = []
            dropped: list[tuple[str, str, str]] = []
            for where, candidates in stream.rows():
                failed: list[tuple[str, str, str]] = []
                for raw in candidates:
                    if stream.passes >= 1 and first_pass is None:
                        first_pass = [read, bad]
                    read += 1
                    try:
                        samples.append(self._pipeline.process(raw))
                        break
                    except BadSample as error:
                        bad += 1
                        failed.append((raw.name, error.reason, error.detail))
                else:
                    counts = _count_text(Counter(reason for _, reason, _ in failed))
                    last, _, detail = failed[-1]
                    raise UserError(
                        f"{where}: {len(failed)} samples in a row were bad ({counts}); last: {last} {detail}; "
                        f"{self._source.hint}"
                    )
                dropped += failed
            batch = self._pipeline.collate(samples)
            batch["positions"] = stream.positions
            state = {"stream": stream.state_dict(), "tally": [read, bad], "first_pass": first_pass}
            yield {"batch": batch, "local": local, "state": state, "bad": dropped}


def _count_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))


class Loader:
    """Endless batches of one rank."""

    def __init__(
        self, source: Source, pipeline: Pipeline[Any], *, workers: int = 2, max_bad_share: float = 0.05
    ) -> None:
        self.source, self.pipeline = source, pipeline
        self._workers, self._max_bad_share = workers, max_bad_share
        self._delivered = 0
        self._states: list[Any] = [None] * max(workers, 1)
        self._read = 0
        self._names: list[str] = []
        self.skipped: dict[str, int] = {}
        """Bad samples so far on this rank, by reason."""
        self.samples_per_epoch = source.samples_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches after the last one that was handed out. A process that dies is an error of torch: see `worker_deaths`."""
        deliveries = DataLoader(
            _Deliveries(self.source, self.pipeline, list(self._states), self._delivered),
            batch_size=None,
            num_workers=self._workers,
            worker_init_fn=keep_freed_memory,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else its start, at any step of a resumed run, draws from that step's state
        )
        for number, delivery in enumerate(deliveries):
            if "error" in delivery:
                raise UserError(delivery["error"])
            self._account(delivery)
            if not number:
                self.pipeline.check(delivery["batch"], self.source.batch_size)
            yield delivery["batch"]

    def _account(self, delivery: dict[str, Any]) -> None:
        local, before = delivery["local"], self._states[delivery["local"]]
        self._read += delivery["state"]["tally"][0] - (before["tally"][0] if before else 0)
        self._states[local] = delivery["state"]
        self._delivered += 1
        for name, reason, detail in delivery["bad"]:
            count = self.skipped[reason] = self.skipped.get(reason, 0) + 1
            named = f"{name} ({reason})"
            if len(self._names) < _NAMES_KEPT and named not in self._names:
                self._names.append(named)
            if count == 1 or count % _LOG_EVERY == 0:
                told = "skipped %s: %s %s (%d such on rank %d so far)"
                log.warning(told, name, reason, detail, count, self.source.rank)
        if self._read >= _MIN_READ or not self._max_bad_share:
            self.check_bad_share()
        firsts = [state["first_pass"] for state in self._states if state and state["first_pass"]]
        if len(firsts) == len(self._states):  # a small set is judged by one whole pass
            self._judge(sum(bad for _, bad in firsts), sum(read for read, _ in firsts))

    def check_bad_share(self) -> None:
        """Judge what was read, however little, as at the end of a run."""
        self._judge(sum(self.skipped.values()), self._read)

    def _judge(self, bad: int, read: int) -> None:
        if bad > self._max_bad_share * read:
            raise UserError(
                f"data.max_bad_share={self._max_bad_share}: {bad} of {read} samples were bad "
                f"({_count_text(self.skipped)}), first {', '.join(self._names)}; {self.source.hint} or raise "
                f"data.max_bad_share"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "source": self.source.state_dict(),
            "delivered": self._delivered,
            "workers": list(self._states),
            "read": self._read,
            "names": list(self._names),
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out, as far as the source can; call it before iterating."""
        self._read, self._names, self.skipped = state["read"], list(state["names"]), dict(state["skipped"])
        self._delivered, hold = self.source.resume(state["source"], state["delivered"])
        self._states = list(state["workers"]) if hold else [None] * len(self._states)

    def describe(self) -> dict[str, Any]:
        """What has gone into the run, for data.json."""
        return {
            **self.source.describe(),
            **self.pipeline.describe(),
            "rank": self.source.rank,
            "read": self._read,
            "skipped": dict(self.skipped),
            "first_bad": list(self._names),
        }


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Make torch's error about a loader process that died, which may come at any line of the body, a UserError."""
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


# ------------------------------------------------------------------------------------------------- from the configs


def build_loader(
    cfg: DataConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    image_spec: ImageSpec,
    tokenizer: Tokenizer,
    teacher_views: Sequence[tuple[ImageSpec | None, Tokenizer | None]] = (),
    teacher_digests: Sequence[str] | None = None,
) -> Loader:
    """The loader of image-text pairs.

    Args:
        teacher_views: input and tokenizer of each teacher that runs beside the student; None where the student's do.
        teacher_digests: sha256 of each teacher, which the caches must be of; None: unchecked.
    """
    ranks: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    source: Source
    stored: list[list[TeacherOutputs]] = []
    if cfg.kind == "synthetic":
        drawn = [
            DrawnPair(seed, index, cfg.image_keys[0], cfg.text_key) for index in range(cfg.synthetic_samples)
        ]
        source = ItemSource({"synthetic": Stream(drawn, micro_batch_size * world_size)}, **ranks)
    else:
        source = ShardSource(cfg, **ranks, micro_batch_size=micro_batch_size)
        stored = _open_caches(cfg, source.shards, image_spec, teacher_digests)
    pipeline = ImagePipeline(
        image_spec, view_config(cfg), tokenizer,
        teacher_specs=[spec for spec, _ in teacher_views],
        teacher_tokenizers=[own for _, own in teacher_views],
        stored=stored, image_keys=cfg.image_keys, text_key=cfg.text_key, max_pixels=cfg.max_pixels,
    )  # fmt: skip
    return Loader(source, pipeline, workers=cfg.workers, max_bad_share=cfg.max_bad_share)


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
) -> Loader:
    """The loader of a labelled set; `teacher_digest`: as in `build_loader`."""
    views, view_count = view_config(cfg), cfg.view_count
    stored = TeacherOutputs(cfg.teacher_outputs, cfg.teacher_view) if cfg.teacher_outputs else None
    if stored is not None:
        items = [item for stream in streams.values() for item in stream.items]
        stored.check(
            views, image_spec.fill, items=items, digest=teacher_digest, max_missing_share=cfg.max_bad_share
        )
        if stored.replays:
            held = stored.info.crops
            told = f"is {view_count}, but {stored.folder} holds {held} views an image"
            require(view_count <= held, "data.view_count", told)
            view_count = view_count or held
    if cfg.interpolation != "model":
        image_spec, *teacher_specs = (
            replace(spec, interpolation=cfg.interpolation) for spec in (image_spec, *teacher_specs)
        )
    source = ItemSource(
        streams, seed=seed, rank=rank, world_size=world_size, accumulation=accumulation, view_count=view_count,
    )  # fmt: skip
    pipeline = ImagePipeline(
        image_spec, views, teacher_specs=teacher_specs, max_pixels=cfg.max_pixels,
        stored=[] if stored is None else [[stored]] * len(streams),
    )  # fmt: skip
    return Loader(source, pipeline, workers=cfg.workers, max_bad_share=cfg.max_bad_share)


def _open_caches(
    cfg: DataConfig, shard_lists: list[list[str]], spec: ImageSpec, digests: Sequence[str] | None
) -> list[list[TeacherOutputs]]:
    numbers = {len(source.teacher_caches) for source in cfg.sources}
    if numbers == {0}:
        return []
    if len(numbers) > 1 or (digests is not None and numbers != {len(digests)}):
        of_teachers = f" for {len(digests)} teachers" if digests is not None else ""
        raise UserError(
            f"config field data.sources.N.teacher_caches: sources name {sorted(numbers)} caches{of_teachers}; every source "
            "needs one per teacher, or all none"
        )
    caches = []
    wanted: Sequence[str | None] = digests or [None] * max(numbers)
    for source, urls in zip(cfg.sources, shard_lists, strict=True):
        caches.append([TeacherOutputs(folder) for folder in source.teacher_caches])
        for cache, digest in zip(caches[-1], wanted, strict=True):
            cache.check(view_config(cfg), spec.fill, shards=urls, digest=digest)
    return caches
