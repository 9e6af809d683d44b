"""data_tools/embed_labelled.py, called the way a user does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from data_tools import teacher_options
from vlmkd.data.teacher_outputs import CLEAN, TeacherOutputs
from vlmkd.data.transforms import ViewConfig
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import ClipModel

ROOT = Path(__file__).resolve().parents[2]


class TinyClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.text = nn.Linear(3 * 16 * 16, 6), nn.Embedding(300, 6)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.logit_bias = None

    def encode_image(self, images, normalize=False):
        return self.visual(images.flatten(1))

    def encode_text(self, tokens, normalize=False):
        return self.text(tokens).sum(1)


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"data_tools_{name}", ROOT / "data_tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clip(spec, tokenizer):
    return ClipModel(
        module=TinyClip(), config={}, image_spec=spec, tokenizer=tokenizer, source="tiny@tag", digest="f" * 64
    )


@pytest.fixture
def main(clip, tmp_path, encoded_image, monkeypatch):
    """The tool's main on a set of 2 x 3 training and 2 test images; `tiny` is the model."""
    for split, count in (("train", 3), ("test", 1)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.jpg").write_bytes(
                    encoded_image(10 * number + index + 100 * (split == "test"))
                )
    embed_labelled = tool("embed_labelled")
    monkeypatch.setattr(embed_labelled, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(teacher_options, "load_clip", lambda model, pretrained="": clip)

    def call(*arguments):
        fixed = ["--set", f"folder:{tmp_path / 'set'}", "--device", "cpu", "--out", str(tmp_path / "out")]
        return embed_labelled.main([*fixed, *arguments])

    return call


def test_a_model_embeds_the_training_split_with_the_given_views(main, tmp_path, capsys):
    options = [
        "--views",
        "2",
        "--crop-scale",
        "0.5",
        "0.9",
        "--color-jitter",
        "0.3",
        "--hue",
        "0.1",
        "--grayscale",
        "0.2",
    ]
    assert main("--model", "tiny", *options, "--flip", "0.25", "--seed", "4") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"{tmp_path / 'out'} is complete" and "6/6 images" in told[0]
    stored = TeacherOutputs(tmp_path / "out")
    train = load_set(f"folder:{tmp_path / 'set'}").splits["train"]
    stored.check(
        ViewConfig((0.5, 0.9), (0.75, 4 / 3), 0.25, 0.3, 0.1, 0.2), (0, 0, 0), items=train, digest="f" * 64
    )
    assert len(stored) == 6 and stored.info.crops == 2 and stored.info.seed == 4
    assert stored.info.source == "tiny@tag" and stored.info.dtype == "float16"
    assert stored.info.logit_scale == pytest.approx(float(torch.tensor(3.0).exp()))


class Oracle(torch.nn.Module):
    """An encoder with the oracle's interface, whose image embedding is the class that the picture's key says."""

    name = "oracle"
    image_spec = ImageSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    logit_scale = 20.0

    def encode_image(self, images):
        return torch.nn.functional.normalize(images.flatten(1)[:, :4] + 1e-3, dim=-1)


def test_the_emoji_sets_strong_teacher_is_named_by_its_heads(main, tmp_path, monkeypatch):
    from data_tools.emoji import oracle

    heads = tmp_path / "heads.safetensors"
    heads.write_bytes(b"heads")
    asked = []
    monkeypatch.setattr(oracle, "load_oracle", lambda file: asked.append(file) or Oracle())
    assert main("--model", f"emoji-oracle:{heads}", "--clean") == 0
    info = TeacherOutputs(tmp_path / "out", "clean").info
    assert asked == [heads] and (info.source, info.dim, info.logit_scale) == ("oracle", 4, 20.0)
    assert info.digest == hashlib.sha256(b"heads").hexdigest()


def test_chosen_splits_and_keys(main, tmp_path):
    (tmp_path / "keys").write_text("train/cat/1.jpg\ntest/dog/0.jpg\n")
    main(
        "--model", "tiny", "--splits", "train", "test", "--keys", str(tmp_path / "keys"), "--clean", "--fp32"
    )
    stored = TeacherOutputs(tmp_path / "out", "clean")
    assert len(stored) == 2 and "train/cat/1.jpg" in stored and "test/dog/0.jpg" in stored
    assert stored.info.views == CLEAN and stored.info.dtype == "float32"
    with pytest.raises(UserError, match="1 keys are not in .* first test/dog/0.jpg"):
        main("--model", "tiny", "--keys", str(tmp_path / "keys"))
    with pytest.raises(UserError, match="has no split 'val'"):
        main("--model", "tiny", "--splits", "val")


def test_mistakes_are_named(main):
    for arguments, told in (
        (["--model", "tiny", "--clean", "--views", "2"], "--clean has one view"),
        (["--model", "tiny", "--views", "0"], "--views and --batch-size must be at least 1"),
    ):
        with pytest.raises(UserError, match=told):
            main(*arguments)


def test_as_a_command_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    name, arguments = "embed_labelled", ["--set", "emojis", "--model", "x", "--out", "out"]
    run = subprocess.run(
        [sys.executable, ROOT / "data_tools" / f"{name}.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and "Traceback" not in run.stderr


def test_the_folder_says_what_it_was_made_of(main, tmp_path):
    main("--model", "tiny", "--views", "2")
    info = json.loads((tmp_path / "out" / "cache.json").read_text())
    assert info["info"]["set_name"] == f"folder:{tmp_path / 'set'}" and info["info"]["crops"] == 2
    assert [part["samples"] for part in info["parts"].values()] == [6]
