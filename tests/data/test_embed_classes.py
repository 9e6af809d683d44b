"""data_tools/embed_classes.py, called the way a user does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_tools import teacher_options
from vlmkd.errors import UserError
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import ClipModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def main(tmp_path, encoded_image):
    """The tool's main on a set of three classes."""
    for name in ("Sea_lion", "cat", "dog"):
        folder = tmp_path / "set" / "train" / name
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(encoded_image(1))
    path = ROOT / "data_tools" / "embed_classes.py"
    spec = importlib.util.spec_from_file_location("data_tools_embed_classes", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*arguments):
        fixed = [
            "--set",
            f"folder:{tmp_path / 'set'}",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "v.safetensors"),
        ]
        return tool.main([*fixed, *arguments])

    return call


class TinyClip(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Embedding(300, 6)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.logit_bias = None

    def encode_text(self, tokens, normalize=False):
        return self.text(tokens).sum(1)


@pytest.fixture
def clip(spec, tokenizer, monkeypatch):
    model = ClipModel(
        module=TinyClip(), config={}, image_spec=spec, tokenizer=tokenizer, source="tiny@tag", digest="f" * 64
    )
    monkeypatch.setattr(teacher_options, "load_clip", lambda name, pretrained="": model)
    return model


@pytest.mark.parametrize("normalise", ["each_and_mean", "mean", "none"])
def test_a_model_writes_the_same_kind_of_file(main, clip, tmp_path, normalise):
    (tmp_path / "prompts.txt").write_text("the {}\nmy {c}\n")
    assert (
        main("--model", "tiny", "--templates", str(tmp_path / "prompts.txt"), "--normalise", normalise) == 0
    )
    found = ClassVectors.load(tmp_path / "v.safetensors")
    rows = []
    for name in ("Sea lion", "cat", "dog"):
        features = clip.module.encode_text(clip.tokenizer([f"the {name}", f"my {name}"])).detach()
        mean = (F.normalize(features, dim=1) if normalise == "each_and_mean" else features).mean(0)
        rows.append(mean if normalise == "none" else mean / mean.norm())
    torch.testing.assert_close(found.vectors, torch.stack(rows), rtol=0, atol=1e-5)
    assert (found.teacher, found.teacher_digest, found.normalise) == ("tiny@tag", "f" * 64, normalise)
    assert found.logit_scale == pytest.approx(float(torch.tensor(3.0).exp()))


def test_the_sets_own_templates_are_the_default(main, clip, tmp_path):
    assert main("--model", "tiny") == 0
    assert ClassVectors.load(tmp_path / "v.safetensors").templates == ["a photo of a {}."]


def test_mistakes_are_named(main, clip):
    for arguments, told in (
        (["--model", "tiny", "--templates", "a {}", "photo"], "has no {} or {c} for the class name"),
        (["--model", "tiny", "--templates", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--model", "tiny", "--batch-size", "0"], "--batch-size must be at least 1"),
    ):
        with pytest.raises(UserError, match=told):
            main(*arguments)
