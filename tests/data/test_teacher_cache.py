"""Stored teacher embeddings: what is written, that the loader replays the very same view, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data_tools.embed_teacher import embed_shards
from vlmkd.config import DataConfig, SourceConfig
from vlmkd.data.decode import decode
from vlmkd.data.loader import build_loader
from vlmkd.data.shards import read_shard
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.data.transforms import View, ViewConfig, normalise, render
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

TEACHER_SPEC = ImageSpec(size=(12, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
VIEWS = {"crop_scale": [0.3, 0.6], "flip": 0.5, "color_jitter": 0.3}


class StubTeacher:
    """A linear map of the pixels; texts by their bytes. Counts its calls."""

    def __init__(self, spec: ImageSpec = TEACHER_SPEC, width: int = 8, seed: int = 0) -> None:
        self.image_spec, self.logit_scale = spec, 42.0
        generator = torch.Generator().manual_seed(seed)
        self._image = torch.randn(3 * spec.size[0] * spec.size[1], width, generator=generator)
        self._text = torch.randn(256, width, generator=generator)
        self.images = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return F.normalize(images.flatten(1) @ self._image, dim=-1)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return F.normalize(torch.stack([self._text[list(text.encode())].sum(0) for text in texts]), dim=-1)


def embed(shards, out, teacher=None, crops=3, digest="d" * 64, seed=5, views=VIEWS, **options):
    data = DataConfig(**views)
    return embed_shards(
        teacher or StubTeacher(),
        shards,
        out,
        source="stub",
        digest=digest,
        data=data,
        crops=crops,
        seed=seed,
        **options,
    )


def build(shards, caches, spec, tokenizer, *, digests=None, workers=0, views=VIEWS, **fields):
    cfg = DataConfig(
        sources=[SourceConfig(shards=shards, teacher_caches=[str(cache) for cache in caches])],
        workers=workers, shuffle_buffer=7, max_bad_share=0.5, **views, **fields,
    )  # fmt: skip
    return build_loader(
        cfg, seed=1, rank=0, world_size=1, micro_batch_size=5, image_spec=spec, tokenizer=tokenizer,
        teacher_digests=digests,
    )  # fmt: skip


def files_of(shards) -> dict[str, tuple[bytes, bytes]]:
    return {raw.name: (raw.members["jpg"], raw.members["txt"]) for url in shards for raw in read_shard(url)}


def test_files_hold_what_the_teacher_says_of_the_stored_views(make_shards, tmp_path):
    shards = make_shards([7, 4])
    teacher = StubTeacher()
    assert embed(shards, tmp_path / "cache", teacher, batch_size=4) == {}
    assert teacher.images == 3 * 11
    tensors = load_file(tmp_path / "cache" / "000.safetensors")
    assert {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != "keys"
    } == {
        "image_embeds": (torch.float16, (7, 3, 8)),
        "text_embeds": (torch.float16, (7, 8)),
        "boxes": (torch.int32, (7, 3, 4)),
        "flips": (torch.uint8, (7, 3)),
        "jitter": (torch.float32, (7, 3, 3)),
        "digests": (torch.uint8, (7, 32)),
    }
    keys = bytes(tensors["keys"].tolist()).decode().split("\n")
    files = files_of(shards)
    config = ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.5, 0.3)
    for row, key in enumerate(keys):
        image, text = files[f"000/{key}"]
        assert bytes(tensors["digests"][row].tolist()) == hashlib.sha256(image + text).digest()
        expected = teacher.encode_text([text.decode()])[0]
        torch.testing.assert_close(tensors["text_embeds"][row].float(), expected, rtol=0, atol=1e-3)
        for number in range(3):
            view = config.draw(40, 30, random.Random(f"5/000/{key}/{number}"))
            assert tensors["boxes"][row, number].tolist() == list(view.box)
            pixels = normalise([render(decode(image), view, TEACHER_SPEC)], TEACHER_SPEC)
            expected = teacher.encode_image(pixels)[0]
            torch.testing.assert_close(
                tensors["image_embeds"][row, number].float(), expected, rtol=0, atol=1e-3
            )
    info = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert info["info"]["logit_scale"] == 42.0 and info["info"]["digest"] == "d" * 64
    second = b"".join(hashlib.sha256(b"".join(files[f"001/000{number}"])).digest() for number in range(4))
    assert info["parts"]["001"] == {"samples": 4, "digest": hashlib.sha256(second).hexdigest()}


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_replays_the_crop_and_gives_the_embedding_of_exactly_that_crop(
    workers, make_shards, tmp_path, spec, tokenizer
):
    """The teacher is asked again about the student's own view: it must say what the cache says."""
    shards = make_shards([8, 8])
    same = StubTeacher(spec)
    embed(shards, tmp_path / "cache", same)
    picks, files = set(), files_of(shards)
    for batch in itertools.islice(build(shards, [tmp_path / "cache"], spec, tokenizer, workers=workers), 9):
        [images], [texts] = batch["teacher_image_embeds"], batch["teacher_text_embeds"]
        assert images.dtype == torch.float32
        torch.testing.assert_close(images.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(images, same.encode_image(batch["images"]), rtol=0, atol=1e-3)
        captions = [files[key][1].decode() for key in batch["keys"]]
        torch.testing.assert_close(texts, same.encode_text(captions), rtol=0, atol=1e-3)
        picks.update((key, round(float(row[0]), 3)) for key, row in zip(batch["keys"], images, strict=True))
    assert len(picks) > 20  # 16 samples, 45 draws: different crops of the same sample come


def test_a_teacher_of_another_size_saw_the_same_boxes(make_shards, tmp_path, spec, tokenizer):
    shards = make_shards([8])
    embed(shards, tmp_path / "a", StubTeacher(), seed=5)
    embed(shards, tmp_path / "b", StubTeacher(spec, width=6, seed=1), seed=5)
    loader = build(shards, [tmp_path / "a", tmp_path / "b"], spec, tokenizer)
    [batch] = itertools.islice(loader, 1)
    assert [tensor.shape for tensor in batch["teacher_image_embeds"]] == [(5, 8), (5, 6)]
    again = StubTeacher(spec, width=6, seed=1).encode_image(batch["images"])
    torch.testing.assert_close(batch["teacher_image_embeds"][1], again, rtol=0, atol=1e-3)
    embed(shards, tmp_path / "c", StubTeacher(), seed=6)
    with pytest.raises(UserError, match="different crops of 000/000.*same --seed, --crops and crop options"):
        next(iter(build(shards, [tmp_path / "a", tmp_path / "c"], spec, tokenizer)))


def test_large_photos_are_decoded_small_but_replayed_exactly(
    write_tar, encoded_image, tmp_path, spec, tokenizer
):
    shard = str(write_tar(tmp_path / "p.tar", [("a.jpg", encoded_image(1, (900, 700))), ("a.txt", b"a")]))
    teacher = StubTeacher(spec)
    embed([shard], tmp_path / "cache", teacher, crops=4)
    entry = TeacherOutputs(tmp_path / "cache").get("a", "p")
    assert all(edge % 2 == 0 for view in entry.views for edge in view.box)
    for batch in itertools.islice(build([shard], [tmp_path / "cache"], spec, tokenizer), 2):
        expected = teacher.encode_image(batch["images"])
        torch.testing.assert_close(batch["teacher_image_embeds"][0], expected, rtol=0, atol=5e-3)


def test_resume_with_a_cache_is_exact(make_shards, tmp_path, spec, tokenizer):
    shards = make_shards([8, 8])
    embed(shards, tmp_path / "cache")
    loader = build(shards, [tmp_path / "cache"], spec, tokenizer)
    list(itertools.islice(loader, 4))
    state = loader.state_dict()
    expected = list(itertools.islice(loader, 5))
    resumed = build(shards, [tmp_path / "cache"], spec, tokenizer)
    resumed.load_state_dict(state)
    for a, b in zip(expected, itertools.islice(resumed, 5), strict=True):
        assert a["keys"] == b["keys"] and torch.equal(a["images"], b["images"])
        assert torch.equal(a["teacher_image_embeds"][0], b["teacher_image_embeds"][0])


def test_an_interrupted_embedding_continues_and_equals_a_straight_one(make_shards, tmp_path):
    shards = make_shards([5, 5, 5])

    class Interrupted(StubTeacher):
        def encode_image(self, images):
            if self.images >= 15:
                raise KeyboardInterrupt
            return super().encode_image(images)

    embed(shards, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        embed(shards, tmp_path / "cache", Interrupted(), batch_size=15)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["000.safetensors", "cache.json"]
    lines, teacher = [], StubTeacher()
    embed(shards, tmp_path / "cache", teacher, progress=lines.append)
    assert teacher.images == 2 * 15
    assert [line.split(",")[0] for line in lines] == ["shard 2/3 001: 5 samples", "shard 3/3 002: 5 samples"]
    assert all("ETA" in line for line in lines)
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()
    embed(shards, tmp_path / "cache", teacher)
    assert teacher.images == 30  # nothing left to do


def test_bad_samples_are_left_out_counted_and_skipped_by_the_loader(make_shards, tmp_path, spec, tokenizer):
    def spoil(shard, number, members):
        return [(members[0][0], members[0][1][:100]), members[1]] if number == 2 else None

    shards = make_shards([6], spoil)
    assert embed(shards, tmp_path / "cache") == {"undecodable_image": 1}
    longer = make_shards([9], spoil)
    assert longer == shards
    loader = build(shards, [tmp_path / "cache"], spec, tokenizer, workers=1)
    batches = list(itertools.islice(loader, 4))
    assert {key for batch in batches for key in batch["keys"]} == {f"000/000{i}" for i in (0, 1, 3, 4, 5)}
    # The truncated picture itself is not in the cache either, and that is found out first.
    assert loader.skipped.keys() == {"missing_teacher_embedding"}


def test_a_broken_shard_is_not_embedded(make_shards, tmp_path):
    [shard] = make_shards([6])
    Path(shard).write_bytes(Path(shard).read_bytes()[:5000])
    with pytest.raises(UserError, match="shard .*000.tar: .* is broken; fetch it again"):
        embed([shard], tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache.json"]


def test_changed_samples_are_refused_by_name(make_shards, tmp_path, spec, tokenizer):
    shards = make_shards([6])
    embed(shards, tmp_path / "cache")
    make_shards(
        [6], lambda shard, number, members: [members[0], (members[1][0], b"other")] if number == 4 else None
    )
    with pytest.raises(
        UserError, match="cache was written for another image or caption than 000/0004 has now"
    ):
        list(itertools.islice(build(shards, [tmp_path / "cache"], spec, tokenizer, workers=1), 4))


def test_what_does_not_fit_the_run_is_named(make_shards, tmp_path, spec, tokenizer):
    shards = make_shards([3, 3])
    embed(shards, tmp_path / "cache")

    def refused(message, *, use=shards, digests=None, views=VIEWS, student=spec):
        with pytest.raises(UserError, match=message):
            build(use, [tmp_path / "cache"], student, tokenizer, digests=digests, views=views)

    build(shards, [tmp_path / "cache"], spec, tokenizer, digests=["d" * 64])
    refused("digest eeeeeeeeeeee..., the outputs are of stub with dddddddddddd", digests=["e" * 64])
    refused(
        r"data.crop_scale is \[0.4, 0.6\] but the views were drawn with \[0.3, 0.6\]",
        views={**VIEWS, "crop_scale": [0.4, 0.6]},
    )
    refused(
        "data.flip is 0.0 but the views were drawn with 0.5.*; data.color_jitter is 0.1",
        views={**VIEWS, "flip": 0.0, "color_jitter": 0.1},
    )
    white = ImageSpec(size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1), fill=(255, 255, 255))
    refused(r"lays transparent images on \(255, 255, 255\), the teacher on \(0, 0, 0\)", student=white)
    more = make_shards([3, 3, 3])
    refused("1 of 3 shards are not in it .first: .*002.tar", use=more)
    refused("name \\[1\\] caches for 2 teachers", digests=["d" * 64, "d" * 64])


def test_damaged_caches_are_refused(make_shards, tmp_path, spec, tokenizer):
    shards = make_shards([6])
    with pytest.raises(UserError, match="have no cache.json; write one with"):
        build(shards, [tmp_path / "nothing"], spec, tokenizer)
    embed(shards, tmp_path / "cache")
    info = (tmp_path / "cache" / "cache.json").read_text()
    (tmp_path / "cache" / "cache.json").write_text(info.replace('"version": 2', '"version": 99'))
    with pytest.raises(UserError, match="have version 99, this code reads 2"):
        build(shards, [tmp_path / "cache"], spec, tokenizer)
    (tmp_path / "cache" / "cache.json").write_text(info[:50])
    with pytest.raises(UserError, match="cache.json is not valid JSON"):
        build(shards, [tmp_path / "cache"], spec, tokenizer)
    (tmp_path / "cache" / "cache.json").write_text(info)
    file = tmp_path / "cache" / "000.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="000.safetensors cannot be read .*delete the file and embed again"):
        next(iter(build(shards, [tmp_path / "cache"], spec, tokenizer)))


def test_every_source_needs_its_caches(make_shards, tmp_path, spec, tokenizer):
    shards = make_shards([3])
    embed(shards, tmp_path / "cache")
    sources = [
        SourceConfig(shards=shards, teacher_caches=[str(tmp_path / "cache")]),
        SourceConfig(shards=shards),
    ]
    with pytest.raises(
        UserError, match=r"sources name \[0, 1\] caches; every source needs one per teacher, or all none"
    ):
        build_loader(
            DataConfig(sources=sources, workers=0), seed=1, rank=0, world_size=1, micro_batch_size=5,
            image_spec=spec, tokenizer=tokenizer,
        )  # fmt: skip


def test_a_folder_of_another_cache_is_not_mixed_up(make_shards, tmp_path):
    shards = make_shards([3])
    embed(shards, tmp_path / "cache")
    with pytest.raises(UserError, match="holds outputs made with crops 3 .now 2.; name another folder"):
        embed(shards, tmp_path / "cache", crops=2)
    with pytest.raises(UserError, match="digest dd.* .now ee.*; name another folder"):
        embed(shards, tmp_path / "cache", digest="e" * 64)
    (tmp_path / "cache" / "cache.json").unlink()
    with pytest.raises(UserError, match="has safetensors files but no cache.json"):
        embed(shards, tmp_path / "cache")
    with pytest.raises(UserError, match="names 000.tar 2 times; a folder needs distinct file names"):
        embed(shards * 2, tmp_path / "other")


def test_views_survive_storage_exactly(make_shards, tmp_path):
    shards = make_shards([4])
    embed(shards, tmp_path / "cache")
    cache = TeacherOutputs(tmp_path / "cache")
    config = ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.5, 0.3)
    for number in range(4):
        entry = cache.get(f"000{number}", "000")
        assert entry.views == [config.draw(40, 30, random.Random(f"5/000/000{number}/{k}")) for k in range(3)]
        assert all(isinstance(view, View) for view in entry.views)
    assert cache.get("9999", "000") is None
    assert cache.info.image_spec == TEACHER_SPEC and cache.info.views == config and cache.info.dim == 8
