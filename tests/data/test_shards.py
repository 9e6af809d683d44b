"""Shard lists, reading whole and broken tars from every kind of source, and the endless stream."""

from __future__ import annotations

import gzip
import itertools
import shutil
import sys
import types
from pathlib import Path

import pytest
import webdataset

from vlmkd.data.shards import (
    RawSample,
    ShardStream,
    check_count,
    expand,
    known_samples,
    read_shard,
    shard_name,
)
from vlmkd.errors import UserError


def plain(samples) -> list[tuple[str, dict[str, bytes], str]]:
    return [(sample.key, sample.members, sample.reason) for sample in samples]


# ------------------------------------------------------------------------------------------------- lists of shards


def test_expand_keeps_order_of_braces_globs_and_remote_names(make_shards, tmp_path):
    make_shards([1, 1, 1])
    folder = tmp_path / "shards"
    assert expand([f"{folder}/{{002..000}}.tar"], "s") == [f"{folder}/00{i}.tar" for i in (2, 1, 0)]
    assert expand([f"{folder}/*.tar", "https://h/{0,1}.tar"], "s") == [
        *(f"{folder}/00{i}.tar" for i in (0, 1, 2)),
        "https://h/0.tar",
        "https://h/1.tar",
    ]
    assert expand(["pipe:cat a{0..1}.tar"], "s") == ["pipe:cat a0.tar", "pipe:cat a1.tar"]


def test_expand_asks_the_embedded_data_for_its_shards(monkeypatch):
    embedded = types.ModuleType("vlmkd.datasets.emoji")
    embedded.resolve = lambda name: [f"/cache/{name[6:]}-0.tar", f"/cache/{name[6:]}-1.tar"]
    monkeypatch.setitem(sys.modules, "vlmkd.datasets.emoji", embedded)
    assert expand(["emoji:train"], "s") == ["/cache/train-0.tar", "/cache/train-1.tar"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "data.sources.0.shards is empty"),
        (["{folder}/{{0..3}}.tar"], "no file matches .*0.tar"),
        (["{folder}/*.tar"], "no file matches"),
        (["{folder}"], r"is a folder; name its shards: .*\*\.tar"),
    ],
)
def test_expand_refuses_what_is_not_there(entries, message, tmp_path):
    with pytest.raises(UserError, match=message):
        expand([entry.format(folder=tmp_path) for entry in entries], "data.sources.0.shards")


def test_too_few_shards_are_refused_with_numbers_and_a_mend_that_works():
    check_count(8, 2, 4, "shards")
    with pytest.raises(
        UserError,
        match="has 7 shards, but 2 ranks x 4 workers need 8; set data.workers=3 or re-shard .*--num-shards 8",
    ):
        check_count(7, 2, 4, "shards")
    check_count(7, 2, 3, "shards")
    with pytest.raises(
        UserError, match="has 1 shards, but 2 ranks x 1 workers need 2; use at most 1 ranks or"
    ):
        check_count(1, 2, 0, "shards")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("a/b/00001.tar", "00001"),
        ("https://host/x/00001.tar?sig=a/b.c", "00001"),
        ("pipe:curl -s 'https://host/x/00007.tar'", "00007"),
        ("a/b.tar.gz", "b"),
    ],
)
def test_shard_name(url, name):
    assert shard_name(url) == name


def test_known_samples_needs_every_shard_in_sizes_json(make_shards, tmp_path):
    shards = make_shards([2, 3])
    assert known_samples(shards) is None
    (tmp_path / "shards" / "sizes.json").write_text('{"000.tar": 2, "001.tar": 3}')
    assert known_samples(shards) == 5
    (tmp_path / "shards" / "sizes.json").write_text('{"000.tar": 2}')
    assert known_samples(shards) is None


# --------------------------------------------------------------------------------------------- samples of one shard


