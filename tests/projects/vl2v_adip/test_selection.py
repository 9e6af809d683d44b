"""Which weights are kept: mean accuracy over the source domains, from a step on, the later of equals; the valley reads losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from projects.vl2v_adip.student import Student
from projects.vl2v_adip.task import Vl2vTask
from vlmkd.evaluation.base import Result

EVERY = 10
"""Steps between two evaluations; the reference counts steps from 0 and evaluates step 0 first."""


def task(select_from_step: int, *, swad: bool) -> Vl2vTask:
    """A task around one weight."""
    valley = SimpleNamespace(
        enabled=swad, n_converge=1, n_tolerance=1, tolerance_ratio=0.5, semantics="reference",
        segment_reset="every_eval",
    )  # fmt: skip
    cfg: Any = SimpleNamespace(
        swad=valley, student=SimpleNamespace(freeze_bn=True), select_from_step=select_from_step
    )
    exported: Any = None
    student = Student(nn.Linear(1, 1, bias=False), nn.Identity())
    return Vl2vTask(cfg, student, exported, {}, validation=["art_out", "photo_out"])


def run(made: Vl2vTask, evaluations: list[tuple[float, float, float]]) -> int | None:
    """Train through evaluations (accuracy on art, on photo, mean loss); the step that ended the run, if one did."""
    step = 0
    for number, (art, photo, loss) in enumerate(evaluations):
        while step < number * EVERY + 1:
            with torch.no_grad():
                made.core.backbone.weight.fill_(float(step))
            step += 1
            for selection in made.selections:
                selection.after_update(made.core, step - 1)
        own = [("art_out", art, loss - 0.25), ("photo_out", photo, loss + 0.25)]
        results = [Result("x", name, {"top1": top1, "loss": value}, 5) for name, top1, value in own]
        watched = Result(
            "x", "sketch_in", {"top1": 1.0, "loss": 0.0}, 5
        )  # the held-out domain decides nothing
        ends = [one.after_evaluation(made.core, [watched, *results], step) for one in made.selections]
        if any(ends):
            return step - 1
    return None


@pytest.mark.parametrize(
    ("first", "kept"),
    [(0, 0), (1, 30), (31, 50)],  # of step 0; of 10 to 50; of 40 and 50
)
def test_the_best_mean_of_the_source_domains_from_a_step_on(first: int, kept: int) -> None:
    made = task(first, swad=False)
    accuracies = [
        (0.95, 0.95),
        (0.9, 0.1),
        (0.5, 0.9),
        (0.8, 0.6),
        (0.2, 0.3),
        (0.3, 0.2),
    ]  # 20 and 30, 40 and 50 tie
    assert run(made, [(*pair, 1.0) for pair in accuracies]) is None
    assert made.best.step - 1 == kept
    assert [value.item() for value in made.best.weights().values()] == [kept]


def test_the_valley_follows_the_mean_loss_and_ends_the_run() -> None:
    made = task(0, swad=True)
    losses = [1.0, 1.2, 1.4, 1.6, 1.0]  # threshold 1.5: dead at the fourth evaluation
    assert run(made, [(0.5, 0.5, loss) for loss in losses]) == 30
    assert made.valley is not None
    assert (made.valley.converge_step, made.valley.threshold) == (0, pytest.approx(1.5))
    # segments: step 0 alone, then 1 to 10 and 11 to 20; each weighs 1, and converging counts nothing with one of each
    assert made.valley.weights()["backbone.weight"].item() == pytest.approx((5.5 + 15.5) / 2)
