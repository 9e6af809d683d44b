"""The drawn data set: deterministic, resumable, divided among ranks, and true to its captions."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from vlmkd.config import DataConfig
from vlmkd.data.loader import build_loader
from vlmkd.data.synthetic import DrawnPair
from vlmkd.image_spec import ImageSpec


def build(spec, tokenizer, **fields):
    options = {"seed": 0, "rank": 0, "world_size": 1, **fields}
    cfg = DataConfig(kind="synthetic", synthetic_samples=24, flip=0.0, color_jitter=0.1)
    return build_loader(cfg, micro_batch_size=4, image_spec=spec, tokenizer=tokenizer, **options)


def test_the_caption_says_what_is_drawn():
    captions = set()
    for index in range(60):
        members = DrawnPair(0, index, "png", "txt").members()
        image, text = Image.open(io.BytesIO(members["png"])), members["txt"].decode()
        captions.add(text)
        color, place = text.removeprefix("a ").split(" square at the ")
        mask = (np.asarray(image) == np.array(ImageColor.getrgb(color))).all(-1)
        rows, columns = np.nonzero(mask)
        half = ("left", "right")[round(columns.mean() // 32)]
        assert f"{('top', 'bottom')[round(rows.mean() // 32)]} {half}" == place
    assert len(captions) > 25


def test_stream_is_deterministic_resumable_and_every_epoch_is_whole(spec, tokenizer):
    batches = list(itertools.islice(build(spec, tokenizer), 12))
    for start in (0, 6):
        assert len({key for batch in batches[start : start + 6] for key in batch["keys"]}) == 24
    assert [b["keys"] for b in batches[:6]] != [b["keys"] for b in batches[6:]]
    loader = build(spec, tokenizer)
    list(itertools.islice(loader, 5))
    resumed = build(spec, tokenizer)
    resumed.load_state_dict(loader.state_dict())
    for expected, batch in zip(batches[5:8], resumed, strict=False):
        assert expected["keys"] == batch["keys"] and torch.equal(expected["images"], batch["images"])
    assert batches[0]["positions"] == {"worker": 0, "raw": 4}
    other = next(iter(build(spec, tokenizer, seed=1)))
    assert not torch.equal(other["images"], batches[0]["images"])


def test_ranks_share_an_epoch(spec, tokenizer):
    keys = [
        key
        for rank in range(2)
        for batch in itertools.islice(build(spec, tokenizer, rank=rank, world_size=2), 3)
        for key in batch["keys"]
    ]
    assert len(set(keys)) == 24


@pytest.mark.parametrize("size", [(20, 20), (16, 16)])
def test_teachers_get_their_views(size, spec, tokenizer):
    teacher = ImageSpec(size=size, mean=(0, 0, 0), std=(1, 1, 1))
    batch = next(iter(build(spec, tokenizer, teacher_views=[(teacher, None)])))
    assert (batch["teacher_images"][0] is None) == (size == spec.size)
    assert build(spec, tokenizer).samples_per_epoch == 24
