"""The accuracy of a stored teacher: the share of test images whose own class has the nearest vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from data_tools import eval_stored_teacher
from data_tools.embed_labelled import embed_items
from vlmkd.data.transforms import ViewConfig
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.results import read_results


class Brightness:
    """Embeds bright images as (1, 0) and dark ones as (0, 1)."""

    name, logit_scale = "brightness", 10.0
    image_spec = ImageSpec(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        bright = (images.mean(dim=(1, 2, 3)) > 0.5).float()
        return torch.stack([bright, 1 - bright], dim=1)


def test_accuracy_of_stored_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shades = {"day": (250, 240, 10), "night": (10, 20, 15)}  # one picture of the day is dark
    for split in ("train", "test"):
        for name, greys in shades.items():
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number, grey in enumerate(greys):
                Image.new("RGB", (9, 9), (grey,) * 3).save(tmp_path / "set" / split / name / f"{number}.png")
    dataset = load_set(f"folder:{tmp_path / 'set'}")
    embed_items(
        Brightness(), dataset.splits["test"], tmp_path / "outputs", name=f"folder:{tmp_path / 'set'}",
        source="brightness", digest="a" * 64, views=ViewConfig(), view_count=1,
    )  # fmt: skip
    vectors = ClassVectors(
        vectors=torch.eye(2), class_names=dataset.class_names, templates=["{}"], teacher="brightness",
        teacher_digest="a" * 64, logit_scale=10.0,
    )  # fmt: skip
    vectors.save(tmp_path / "classes.safetensors")
    out = tmp_path / "result.jsonl"
    arguments = [str(tmp_path / "outputs"), str(tmp_path / "classes.safetensors"), "--results", str(out)]
    assert eval_stored_teacher.main(arguments) == 0
    assert "top-1 83.3 % of 6 images" in capsys.readouterr().out
    (number,) = read_results(out)
    assert (number.value, number.count) == (pytest.approx(5 / 6), 6)
