"""Recalls against brute force over the full, sorted score matrix."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlmkd.data.images import ImageRef
from vlmkd.datasets.evaluation_sets import CaptionedImages
from vlmkd.errors import UserError
from vlmkd.evaluation import retrieval
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.retrieval import Retrieval, first_positive

from .conftest import FixedEncoder, numbered_png


def _brute_force(scores: Tensor, positives: list[list[int]]) -> list[int]:
    """Place of the first positive in a stable sort by falling score."""
    places = []
    for row, wanted in zip(scores.tolist(), positives, strict=True):
        order = sorted(range(len(row)), key=lambda index: -row[index])  # Python's sort is stable
        places.append(min(order.index(index) for index in wanted))
    return places


def _set(folder: Path, num_images: int, captions_per_image: int) -> CaptionedImages:
    """Captions of all images in a shuffled order."""
    order = list(range(num_images * captions_per_image))
    random.Random(0).shuffle(order)
    images = []
    for number in range(num_images):
        (folder / f"{number}.png").write_bytes(numbered_png(number))
        images.append(ImageRef(str(folder / f"{number}.png")))
    chunks = [order[k * captions_per_image : (k + 1) * captions_per_image] for k in range(num_images)]
    return CaptionedImages("set", images, [f"text {number}" for number in range(len(order))], chunks)


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_recalls_equal_brute_force(
    tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", block)
    data = _set(tmp_path, num_images=40, captions_per_image=5)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, 8, generator=generator)
    texts = torch.randn(200, 8, generator=generator)
    for image, indices in enumerate(data.texts_of_image):
        texts[indices] += 0.8 * images[image]
    encoder = FixedEncoder(images, texts)
    (result,) = Retrieval(data).run(encoder, context)

    scores = encoder.images @ encoder.texts.T
    image_of = {text: image for image, indices in enumerate(data.texts_of_image) for text in indices}
    to_text = _brute_force(scores, data.texts_of_image)
    to_image = _brute_force(scores.T, [[image_of[text]] for text in range(200)])
    for k in (1, 5, 10):
        assert result.metrics[f"image_to_text_r{k}"] == sum(place < k for place in to_text) / 40
        assert result.metrics[f"text_to_image_r{k}"] == sum(place < k for place in to_image) / 200
    for name, places in (("image_to_text", to_text), ("text_to_image", to_image)):
        ranks = sorted(place + 1 for place in places)
        middle = len(ranks) // 2
        assert result.details[f"{name}_mean_rank"] == pytest.approx(sum(ranks) / len(ranks))
        assert result.details[f"{name}_median_rank"] == (ranks[middle - 1] + ranks[middle]) / 2
    assert 0 < result.metrics["text_to_image_r1"] < result.metrics["image_to_text_r1"] < 1
    assert (result.count, result.details["texts"]) == (40, 200)


def test_ties_are_ranked_by_index_as_in_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(2)
    queries = torch.eye(4)[torch.randint(4, (60,), generator=generator)]
    candidates = torch.eye(4)[torch.randint(4, (30,), generator=generator)]  # many equal scores
    rng = random.Random(3)
    positives = [sorted(rng.sample(range(30), rng.choice([1, 3]))) for _ in range(60)]
    assert first_positive(queries, candidates, positives).tolist() == _brute_force(
        queries @ candidates.T, positives
    )


def test_a_collapsed_model_scores_at_chance(tmp_path: Path, context: Context) -> None:
    """Equal embeddings everywhere give 1/N, not 1."""
    data = _set(tmp_path, num_images=20, captions_per_image=1)
    (result,) = Retrieval(data).run(FixedEncoder(torch.ones(20, 4), torch.ones(20, 4)), context)
    assert result.metrics["image_to_text_r1"] == result.metrics["text_to_image_r1"] == 1 / 20


def test_an_unreadable_image_leaves_with_its_captions(tmp_path: Path) -> None:
    data = _set(tmp_path, num_images=12, captions_per_image=2)
    Path(data.images[3].path).write_bytes(b"torn")
    vectors = torch.eye(12)
    texts = torch.zeros(24, 12)
    for image, indices in enumerate(data.texts_of_image):
        texts[indices] = vectors[image]
    (result,) = Retrieval(data).run(
        FixedEncoder(vectors, texts), Context(batch_size=5, progress=False, max_unreadable_share=0.1)
    )
    assert (result.count, result.details["texts"], result.metrics["unreadable"]) == (11, 22, 1)
    assert result.metrics["image_to_text_r1"] == result.metrics["text_to_image_r1"] == 1
    with pytest.raises(UserError, match="1 of 12 images cannot be read"):
        Retrieval(data).run(FixedEncoder(vectors, texts), Context(progress=False))


def test_a_text_with_several_images(tmp_path: Path, context: Context) -> None:
    """Images 0 and 1 show concept 0, image 2 concept 1: either image is right for text 0."""
    data = _set(tmp_path, num_images=3, captions_per_image=1)
    data = CaptionedImages("concepts", data.images, ["text 0", "text 1"], [[0], [0], [1]])
    images = torch.tensor([[0.0, 1.0], [1.0, 0.1], [0.2, 1.0]])
    (result,) = Retrieval(data).run(FixedEncoder(images, torch.eye(2)), context)
    assert result.metrics == {"image_to_text_r1": 2 / 3, "text_to_image_r1": 1 / 2}
