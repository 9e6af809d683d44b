"""Zero-shot accuracy against open_clip's own code, and the shared parts of every evaluator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from PIL import Image

from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.evaluation_sets import zero_shot_set
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.classify import Classification
from vlmkd.models.class_vectors import encode_classes

from .conftest import CLASSES, SPEC, Encoder, FixedEncoder, numbered_png


def _reference(model: torch.nn.Module, root: Path) -> tuple[torch.Tensor, float, float]:
    """open_clip's classifier and its accuracies, image by image in batches of 7."""
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=16)
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, OPENAI_IMAGENET_TEMPLATES)
    transform = open_clip.transform.image_transform(32, is_train=False, mean=SPEC.mean, std=SPEC.std)
    paths = sorted((root / "val").glob("*/*.jpg"))
    images = torch.stack([transform(Image.open(path)) for path in paths])
    target = torch.tensor([int(path.parent.name[1:]) for path in paths])
    right = [0, 0]
    for start in range(0, len(paths), 7):
        features = model.encode_image(images[start : start + 7], normalize=True)
        logits = 100.0 * features @ weights
        # open_clip_train.zero_shot.accuracy without its last step, which newer NumPy refuses.
        correct = logits.topk(5, 1, True, True)[1].t().eq(target[start : start + 7].view(1, -1))
        right = [right[0] + int(correct[:1].sum()), right[1] + int(correct[:5].sum())]
    return weights, right[0] / len(paths), right[1] / len(paths)


@torch.no_grad()
def test_equals_open_clip(encoder: Encoder, class_folders: Path, context: Context) -> None:
    weights, top1, top5 = _reference(encoder.model, class_folders)
    evaluator = Classification.of(zero_shot_set(str(class_folders), name="tiny"))
    (result,) = evaluator.run(encoder, context)
    assert (result.metrics["top1"], result.metrics["top5"]) == (top1, top5)
    assert 0 < top1 < top5 < 1  # else the comparison would be empty
    assert (result.dataset, result.count) == ("tiny", 96)
    ours = encode_classes(encoder, CLASSES, evaluator.templates, teacher_digest="", shared=True)
    torch.testing.assert_close(ours.vectors.T, weights, rtol=0, atol=1e-7)


def test_counts_per_class_and_mean_over_classes(tmp_path: Path, context: Context) -> None:
    """Six images of unequal classes with known nearest classes."""
    texts = torch.eye(3)
    images = torch.eye(3)[[0, 0, 1, 1, 2, 0]]  # what the model sees
    data = _numbered(tmp_path, labels=[0, 0, 0, 0, 1, 2], class_names=["class 0", "class 1", "class 2"])
    (result,) = Classification.of(data).run(FixedEncoder(images, texts), context)
    assert result.details["per_class"] == [[2, 4], [0, 1], [0, 1]]
    assert result.metrics["top1"] == 2 / 6 and "top5" not in result.metrics
    assert result.metrics["mean_per_class"] == pytest.approx((2 / 4 + 0 + 0) / 3)


def _numbered(folder: Path, labels: list[int], class_names: list[str]) -> LabelledSet:
    """Images that FixedEncoder takes for number 0, 1, 2, ..."""
    for number in range(len(labels)):
        (folder / f"{number}.png").write_bytes(numbered_png(number))
    items = [
        Item(f"{number}", ImageRef(str(folder / f"{number}.png")), label)
        for number, label in enumerate(labels)
    ]
    return LabelledSet("numbered", class_names, ["{}"], {"test": items})


def test_unreadable_images_are_counted_and_fatal_above_the_share(
    class_folders: Path, encoder: Encoder
) -> None:
    data = zero_shot_set(str(class_folders))
    torn = class_folders / "torn.jpg"
    items = list(data.splits["test"])
    torn.write_bytes(items[5].image.read()[:300])
    items[5] = dataclasses.replace(items[5], image=ImageRef(str(torn)))
    evaluator = Classification.of(dataclasses.replace(data, splits={"test": items}, name="torn"))
    (result,) = evaluator.run(encoder, Context(batch_size=7, progress=False, max_unreadable_share=0.02))
    assert result.count == 95 and result.metrics["unreadable"] == 1
    assert result.details["unreadable"] == [str(torn)]
    assert result.details["per_class"][0][1] == 7
    with pytest.raises(UserError, match=r"1 of 96 images cannot be read, more than 1.0%: .*torn.jpg"):
        evaluator.run(encoder, Context(progress=False))


def test_loader_processes_give_the_same_result(
    class_folders: Path, encoder: Encoder, context: Context
) -> None:
    evaluator = Classification.of(zero_shot_set(str(class_folders)))
    assert evaluator.run(encoder, dataclasses.replace(context, workers=2)) == evaluator.run(encoder, context)


def test_a_predictor_without_the_protocol_is_refused_by_name(class_folders: Path, context: Context) -> None:
    class ImageHead:
        name = "head"
        image_spec = SPEC

        def classify(self, images: Any) -> Any:
            return images

    with pytest.raises(
        UserError,
        match="classification needs a DualEncoder, but ImageHead has no encode_image, encode_text, logit_scale",
    ):
        Classification.of(zero_shot_set(str(class_folders))).run(ImageHead(), context)
