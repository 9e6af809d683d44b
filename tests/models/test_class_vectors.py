"""Class vectors: every normalisation against float64, the digest, refusals, and open_clip's own classifier."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor

NAMES = ["hot dog", "school_bus", "goose", "daisy", "tench"]
TEMPLATES = ["a photo of a {}.", "art of the {c}", "{} texture."]
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> ClipPredictor:
    path = tmp_path_factory.mktemp("clip") / "model.json"
    path.write_text(json.dumps(CONFIG))
    return ClipPredictor.of(load_clip(str(path), seed=0), "tiny")


def features(predictor: ClipPredictor) -> Tensor:
    """Raw text features [C, P, D] in float64, one prompt at a time."""
    model = predictor._encoder.model
    rows = []
    for name in NAMES:
        for template in TEMPLATES:
            text = template.replace("{c}", "{}").replace("{}", name.replace("_", " "))
            with torch.no_grad():
                rows.append(model.encode_text(open_clip.tokenize([text], context_length=16))[0].double())
    return torch.stack(rows).view(len(NAMES), len(TEMPLATES), -1)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("mode", ["each_and_mean", "each", "mean", "none"])
@pytest.mark.parametrize("batch_size", [2, 256])
def test_modes_against_float64(predictor: ClipPredictor, mode: str, batch_size: int) -> None:
    raw = features(predictor)
    expected = (unit(raw) if mode.startswith("each") else raw).mean(dim=1)
    if mode.endswith("mean"):
        expected = unit(expected)
    found = encode_classes(predictor, NAMES, TEMPLATES, mode, teacher_digest="d", batch_size=batch_size)
    torch.testing.assert_close(found.vectors.double(), expected, rtol=1e-5, atol=1e-6)
    norms = found.vectors.norm(dim=1)
    assert bool(((norms - 1).abs() < 1e-5).all()) == mode.endswith("mean")  # the four modes do differ


def test_equals_open_clips_classifier(predictor: ClipPredictor) -> None:
    model = predictor._encoder.model
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=16)
    templates = [lambda c, t=t: t.replace("{c}", "{}").format(c) for t in TEMPLATES]
    names = [name.replace("_", " ") for name in NAMES]
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    found = encode_classes(predictor, NAMES, TEMPLATES, teacher_digest="d")
    torch.testing.assert_close(found.vectors, weights.T, rtol=0, atol=1e-6)
    images = unit(torch.randn(4, 24, generator=torch.Generator().manual_seed(0)))
    expected = images.double() @ weights.double() / 0.07
    torch.testing.assert_close(found.logits(images).double(), expected, rtol=1e-4, atol=1e-4)


def make() -> ClassVectors:
    vectors = unit(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    return ClassVectors(
        vectors=vectors,
        class_names=["a", "b", "ü c"],
        templates=["{}"],
        teacher="t",
        teacher_digest="x",
        logit_scale=50.0,
    )


def test_digest_depends_on_all_that_makes_the_vectors() -> None:
    vectors = make()
    changes: list[dict[str, object]] = [
        {"class_names": ["b", "a", "ü c"]},
        {"templates": ["a {}"]},
        {"teacher_digest": "y"},
        {"normalise": "each"},
    ]
    digests = {dataclasses.replace(vectors, **change).digest for change in changes} | {vectors.digest}
    assert len(digests) == 5
    assert dataclasses.replace(vectors, teacher="another name for it").digest == vectors.digest


def test_save_and_load(tmp_path: Path) -> None:
    vectors, path = make(), tmp_path / "new" / "v.safetensors"
    vectors.save(path)
    again = ClassVectors.load(path, expect_class_names=["a", "b", "ü c"])
    assert torch.equal(again.vectors, vectors.vectors)
    facts = [dataclasses.replace(one, vectors=torch.zeros(3, 4)) for one in (again, vectors)]
    assert str(facts[0]) == str(facts[1])
    assert [entry.name for entry in path.parent.iterdir()] == ["v.safetensors"]
    with pytest.raises(UserError, match=r"class 1 is 'b', but 'd' is asked for"):
        ClassVectors.load(path, expect_class_names=["a", "d", "ü c"])
    with pytest.raises(UserError, match="has 3 classes, but 1 are asked for"):
        ClassVectors.load(path, expect_class_names=["a"])
    with pytest.raises(UserError, match="does not exist"):
        ClassVectors.load(tmp_path / "none")


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    vectors, path = make(), tmp_path / "v.safetensors"
    vectors.save(path)
    path.write_bytes(path.read_bytes().replace(b'\\"t\\"', b'\\"t\\"').replace(b'\\"b\\"', b'\\"z\\"'))
    with pytest.raises(UserError, match="were edited"):
        ClassVectors.load(path)


def test_refusals(predictor: ClipPredictor) -> None:
    with pytest.raises(UserError, match="has no {} or {c}"):
        encode_classes(predictor, NAMES, ["a photo"], teacher_digest="")
    with pytest.raises(UserError, match="templates is empty"):
        encode_classes(predictor, NAMES, [], teacher_digest="")

    class Unit:
        name, logit_scale = "unit", 1.0

        def encode_text(self, texts: list[str]) -> Tensor:
            return torch.ones(len(texts), 1)

    with pytest.raises(UserError, match="which unit is not"):
        encode_classes(Unit(), NAMES, TEMPLATES, "none", teacher_digest="")
    with pytest.raises(UserError, match="not finite"):
        dataclasses.replace(make(), vectors=torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match="need fp32"):
        dataclasses.replace(make(), vectors=torch.zeros(2, 4))
