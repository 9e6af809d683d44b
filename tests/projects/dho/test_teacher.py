"""The zero-shot teacher's logits (docs/papers/dho.md, eq. 10) against float64 sums, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.dho import teacher
from projects.dho.config import TeacherConfig
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import ClipModel

NAMES, TEMPLATES, WIDTH = ["red_fox", "owl", "ant"], ["a {}.", "the big {}"], 5


class TinyClip(nn.Module):
    """Text features are sums of byte embeddings, of any length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.text = nn.Linear(3, WIDTH), nn.Embedding(256, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.logit_bias = None

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features that are no unit vectors."""
        return self.text(tokens).sum(1)


def tokens(texts: list[str]) -> Tensor:
    """Bytes, padded."""
    return torch.tensor([[*text.encode().ljust(20, b" ")] for text in texts])


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> ClipModel:
    """The model that every name loads."""
    spec = ImageSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    made = ClipModel(
        module=TinyClip(), config={}, image_spec=spec, tokenizer=tokens, source="tiny", digest="a" * 64
    )
    monkeypatch.setattr(teacher, "load_clip", lambda model, pretrained: made)
    return made


def load(**fields: Any) -> teacher.Teacher:
    cfg = TeacherConfig(model=fields.pop("model", "tiny"), **fields)
    return teacher.load_teacher(cfg, NAMES, TEMPLATES, outputs="")


def raw(clip: ClipModel) -> Tensor:
    """Text features [C, P, D], float64."""
    with torch.no_grad():
        rows = [
            clip.module.encode_text(tokens([t.replace("{}", n.replace("_", " ")) for t in TEMPLATES]))
            for n in NAMES
        ]
    return torch.stack(rows).double()


@pytest.mark.parametrize("normalise", ["each_and_mean", "each"])
@pytest.mark.parametrize("scale", [100.0, 0.0])
def test_logits_are_scaled_cosines(clip: ClipModel, normalise: str, scale: float) -> None:
    """The constant 100, or the model's own scale; `each` keeps the mean's length, as the released open_clip teacher."""
    mean = F.normalize(raw(clip), dim=-1).mean(1)
    assert (mean.norm(dim=1) < 0.999).all()  # or else the two modes would be one
    vectors = F.normalize(mean, dim=-1) if normalise == "each_and_mean" else mean
    images = F.normalize(torch.randn(4, WIDTH, dtype=torch.float64), dim=-1)
    found = load(normalise=normalise, scale=scale)
    expected = (scale or torch.tensor(2.5).double().exp()) * images @ vectors.T
    torch.testing.assert_close(found.logits(images.float()).double(), expected, rtol=1e-5, atol=1e-4)
    assert (found.dim, found.digest, found.source) == (WIDTH, "a" * 64, "tiny") and found.clip is clip


def test_class_vectors_of_another_model_or_of_other_classes_are_refused(
    clip: ClipModel, tmp_path: Path
) -> None:
    def stored(name: str, digest: str, class_names: list[str]) -> str:
        vectors = ClassVectors(
            vectors=torch.eye(3, WIDTH), class_names=class_names, templates=TEMPLATES, teacher="t",
            teacher_digest=digest, logit_scale=7.0,
        )  # fmt: skip
        vectors.save(tmp_path / name)
        return str(tmp_path / name)

    same = load(class_vectors=stored("same", "a" * 64, NAMES), scale=0.0)
    assert torch.equal(same.logits(torch.eye(WIDTH)), 7.0 * torch.eye(WIDTH, 3))
    with pytest.raises(UserError, match="other weights"):
        load(class_vectors=stored("model", "b" * 64, NAMES))
    with pytest.raises(UserError, match="class 2 is 'bee', but 'ant'"):
        load(class_vectors=stored("classes", "a" * 64, ["red fox", "owl", "bee"]))
