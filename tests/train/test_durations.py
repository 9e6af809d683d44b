"""Lengths in steps, epochs, examples and shares."""

from __future__ import annotations

from typing import Any

import pytest

from projects.tinyclip.config import MaskConfig
from vlmkd import config
from vlmkd.errors import UserError
from vlmkd.train.durations import in_steps

FIELDS = ["run_dir=r", "student.model=m", "loss.affinity=0", "loss.contrastive=1", "batch_size=8"]


def load(*fields: str) -> Any:
    return config.load(MaskConfig, [*FIELDS, *fields])


@pytest.mark.parametrize(
    ("length", "steps"),
    [("7", 7), ("20ep", 220), ("2.5ep", 28), ("1e3ex", 125), ("87ex", 10), ("1ex", 1), ("max(500, 20ep)", 500),
     ("max(100,20ep)", 220), ("min(30, 1e3ex)", 30)],
)  # fmt: skip
def test_a_length_is_a_number_of_steps(length: str, steps: int) -> None:
    assert in_steps(load(f"steps={length}"), 11).steps == steps


def test_parts_of_a_run_are_shares_of_it_wherever_they_stand() -> None:
    given = load(
        "steps=20ep", "optim.warmup_steps=10%", "evaluation.every_steps=1ep", "log.every_steps=0.1%",
        "checkpoint.every_steps=0", "masks.sparsity_warmup_steps=min(100, 20%)",
    )  # fmt: skip
    cfg = in_steps(given, 11)
    found = (
        cfg.optim.warmup_steps,
        cfg.evaluation.every_steps,
        cfg.log.every_steps,
        cfg.checkpoint.every_steps,
    )
    assert found == (22, 11, 1, 0) and cfg.masks.sparsity_warmup_steps == 44
    assert in_steps(cfg, 0) == cfg


@pytest.mark.parametrize(
    "bad", ["steps=20 epochs", "steps=ep", "steps=max(3)", "optim.warmup_steps=-5%", "steps=many"]
)
def test_another_form_is_refused_by_name(bad: str) -> None:
    with pytest.raises(UserError, match=rf"config field {bad.partition('=')[0]} is .*20ep, 1e6ex"):
        load(bad)


def test_what_cannot_be_counted_is_told() -> None:
    with pytest.raises(UserError, match="config field steps is 10%, a share of itself"):
        in_steps(load("steps=10%"), 11)
    with pytest.raises(UserError, match="config field steps is 0ep, which is no step"):
        in_steps(load("steps=0ep"), 11)
    with pytest.raises(UserError, match=r"config field steps is 20ep, but .* data.samples_per_epoch"):
        in_steps(load("steps=20ep"), 0)
