"""The classification evaluator against brute force, over ranks, and the adapter of a dual encoder."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.projects.zygote import free_port
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import UNLABELLED, Item, LabelledSet
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result
from vlmkd.evaluation.classify import Classification, ZeroShotClassifier, harmonic_mean
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import encode_classes

from .conftest import FixedEncoder, numbered_png

NAMES = [f"class {number}" for number in range(9)]
DOMAINS = ["art", "photo", "sketch"]
BASE, NOVEL = [0, 1, 2, 3, 4], [5, 6, 7, 8]


class FixedClassifier:
    """An ImageClassifier whose logits are given, by the image's top left red value."""

    name = "fixed"
    image_spec = ImageSpec(size=(2, 2), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    class_names = NAMES

    def __init__(self, count: int) -> None:
        self.logits = 2 * torch.randn(count, len(NAMES), generator=torch.Generator().manual_seed(1))
        self.logits[torch.arange(count), labels(count)] += 2

    def classify(self, images: Tensor) -> Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def labels(count: int) -> Tensor:
    return (torch.arange(count) ** 2 % 10 * 7) % (len(NAMES) - 1)  # class 8 never occurs


def items(folder: Path, count: int, torn: int = -1) -> list[Item]:
    found = []
    for number, label in enumerate(labels(count).tolist()):
        path = folder / f"{number}.png"
        if not path.exists():  # ranks share the files of the process that began
            path.write_bytes(b"torn" if number == torn else numbered_png(number))
        found.append(Item(f"k{number}", ImageRef(str(path)), label, domain=number % 3))
    return found


def evaluate(folder: Path, count: int, torn: int = -1) -> Result:
    evaluator = Classification(
        items(folder, count, torn), NAMES, dataset="set", domains=DOMAINS, base=BASE, novel=NOVEL
    )
    context = Context(batch_size=7, progress=False, max_unreadable_share=0.5)
    (result,) = evaluator.run(FixedClassifier(count), context)
    return result


def test_in_an_open_set_the_unseen_classes_compete_with_all(tmp_path: Path) -> None:
    count = 50
    open_set = Classification(
        items(tmp_path, count), NAMES, dataset="set", base=BASE, novel=NOVEL, rivals="all"
    )
    model = FixedClassifier(count)
    model.logits[:, BASE[0]] += 100  # sure of a seen class, whatever it sees
    (result,) = open_set.run(model, Context(batch_size=7, progress=False))
    seen = [n for n in range(count) if labels(count)[n] in BASE]
    assert result.metrics["novel_top1"] == result.metrics["harmonic_mean"] == 0.0
    assert result.metrics["base_top1"] == pytest.approx(
        mean([bool(labels(count)[n] == BASE[0]) for n in seen])
    )
    right = model.logits.argmax(1) == labels(count)
    assert sum(hits for hits, _ in result.details["per_group"].values()) == int(right.sum())


def mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_against_brute_force(tmp_path: Path) -> None:
    count, torn = 50, 4
    result = evaluate(tmp_path, count, torn)
    logits, target = FixedClassifier(count).logits.double().tolist(), labels(count).tolist()
    seen = [number for number in range(count) if number != torn]
    order = [sorted(range(9), key=lambda c, row=row: -row[c]) for row in logits]
    right = {n: order[n][0] == target[n] for n in seen}
    expected = {
        "top1": mean(list(right.values())),
        "top5": mean([target[n] in order[n][:5] for n in seen]),
        "mean_per_class": 0.0,
        "unreadable": 1.0,
    }
    classes = sorted({target[n] for n in seen})
    expected["mean_per_class"] = sum(mean([right[n] for n in seen if target[n] == c]) for c in classes) / len(
        classes
    )
    for index, domain in enumerate(DOMAINS):
        expected[f"{domain}_top1"] = mean([right[n] for n in seen if n % 3 == index])
    expected["mean_domain_top1"] = sum(expected[f"{domain}_top1"] for domain in DOMAINS) / 3
    for name, group in (("base", BASE), ("novel", NOVEL)):
        inside = [n for n in seen if target[n] in group]
        first = [max(group, key=lambda c, row=logits[n]: row[c]) == target[n] for n in inside]
        expected[f"{name}_top1"] = mean(first)
        assert result.details["per_group"][name] == [sum(first), len(inside)]
        assert expected[f"{name}_top1"] > mean([right[n] for n in inside])  # else the group would not matter
    base, novel = expected["base_top1"], expected["novel_top1"]
    expected["harmonic_mean"] = 2 / (1 / base + 1 / novel)
    assert result.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value), name
    assert 0 < result.metrics["top1"] < result.metrics["top5"] < 1 and result.count == count - 1

    matrix = [[0] * 9 for _ in range(9)]
    for label, predicted, number in result.details["confusion"]:
        matrix[label][predicted] += number
    expected_matrix = [[0] * 9 for _ in range(9)]
    for n in seen:
        expected_matrix[target[n]][order[n][0]] += 1
    assert matrix == expected_matrix
    assert result.details["per_class"] == [[matrix[c][c], sum(matrix[c])] for c in range(9)]

    softmax = torch.tensor(logits).softmax(1)
    wrong = sorted((n for n in seen if not right[n]), key=lambda n: -softmax[n, order[n][0]].item())
    mistakes = result.details["mistakes"]
    assert [one["key"] for one in mistakes] == [f"k{n}" for n in wrong[:24]]
    for one, n in zip(mistakes, wrong, strict=False):
        assert (one["label"], one["predicted"]) == (target[n], order[n][0])
        assert one["probability"] == pytest.approx(softmax[n].max().item(), rel=1e-5)
    json.dumps(asdict(result))  # plain data


