"""The loader: same stream for any start, exact resume, bad samples, several sources, crashes."""

from __future__ import annotations

import io
import itertools
import logging
import os
import platform
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from vlmkd.config import DataConfig, SourceConfig
from vlmkd.data.loader import build_loader, worker_deaths
from vlmkd.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def spoil(shard: int, number: int, members):
    """Samples 3 and 7 of each shard are bad; sample 11 comes twice."""
    if number == 3:
        return [members[0][:1] + (members[0][1][:200],), members[1]]
    if number == 7:
        return members[:1]
    if number == 11:
        return members * 2
    return None


def build(shards, spec, tokenizer, *, batch_size=5, rank=0, world_size=1, seed=1, **fields):
    options = {
        "workers": 0,
        "shuffle_buffer": 13,
        "max_bad_share": 0.3,
        "flip": 0.5,
        "color_jitter": 0.2,
        **fields,
    }
    if "sources" not in options:
        options["sources"] = [SourceConfig(shards=shards)]
    return build_loader(
        DataConfig(**options), seed=seed, rank=rank, world_size=world_size, micro_batch_size=batch_size,
        image_spec=spec, tokenizer=tokenizer,
    )  # fmt: skip


def take(loader, number):
    return list(itertools.islice(loader, number))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, name


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resumed_anywhere_the_batches_are_bit_identical(workers, make_shards, spec, tokenizer, tmp_path):
    shards = make_shards([20] * 6, spoil)
    data = Path(shards[2]).read_bytes()
    Path(shards[2]).write_bytes(data[: len(data) // 2])
    loader = build(shards, spec, tokenizer, workers=workers)
    batches, states, skipped = [], [], []
    for batch in itertools.islice(loader, 45):  # more than two passes
        batches.append(batch)
        torch.save(loader.state_dict(), tmp_path / "state.pt")
        states.append(torch.load(tmp_path / "state.pt", weights_only=True))
        skipped.append(dict(loader.skipped))
    assert set(skipped[-1]) == {
        "broken_tar",
        "undecodable_image",
        "missing_caption",
        "duplicate_key",
    }
    for at in (1, 2, 3, 11, 25, 40):
        resumed = build(shards, spec, tokenizer, workers=workers)
        resumed.load_state_dict(states[at - 1])
        assert resumed.state_dict() == states[at - 1]
        rest = 6 if at < 40 else 5
        assert_same(take(resumed, rest), batches[at : at + rest])
        assert resumed.state_dict() == states[at + rest - 1]
        assert resumed.skipped == skipped[at + rest - 1]


def test_one_worker_process_and_none_give_the_same_stream(make_shards, spec, tokenizer):
    shards = make_shards([20] * 3, spoil)
    assert_same(take(build(shards, spec, tokenizer), 14), take(build(shards, spec, tokenizer, workers=1), 14))


def test_iterating_again_goes_on_and_prefetched_batches_do_not_count(make_shards, spec, tokenizer):
    shards = make_shards([20] * 3)
    loader = build(shards, spec, tokenizer, workers=2)
    parts = [take(loader, 3), take(loader, 1), take(loader, 4)]
    assert loader.state_dict()["delivered"] == 8
    assert_same(sum(parts, []), take(build(shards, spec, tokenizer, workers=2), 8))


def test_seeds_give_other_streams(make_shards, spec, tokenizer):
    shards = make_shards([20] * 3)
    keys = [
        tuple(key for batch in take(build(shards, spec, tokenizer, **fields), 6) for key in batch["keys"])
        for fields in ({}, {"seed": 2})
    ]
    assert len(set(keys)) == 2


def test_ranks_and_workers_share_an_epoch_without_overlap(make_shards, spec, tokenizer):
    shards = make_shards([10] * 8)
    seen = Counter()
    for rank in range(2):
        for batch in take(build(shards, spec, tokenizer, rank=rank, world_size=2, workers=2), 8):
            seen.update(batch["keys"])
    assert len(seen) == 80 and set(seen.values()) == {1}  # 2 ranks x 8 batches x 5 samples are one epoch
    assert batch["positions"] == {"worker": 3, "raw": 20}


def test_the_same_sample_has_another_view_each_epoch(make_shards, spec, tokenizer):
    shards = make_shards([10])
    first, second = take(build(shards, spec, tokenizer, batch_size=10), 2)
    order = [second["keys"].index(key) for key in first["keys"]]
    assert sorted(order) == list(range(10))
    differing = (first["images"] != second["images"][order]).flatten(1).any(1)
    assert differing.all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": 2}, "data.workers changed from 1 to 2"),
        ({"world_size": 2}, "ranks changed from 1 to 2"),
        ({"shuffle_buffer": 5}, "data.shuffle_buffer changed from 13 to 5"),
        ({"seed": 9}, "seed changed from 1 to 9"),
    ],
)
def test_another_layout_starts_afresh_and_says_so(fields, message, make_shards, spec, tokenizer, caplog):
    shards = make_shards([20] * 3, spoil)
    loader = build(shards, spec, tokenizer)
    old = take(loader, 6)
    fresh = [build(shards, spec, tokenizer, **fields) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for other in fresh:
            other.load_state_dict(loader.state_dict())
    assert sum(message in record.getMessage() for record in caplog.records) == 2
    assert fresh[0].skipped == loader.skipped
    batches = take(fresh[0], 4)
    assert_same(batches, take(fresh[1], 4))
    assert [b["keys"] for b in batches] != [b["keys"] for b in old[:4]]
    # The fresh stream can itself be resumed.
    state = fresh[0].state_dict()
    assert state["delivered"] == 10
    again = build(shards, spec, tokenizer, **fields)
    again.load_state_dict(state)
    assert_same(take(again, 3), take(fresh[1], 3))


def test_other_shards_start_afresh(make_shards, spec, tokenizer, caplog):
    shards = make_shards([20] * 3)
    loader = build(shards, spec, tokenizer)
    take(loader, 2)
    other = build(shards[:2], spec, tokenizer)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(loader.state_dict())
    assert "data.sources changed: the data stream starts afresh after batch 2" in caplog.text


def test_sources_are_mixed_by_weight_and_resume_exactly(make_shards, spec, tokenizer):
    sources = [
        SourceConfig(shards=make_shards([30] * 2, folder="a"), weight=3.0),
        SourceConfig(shards=make_shards([30] * 2, folder="b"), weight=1.0),
    ]
    loader = build(None, spec, tokenizer, sources=sources, batch_size=20)
    batches = take(loader, 20)
    state = build(None, spec, tokenizer, sources=sources, batch_size=20)
    take(state, 7)
    resumed = build(None, spec, tokenizer, sources=sources, batch_size=20)
    resumed.load_state_dict(state.state_dict())
    assert_same(take(resumed, 5), batches[7:12])
    given = loader.state_dict()["workers"][0]["stream"]["sources"]
    passes = [source["start"][0] for source in given]
    assert passes[0] >= 3 * passes[1] > 0  # 300 and 100 of 60 samples each
    assert len({key for batch in batches for key in batch["keys"]}) == 60


def test_bad_samples_are_counted_logged_and_named(make_shards, spec, tokenizer, caplog):
    shards = make_shards([20] * 2, spoil)
    loader = build(shards, spec, tokenizer, shuffle_buffer=1)
    with caplog.at_level(logging.WARNING):
        take(loader, 14)
    info = loader.describe()
    assert info["skipped"] == loader.skipped and info["read"] == 70 + sum(loader.skipped.values())
    assert 3 <= loader.skipped["undecodable_image"] <= 4
    assert len(info["first_bad"]) == 5 and "001/0003 (undecodable_image)" in info["first_bad"]
    assert len(caplog.records) == 3  # the first of each reason; the next line would come at 100
    assert info["sources"][0]["shards"] == 2 and info["sources"][0]["samples"] is None


def test_too_many_bad_samples_stop_a_small_set_after_one_pass(make_shards, spec, tokenizer):
    shards = make_shards([20] * 2, spoil)  # 6 of 42
    loader = build(shards, spec, tokenizer, max_bad_share=0.1, shuffle_buffer=1)
    with pytest.raises(
        UserError,
        match=r"data.max_bad_share=0.1: 6 of 42 samples were bad \(duplicate_key \d, missing_caption \d, "
        r"undecodable_image \d\), first 00\d/0003 \(undecodable_image\), .*check_shards.py",
    ):
        take(loader, 30)
    assert 36 <= loader.describe()["read"] <= 60
    take(build(shards, spec, tokenizer, max_bad_share=0.15), 30)


def test_too_many_bad_samples_stop_a_large_set_after_a_thousand(
    write_tar, tmp_path, spec, tokenizer, encoded_image
):
    picture = encoded_image(0, (8, 8))
    members = []
    for number in range(1500):
        members += [(f"{number}.jpg", picture)] + [(f"{number}.txt", b"a")] * (number % 10 != 0)
    shard = str(write_tar(tmp_path / "a.tar", members))
    loader = build([shard], spec, tokenizer, max_bad_share=0.09, batch_size=50, shuffle_buffer=1)
    with pytest.raises(UserError, match="of 1001 samples were bad|of 10[0-5][0-9] samples were bad"):
        take(loader, 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_good_at_all_is_an_error_and_no_endless_search(workers, make_shards, spec, tokenizer):
    shards = make_shards([5] * 2, lambda shard, number, members: members[:1])
    loader = build(shards, spec, tokenizer, workers=workers, max_bad_share=1.0)
    with pytest.raises(
        UserError, match=r"samples in a row were bad \(missing_caption \d+\); last: 00\d/000\d"
    ):
        take(loader, 1)


def test_unreachable_shards_name_the_shard(spec, tokenizer, server):
    urls = [server.url("gone-{0..2}.tar")]
    with pytest.raises(UserError, match=r"samples in a row were bad \(broken_tar \d\); last: gone-\d .*404"):
        take(build(urls, spec, tokenizer), 1)


def test_http_and_pipe_sources_give_the_local_batches(make_shards, spec, tokenizer, server, tmp_path):
    shards = make_shards([12] * 3, spoil)
    local = take(build(shards, spec, tokenizer, workers=1), 8)
    remote = [server.url(f"shards/{Path(path).name}") for path in shards]
    assert_same(local, take(build(remote, spec, tokenizer, workers=1), 8))
    cached = build(remote, spec, tokenizer, workers=1, shard_cache=str(tmp_path / "cache"))
    assert_same(local, take(cached, 8))
    assert_same(local, take(build([f"pipe:cat {path}" for path in shards], spec, tokenizer, workers=1), 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": []}, "data.sources is empty"),
        ({"sources": [SourceConfig()]}, "data.sources.0.shards is empty"),
        ({"workers": 4}, "has 3 shards, but 1 ranks x 4 workers need 4; set data.workers=3"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(fields, message, make_shards, spec, tokenizer):
    with pytest.raises(UserError, match=message):
        build(make_shards([2] * 3), spec, tokenizer, **fields)


def test_a_worker_that_is_killed_ends_the_run(make_shards, spec, tokenizer):
    def killer(texts: list[str]) -> torch.Tensor:
        if get_worker_info() is not None and "picture 1 4" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenizer(texts)

    started = time.monotonic()
    told = "a loader process ended (by signal Killed|before its work was done).*lower data.workers"
    with pytest.raises(UserError, match=told), worker_deaths():
        take(build(make_shards([10] * 2), spec, killer, workers=2), 50)
    assert time.monotonic() - started < 60


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="Caught KeyError in DataLoader worker process 0"), worker_deaths():
        raise RuntimeError("Caught KeyError in DataLoader worker process 0.")
    with pytest.raises(UserError, match="ended before its work was done"), worker_deaths():
        raise EOFError  # what the pipe of a process says that died in the middle of a batch


def test_a_short_run_is_judged_at_its_end(make_shards, spec, tokenizer):
    def loader(share: float):
        return build(make_shards([10] * 2, spoil), spec, tokenizer, max_bad_share=share, batch_size=4)

    lenient, strict = loader(0.5), loader(0.01)
    for one in (lenient, strict):
        while not one.skipped:
            take(one, 1)
    lenient.check_bad_share()
    with pytest.raises(UserError, match=r"data.max_bad_share=0.01: \d of \d+ samples were bad"):
        strict.check_bad_share()


def test_where_none_may_be_bad_the_first_ends_the_run(make_shards, spec, tokenizer):
    loader = build(make_shards([10] * 2, spoil), spec, tokenizer, max_bad_share=0.0, batch_size=4)
    with pytest.raises(UserError, match=r"data.max_bad_share=0.0: 1 of \d+ samples were bad"):
        take(loader, 20)
    assert sum(loader.skipped.values()) == 1


def test_a_command_is_shown_before_a_shell_runs_it(make_shards, spec, tokenizer, caplog):
    (shard,) = make_shards([4])
    build([f"pipe:cat {shard}"], spec, tokenizer, workers=0)
    assert f"a shell will run `cat {shard}`; do so only with configs that you trust" in caplog.text


def test_an_error_in_a_worker_carries_its_message(make_shards, spec):
    def broken(texts: list[str]) -> torch.Tensor:
        raise KeyError("no such token")

    with pytest.raises(KeyError, match="no such token"):
        take(build(make_shards([10] * 2), spec, broken, workers=2), 5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_loader_processes_keep_freed_memory(make_shards, spec):
    sizes = (40_000_000, 60_000_000)

    def faults(texts: list[str]) -> torch.Tensor:
        """Pages that this process has to get anew for memory that it had before."""
        for size in sizes * 4:  # until they have their places among what tests before this one freed
            torch.zeros(size, dtype=torch.uint8).add_(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in sizes:
            torch.zeros(size, dtype=torch.uint8).add_(1)
        return torch.full((len(texts), 1), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    batch = take(build(make_shards([10]), spec, faults, workers=1), 1)[0]
    assert int(batch["tokens"][0, 0]) < sum(sizes) // 4096 // 10


def test_workers_use_one_thread(make_shards, spec):
    def threads(texts: list[str]) -> torch.Tensor:
        return torch.full((len(texts), 1), torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        [batch] = take(build(make_shards([10] * 2), spec, threads, workers=1), 1)
    finally:
        torch.set_num_threads(1)
    assert batch["tokens"].unique().tolist() == [1]


def test_state_is_small_plain_data(make_shards, spec, tokenizer):
    loader = build(make_shards([20] * 3), spec, tokenizer, shuffle_buffer=1000)
    take(loader, 3)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    assert len(file.getvalue()) < 10_000


def test_a_batch_of_the_wrong_shape_is_caught_at_once(make_shards, spec):
    with pytest.raises(AssertionError, match="tokens"):
        take(build(make_shards([10]), spec, lambda texts: torch.zeros(len(texts))), 1)
