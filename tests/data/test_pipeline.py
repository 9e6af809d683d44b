"""From raw samples to batches: reasons for dropping, paired views, collation."""

from __future__ import annotations

import io
import random
import struct
import zlib

import pytest
import torch
from PIL import Image

from vlmkd.config import DataConfig
from vlmkd.data.pipelines import ImagePipeline, Sample
from vlmkd.data.samples import BadSample, RawSample, unpack, view_config
from vlmkd.data.transforms import ViewConfig, normalise, render
from vlmkd.image_spec import ImageSpec

CFG = DataConfig(max_pixels=40 * 30)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x"))


def make(cfg: DataConfig, spec: ImageSpec, tokenizer, teachers=()) -> ImagePipeline:
    """The pipeline of a config; `teachers` as input and tokenizer."""
    return ImagePipeline(
        spec, view_config(cfg), tokenizer, image_keys=cfg.image_keys, text_key=cfg.text_key, max_pixels=cfg.max_pixels,
        teacher_specs=[spec for spec, _ in teachers], teacher_tokenizers=[own for _, own in teachers],
    )  # fmt: skip


def process(
    pipeline: ImagePipeline, members: dict[str, bytes], seed: int = 0, **fields
) -> Sample | BadSample:
    try:
        return pipeline.process(RawSample("shard", "key", members, seed=f"{seed}", **fields))
    except BadSample as bad:
        return bad


def collate(pipeline: ImagePipeline, samples: list[Sample]) -> dict:
    return pipeline.collate(samples) | {"positions": {"worker": 0, "raw": len(samples)}}


def test_each_defect_has_its_reason(spec, tokenizer, encoded_image):
    pipeline = make(CFG, spec, tokenizer)
    good = encoded_image(1)
    cases = [
        ({"txt": b"a"}, "missing_image"),
        ({"jpg": good}, "missing_caption"),
        ({"jpg": good, "txt": b" \n"}, "missing_caption"),
        ({"jpg": good[: len(good) // 2], "txt": b"a"}, "undecodable_image"),
        ({"jpg": b"", "txt": b"a"}, "undecodable_image"),
        ({"jpg": encoded_image(1, (41, 30)), "txt": b"a"}, "oversized_image"),
        ({"png": huge_png(30, 40), "txt": b"a"}, "undecodable_image"),
        (
            {"png": huge_png(100_000, 100_000), "txt": b"a"},
            "oversized_image",
        ),  # Pillow itself refuses this one
    ]
    for members, reason in cases:
        bad = process(pipeline, members)
        assert isinstance(bad, BadSample) and bad.reason == reason, (reason, bad)
    assert process(pipeline, {}, reason="broken_tar", detail="why").args == ("broken_tar", "why")
    sample = process(pipeline, {"jpg": good, "txt": b"  caf\xc3\xa9 \xff\n"})
    assert isinstance(sample, Sample) and sample.text == "café \ufffd"


def test_oversized_images_are_never_decoded(spec, tokenizer, monkeypatch):
    from vlmkd.data import samples

    monkeypatch.setattr(samples, "decode", lambda *a, **k: pytest.fail("decoded"))
    bad = process(make(CFG, spec, tokenizer), {"png": huge_png(10_000, 8_000), "txt": b"a"})
    assert bad.args == ("oversized_image", "10000x8000 is more than data.max_pixels=1200")


def test_first_matching_image_key_wins(encoded_image):
    raw = RawSample("s", "k", {"png": b"P", "jpg": b"J", "caption": b"c"})
    assert unpack(raw, ["webp", "png", "jpg"], "caption")[0] == b"P"
    assert unpack(raw, ["jpg", "png"], "caption")[0] == b"J"


def test_teacher_sees_the_same_view_in_its_own_size_and_statistics(spec, tokenizer):
    cfg = DataConfig(crop_scale=[0.3, 0.6], flip=0.5, color_jitter=0.3)
    teacher = ImageSpec(size=(24, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear")
    same_view = ImageSpec(size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1))

    def teacher_tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.full((len(texts), 3), 7)

    pipeline = make(
        cfg, spec, tokenizer, [(teacher, teacher_tokenizer), (None, None), (same_view, tokenizer)]
    )
    pixels = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    samples = [process(pipeline, {"png": file.getvalue(), "txt": b"abc"}, seed) for seed in range(6)]
    batch = collate(pipeline, samples)
    pipeline.check(batch, 6)
    views = [view_config(cfg).draw(70, 50, random.Random(f"{seed}")) for seed in range(6)]
    assert len({view.box for view in views}) == 6 and {view.flip for view in views} == {True, False}
    student = normalise([render(pixels, view, spec) for view in views], spec)
    torch.testing.assert_close(batch["images"], student, rtol=0, atol=0)
    expected = normalise([render(pixels, view, teacher) for view in views], teacher)
    torch.testing.assert_close(batch["teacher_images"][0], expected, rtol=0, atol=0)
    assert batch["teacher_images"][1:] == [
        None,
        None,
    ]  # same size and interpolation: the student's images serve
    assert batch["teacher_tokens"][0].tolist() == [[7, 7, 7]] * 6 and batch["teacher_tokens"][1] is None
    assert torch.equal(batch["teacher_tokens"][2], batch["tokens"])
    assert batch["tokens"][0].tolist() == [3, 32, 97, 98, 99]


def test_no_teacher_keys_without_teachers(spec, tokenizer, encoded_image):
    pipeline = make(CFG, spec, tokenizer)
    batch = pipeline.collate([process(pipeline, {"jpg": encoded_image(1), "txt": b"a"})])
    assert set(batch) == {"images", "tokens", "keys"}
    assert batch["keys"] == ["shard/key"]


def test_transparency_lies_on_the_students_fill(tokenizer):
    file = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(file, "PNG")
    white = ImageSpec(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), fill=(255, 255, 255))
    teacher = ImageSpec(size=(10, 10), mean=(0, 0, 0), std=(1, 1, 1), fill=(0, 0, 0))
    pipeline = make(CFG, white, tokenizer, [(teacher, None)])
    batch = pipeline.collate([process(pipeline, {"png": file.getvalue(), "txt": b"a"})])
    assert batch["images"].min() == 1 and batch["teacher_images"][0].min() == 1


def test_check_batch_names_what_is_wrong(spec, tokenizer, encoded_image):
    pipeline = make(CFG, spec, tokenizer)
    batch = collate(pipeline, [process(pipeline, {"jpg": encoded_image(1), "txt": b"a"})])
    pipeline.check(batch, 1)
    for change, message in [
        ({"images": batch["images"].half()}, "images"),
        ({"images": batch["images"] * float("nan")}, "not finite"),
        ({"tokens": batch["tokens"].int()}, "tokens"),
        ({"keys": []}, "keys"),
        ({"teacher_image_embeds": [torch.zeros(2, 3)]}, "teacher_image_embeds"),
        ({"imagse": 1}, r"unknown \['imagse'\]"),
    ]:
        with pytest.raises(AssertionError, match=message):
            pipeline.check({**batch, **change}, 1)
    with pytest.raises(AssertionError, match="images"):
        pipeline.check(batch, 2)


def test_view_config_takes_the_configs_fields():
    cfg = DataConfig(crop_scale=[0.5, 0.9], crop_ratio=[1.0, 2.0], flip=0.1, color_jitter=0.2)
    assert view_config(cfg) == ViewConfig((0.5, 0.9), (1.0, 2.0), 0.1, 0.2)