def _rank(rank: int, world_size: int, port: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(evaluate(Path(folder), count, torn=1)))
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    count = 31
    expected = evaluate(tmp_path, count, torn=1)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    mp.start_processes(_rank, (2, free_port(), str(tmp_path), count), nprocs=2, start_method="fork")
    for rank in range(2):
        assert pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) == expected


def test_a_dual_encoder_is_judged_as_its_zero_shot_classifier(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    encoder = FixedEncoder(torch.randn(40, 6, generator=generator), torch.randn(9, 6, generator=generator))
    data = items(tmp_path, 40)
    vectors = encode_classes(encoder, NAMES, ["{}"], teacher_digest="")
    classifier = ZeroShotClassifier(encoder, vectors)
    context = Context(batch_size=7, progress=False)
    evaluator = Classification(data, NAMES, dataset="set", templates=["{}"])
    (found,) = evaluator.run(classifier, context)
    (expected,) = evaluator.run(encoder, context)
    assert found.metrics == expected.metrics and found.metrics["top5"] < 1
    assert found.details["confusion"] == expected.details["confusion"]
    pixels = torch.zeros(1, 3, 2, 2)
    cosine = encoder.encode_image(pixels).double() @ encoder.encode_text(NAMES).double().T
    torch.testing.assert_close(classifier.classify(pixels).double(), 10 * cosine, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="model fixed: class 0 is 'class 0', but 'zebra' is asked for"):
        Classification(data, ["zebra", *NAMES[1:]], dataset="set").run(classifier, context)


def test_splits_names_and_refusals(tmp_path: Path) -> None:
    data = items(tmp_path, 6)
    labelled = LabelledSet("pets", NAMES, ["{}"], {"test": data, "val": data[:2]}, ["one"])
    assert Classification.of(labelled).dataset == "pets"
    val = Classification.of(labelled, "val")
    assert (val.dataset, len(val.items)) == ("pets_val", 2)
    (result,) = val.run(FixedClassifier(6), Context(progress=False))
    assert result.metrics.keys() == {"top1", "top5", "mean_per_class"}  # one domain is no comparison
    with pytest.raises(UserError, match="no split 'train'; it has test, val"):
        Classification.of(labelled, "train")
    with pytest.raises(UserError, match="k0 has label -1"):
        Classification([data[0].unlabelled()], NAMES, dataset="set")
    assert UNLABELLED == -1
    with pytest.raises(UserError, match="no images"):
        Classification([], NAMES, dataset="set")
    with pytest.raises(UserError, match="without a common class"):
        Classification(data, NAMES, dataset="set", base=[0, 1], novel=[1, 2])
    with pytest.raises(UserError, match="no readable image of a novel class"):
        one = [item for item in data if item.label == 0]
        Classification(one, NAMES, dataset="set", base=[0], novel=[1]).run(
            FixedClassifier(6), Context(progress=False)
        )
    with pytest.raises(UserError, match="has 9 classes, but 2 are asked for"):
        Classification(data[:1], NAMES[:2], dataset="set").run(FixedClassifier(6), Context(progress=False))
    with pytest.raises(UserError, match="needs a ImageClassifier, but FixedEncoder has no"):
        Classification(data, NAMES, dataset="set").run(
            FixedEncoder(torch.eye(2), torch.eye(2)), Context(progress=False)
        )


def test_harmonic_mean() -> None:
    # the paper's average row (docs/papers/promptkd.md#published-numbers): 86.96 and 80.73 -> 83.73
    assert round(harmonic_mean(86.96, 80.73), 2) == 83.73
    assert harmonic_mean(0.0, 0.0) == 0.0