def test_grouping_equals_webdataset(write_tar, tmp_path):
    members = [
        ("__meta__", b"m"),
        ("a.jpg", b"1"),
        ("a.TXT", b"2"),
        ("a.seg.png", b"3"),
        ("dir/b.c/x.jpg", b"4"),
        ("dir/b.c/x.txt", b"5"),
        ("._x.jpg", b"6"),
        ("noextension", b"7"),
        ("z.txt", b"8"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    oracle = []
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        oracle.append((sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")}, ""))
    assert plain(read_shard(str(path))) == oracle
    assert [key for key, _, _ in oracle] == ["a", "dir/b.c/x", "z"]


def test_only_wanted_members_are_kept_and_skipping_gives_the_tail(make_shards):
    [path] = make_shards([5])
    whole = plain(read_shard(path))
    for skip in range(7):
        assert plain(read_shard(path, skip=skip)) == whole[skip:]
    assert [set(members) for _, members, _ in plain(read_shard(path, frozenset({"txt"})))] == [{"txt"}] * 5


def test_a_tar_cut_anywhere_is_told_once_and_loses_only_what_was_cut(make_shards, tmp_path):
    [path] = make_shards([3])
    data = Path(path).read_bytes()
    whole = plain(read_shard(path))
    content = len(data.rstrip(b"\0")) // 512 * 512 + 512  # the end mark starts here
    cut = tmp_path / "cut.tar"
    for length in [*range(0, content + 1, 512), *range(100, content, 1711)]:
        cut.write_bytes(data[:length])
        got = plain(read_shard(str(cut)))
        assert got[-1] == ("", {}, "broken_tar"), length
        assert got[:-1] == whole[: len(got) - 1], length
        assert len(got) <= 3
        for skip in range(len(got) + 1):  # positions stay exact, so a resumed stream finds the same samples
            assert plain(read_shard(str(cut), skip=skip)) == got[skip:]
    cut.write_bytes(data[: content + 512])
    assert plain(read_shard(str(cut))) == whole


def test_garbage_inside_a_tar_is_told(make_shards, tmp_path):
    [path] = make_shards([3])
    data = bytearray(Path(path).read_bytes())
    header = data.index(b"0001.jpg")
    data[header : header + 512] = b"\xaa" * 512
    (tmp_path / "bad.tar").write_bytes(data)
    got = list(read_shard(str(tmp_path / "bad.tar")))
    assert [sample.reason for sample in got] == ["broken_tar"]
    assert "bad header" in got[0].detail or "invalid header" in got[0].detail


@pytest.mark.parametrize("content", [b"", b"this is no tar archive at all" * 100])
def test_a_file_that_is_no_tar_is_told(content, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    assert [sample.reason for sample in read_shard(str(tmp_path / "x.tar"))] == ["broken_tar"]
    assert [sample.reason for sample in read_shard(str(tmp_path / "gone.tar"))] == ["broken_tar"]


def test_gzipped_shards_whole_and_cut(make_shards, tmp_path):
    [path] = make_shards([3])
    packed = gzip.compress(Path(path).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(packed)
    assert plain(read_shard(str(tmp_path / "a.tar.gz"))) == plain(read_shard(path))
    (tmp_path / "b.tar.gz").write_bytes(packed[: len(packed) // 2])
    assert list(read_shard(str(tmp_path / "b.tar.gz")))[-1].reason == "broken_tar"


def test_duplicate_keys_near_and_far(write_tar, pair, tmp_path):
    path = write_tar(tmp_path / "a.tar", [*pair(0, 0), *pair(0, 0), *pair(0, 1), *pair(0, 0)])
    got = list(read_shard(str(path)))
    assert [(sample.key, sample.reason) for sample in got] == [
        ("0000", ""),
        ("0000", "duplicate_key"),
        ("0001", ""),
        ("0000", "duplicate_key"),
    ]
    assert plain(read_shard(str(path), skip=3)) == plain(got[3:])


# --------------------------------------------------------------------------------------------------- remote shards


def test_http_equals_local_and_survives_hang_ups_and_busy_servers(make_shards, server, tmp_path):
    [path] = make_shards([40])
    whole = plain(read_shard(path))
    url = server.url("shards/000.tar")
    assert plain(read_shard(url)) == whole
    server.failures = 2
    assert plain(read_shard(url)) == whole
    server.requests.clear()
    server.hang_ups, server.hang_up_after = 3, 17_000
    assert plain(read_shard(url)) == whole
    assert [start for _, start in server.requests] == [0, 17_000, 34_000, 51_000]
    server.ranges = False
    server.hang_ups = 2
    assert plain(read_shard(url)) == whole


def test_http_that_stays_down_or_lacks_the_shard_is_told(make_shards, server):
    make_shards([3])
    [sample] = read_shard(server.url("shards/999.tar"))
    assert sample.reason == "broken_tar" and "404" in sample.detail
    assert len(server.requests) == 1  # a missing file is not asked for again
    server.hang_ups, server.hang_up_after = 1000, 0
    [sample] = read_shard(server.url("shards/000.tar"))
    assert sample.reason == "broken_tar" and "closed at byte 0" in sample.detail


def test_shard_cache_downloads_once_and_never_keeps_a_torn_file(make_shards, server, tmp_path):
    [path] = make_shards([40])
    url, cache = server.url("shards/000.tar"), tmp_path / "cache"
    server.hang_ups, server.hang_up_after = 1000, 20_000
    server.ranges = False
    assert [sample.reason for sample in read_shard(url, shard_cache=str(cache))] == ["broken_tar"]
    assert list(cache.iterdir()) == []
    server.hang_ups = 0
    assert plain(read_shard(url, shard_cache=str(cache))) == plain(read_shard(path))
    server.requests.clear()
    assert plain(read_shard(url, shard_cache=str(cache), skip=38)) == plain(read_shard(path))[38:]
    assert server.requests == []


def test_shard_cache_that_cannot_be_written_is_the_users_to_mend(server, make_shards, tmp_path):
    make_shards([1])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="data.shard_cache: .* cannot be written"):
        list(read_shard(server.url("shards/000.tar"), shard_cache=str(tmp_path / "file" / "cache")))


def test_pipe_equals_local_and_a_failing_command_is_told(make_shards):
    [path] = make_shards([40])
    assert plain(read_shard(f"pipe:cat {path}")) == plain(read_shard(path))
    got = list(read_shard(f"pipe:cat {path}; exit 3"))
    assert [sample.reason for sample in got] == [""] * 39 + ["broken_tar"]
    assert "exit code 3" in got[-1].detail
    assert list(read_shard(f"pipe:head -c 30000 {path}"))[-1].reason == "broken_tar"
    samples = read_shard(f"pipe:cat {path}; sleep 60")
    next(samples)
    samples.close()  # returns at once, without waiting for the command


# -------------------------------------------------------------------------------------------------- endless stream


def fake_read(sizes: dict[str, int]):
    def read(url: str, *, skip: int):
        for index in range(skip, sizes[url]):
            yield RawSample(url, str(index))

    return read


def stream(
    sizes: dict[str, int], worker: int = 0, workers: int = 1, shuffle: int = 7, state=None
) -> ShardStream:
    return ShardStream(
        list(sizes), fake_read(sizes), salt="s", worker=worker, workers=workers, shuffle=shuffle, state=state
    )


SIZES = {f"s{i}": 3 + i % 4 for i in range(9)}


def test_every_pass_gives_every_sample_once_over_all_workers():
    for workers in (1, 2, 4):
        for epoch in range(3):
            names = []
            for worker in range(workers):
                source = stream(SIZES, worker, workers)
                while True:
                    sample = next(source)
                    if sample.position[0] > epoch:
                        break
                    if sample.position[0] == epoch:
                        names.append(sample.name)
            assert sorted(names) == sorted(f"{url}/{i}" for url, n in SIZES.items() for i in range(n))


def test_order_is_shuffled_differs_by_epoch_and_stays_within_its_block():
    total, size = sum(SIZES.values()), 7
    source = stream(SIZES, shuffle=size)
    passes = [[next(source) for _ in range(total)] for _ in range(2)]
    orders = [[sample.name for sample in taken] for taken in passes]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    unshuffled = [sample.name for sample in itertools.islice(stream(SIZES, shuffle=1), total)]
    places = [unshuffled.index(name) for name in orders[0]]
    assert places != sorted(places)
    assert all(place // size == index // size for index, place in enumerate(places))


def test_holds_no_more_samples_than_the_buffer():
    source = stream(SIZES, shuffle=7)
    for _ in range(100):
        next(source)
        held = sum(sample is not None for sample in source._current) + len(source._ahead)
        assert held <= 7


@pytest.mark.parametrize("shuffle", [0, 1, 7, 1000])
def test_a_stream_resumed_anywhere_continues_exactly(shuffle):
    source = stream(SIZES, 1, 2, shuffle)
    states, taken = [source.state_dict()], []
    for _ in range(120):
        taken.append((next(source)).name)
        states.append(source.state_dict())
    for at in range(0, 120, 7):
        resumed = stream(SIZES, 1, 2, shuffle, states[at])
        assert [next(resumed).name for _ in range(120 - at)] == taken[at:], at
        assert resumed.state_dict() == states[-1]


def test_resume_reads_no_earlier_shard():
    source = stream(SIZES, shuffle=4)
    for _ in range(60):
        next(source)
    opened = []

    def read(url: str, *, skip: int):
        opened.append((url, skip))
        return fake_read(SIZES)(url, skip=skip)

    state = source.state_dict()
    resumed = ShardStream(list(SIZES), read, salt="s", worker=0, workers=1, shuffle=4, state=state)
    epoch, ordinal, index = state["start"]
    assert epoch > 0 and opened[0] == (list(SIZES)[resumed.epoch_order(epoch)[ordinal]], index)


def test_shards_without_samples_do_not_spin_for_ever():
    with pytest.raises(UserError, match="2 shards hold no samples at all"):
        stream({"a": 0, "b": 0})
    assert next(stream({"a": 0, "b": 1})).name == "b/0"


def test_raw_positions_count_bad_samples(make_shards, tmp_path):
    shards = make_shards([4, 4])
    data = Path(shards[0]).read_bytes()
    Path(shards[0]).write_bytes(data[: data.index(b"0002.jpg") + 600])
    source = ShardStream(shards, read_shard, salt="s", worker=0, workers=1, shuffle=1)
    reasons = [next(source).reason for _ in range(14)]
    assert reasons.count("broken_tar") == 2
    assert source.passes == 1  # 3 + 4 raw samples a pass


def test_local_copy_with_same_name_is_the_same_stream(make_shards, tmp_path):
    shards = make_shards([3, 3, 3])
    moved = [shutil.copy(path, tmp_path / Path(path).name) for path in shards]
    first, second = (
        ShardStream(list(map(str, urls)), read_shard, salt="s", worker=0, workers=1, shuffle=5)
        for urls in (shards, moved)
    )
    assert [next(first).name for _ in range(20)] == [next(second).name for _ in range(20)]
