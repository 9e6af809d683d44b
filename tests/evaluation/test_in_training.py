"""Evaluations during training: loader processes, and one pass over images that several evaluators share."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from vlmkd.config import EvaluationConfig, RunConfig
from vlmkd.datasets.evaluation_sets import retrieval_set, zero_shot_set
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.classify import Classification
from vlmkd.evaluation.retrieval import Retrieval
from vlmkd.train import trainer

from .conftest import CLASSES, Encoder, encoded, write_tar


@dataclasses.dataclass
class Counting(Encoder):
    """Counts the images that it embeds."""

    seen: int = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().encode_image(images)


@pytest.fixture
def evaluators(tmp_path: Path) -> list[Any]:
    """Zero-shot and retrieval on the same shard, whose third image is torn."""
    members: dict[str, bytes] = {}
    for number in range(30):
        image = encoded(number)
        members[f"{number:02d}.jpg"] = image[:200] if number == 2 else image
        members[f"{number:02d}.cls"] = str(number % len(CLASSES)).encode()
        members[f"{number:02d}.txt"] = f"picture {number}".encode()
    shard = str(write_tar(tmp_path / "set" / "0.tar", members))
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(CLASSES))
    return [Classification.of(zero_shot_set(shard)), Retrieval(retrieval_set(shard))]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_two_evaluators_are_embedded_once_with_equal_results(
    evaluators: list[Any], encoder: Encoder, workers: int
) -> None:
    cfg = RunConfig(run_dir="unused", evaluation=EvaluationConfig(batch_size=7, workers=workers))
    engine: Any = SimpleNamespace(device=Context.device, module=None, whole_weights=contextlib.nullcontext)
    metrics: Any = SimpleNamespace(write_results=lambda *_: None)
    alone = Context(batch_size=7, progress=False, max_unreadable_share=0.1)
    expected = [result for evaluator in evaluators for result in evaluator.run(encoder, alone)]
    assert expected[0].metrics["unreadable"] == expected[1].metrics["unreadable"] == 1
    assert 0 < expected[0].metrics["top5"] < 1

    one, other = Counting(encoder.model), Counting(encoder.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer, "Context", lambda *args, **given: Context(*args, **given, max_unreadable_share=0.1)
        )
        for predictor in (one, other):
            assert trainer.evaluate(cfg, evaluators, predictor, engine, metrics, 1) == expected
            assert predictor.seen == 30
        trainer.evaluate(cfg, evaluators, one, engine, metrics, 2)
    assert one.seen == 60  # weights move between two evaluations: nothing is kept
