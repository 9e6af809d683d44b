"""SWAD's loss valley against the published code's golden rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from projects.vl2v_adip.config import SwadConfig
from projects.vl2v_adip.valley import LossValley, RunningMean
from tests.train.conftest import restored
from vlmkd.errors import UserError

FLAT = [1.0, 1.05, 1.1, 1.12, 1.15, 1.2, 1.2, 1.2, 1.25, 1.25]
FALLING = [3, 2.5, 2, 1.5, 1.2, 1.1, 1.0, 1.05, 1.1, 1.1, 1.15, 1.2, 1.2, 1.2, 1.25]
OVERFITS = [3, 2.5, 2, 1.5, 1.2, 1.1, 1.0, 1.05, 1.1, 1.2, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2, 2.3]
EARLY = [2.0, 1.0, 1.1, 1.2, 1.1, 1.1, 1.15, 1.2, 1.2]
NEVER = [3, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3]

# losses, converge step, threshold, dead at, coefficient of each step times their sum
# (docs/papers/vl2v_adip.md#the-released-codes-rule)
GOLDEN = [
    (FLAT, 0, 1.365, None, [3, 2, 2, 1, 1, 1, 1, 1, 1, 1]),
    (FALLING, 6, 1.365, None, [0] * 5 + [1, 2] + [1] * 8),
    (OVERFITS, 6, 1.365, 15, [0] * 5 + [1, 2, 1, 1, 1] + [0] * 8),
    (EARLY, 1, 1.43, None, [0, 1, 2, 2, 1, 1, 1, 1, 1]),
    (NEVER, None, None, None, [0] * 7 + [1]),
]


def coefficients(
    valley: LossValley,
    losses: list[float],
    segment: int = 1,
    between: Callable[[LossValley], LossValley] = lambda valley: valley,
) -> tuple[list[float], LossValley]:
    """Share of each step in the average: step i has the weight vector e_i. `between` runs after every evaluation."""
    steps = len(losses) * segment
    for step in range(steps):
        valley.add_step({"w": torch.eye(steps, dtype=torch.float64)[step]})
        if (step + 1) % segment == 0:
            valley.close_segment(losses[step // segment], step)
            valley = between(valley)
    return valley.weights()["w"].tolist(), valley


@pytest.mark.parametrize(("losses", "converge", "threshold", "dead", "golden"), GOLDEN)
def test_reference_semantics_give_the_golden_rows(losses, converge, threshold, dead, golden) -> None:
    found, valley = coefficients(LossValley(SwadConfig()), losses)
    assert found == pytest.approx(np.array(golden) / sum(golden), abs=1e-6)
    assert (valley.converge_step, valley.dead_step) == (converge, dead)
    assert valley.threshold == (None if threshold is None else pytest.approx(threshold))
    assert valley.dead == (dead is not None)


def brute_force(
    losses: list[float], n_converge: int, n_tolerance: int, ratio: float
) -> tuple[list[float], int | None]:
    """The released rule read literally over whole lists, one step a segment: counts of each, and where it dies."""
    counts = [0.0] * len(losses)
    converged = None
    threshold = 0.0
    for now in range(len(losses)):
        queue = list(range(max(0, now - n_tolerance + 1), now + 1))
        if converged is None:
            window = list(range(max(0, now - n_converge + 1), now + 1))
            if len(window) < n_converge or int(np.argmin([losses[i] for i in window])) != 0:
                continue
            converged, threshold = window[0], float(np.mean([losses[i] for i in window])) * (1 + ratio)
            if n_tolerance < n_converge:
                for i in window[1 : n_converge - n_tolerance + 1]:
                    counts[i] += 1
            elif n_tolerance > n_converge:
                part = queue[: n_tolerance - n_converge + 1]
                start = 0
                for position, i in enumerate(part):
                    if losses[i] > threshold:
                        start = position + 1
                for i in part[start + 1 :]:
                    counts[i] += 1
        elif queue[0] >= converged:
            if min(losses[i] for i in queue) > threshold:
                return (
                    (counts, now) if sum(counts) else ([float(i == converged) for i in range(now + 1)], now)
                )
            counts[queue[0]] += 1
    if converged is None:
        return [float(i == len(losses) - 1) for i in range(len(losses))], None
    queue = list(range(max(0, len(losses) - n_tolerance), len(losses)))[1:]
    while queue and min(losses[i] for i in queue) <= threshold:
        counts[queue.pop(0)] += 1
    return (counts if sum(counts) else [float(i == converged) for i in range(len(losses))]), None


@pytest.mark.parametrize("seed", range(30))
def test_reference_semantics_equal_a_literal_reading_for_any_settings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_converge, n_tolerance = int(rng.integers(1, 6)), int(rng.integers(1, 8))
    ratio = float(rng.choice([0.05, 0.2, 0.3]))
    losses = [float(x) for x in np.abs(np.linspace(-1, 1.5, 16)) + 0.3 * rng.random(16) + 0.5]
    expected, dead = brute_force(losses, n_converge, n_tolerance, ratio)
    valley = LossValley(SwadConfig(n_converge=n_converge, n_tolerance=n_tolerance, tolerance_ratio=ratio))
    found, valley = coefficients(valley, losses)
    wanted = np.zeros(len(losses))
    wanted[: len(expected)] = np.array(expected) / sum(expected)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert valley.dead_step == dead


def test_segments_weigh_the_same_in_reference_and_by_their_steps_in_clean() -> None:
    def shares(semantics: Any) -> np.ndarray:
        # Segments of 1, 3, 3, 3 steps, as an evaluation after the first step and then every third gives.
        valley = LossValley(SwadConfig(semantics=semantics))
        for step in range(10):
            valley.add_step({"w": torch.eye(10)[step]})
            if step % 3 == 0:
                valley.close_segment([1.0, 1.05, 1.1, 1.2][step // 3], step)
        return valley.weights()["w"].numpy()

    # Segments 1 and 2 at convergence, 0 at the evaluation after it, 1 to 3 at the end.
    by_segment = np.array([1, 2, 2, 1]) / 6 / np.array([1, 3, 3, 3])
    assert shares("reference") == pytest.approx(by_segment.repeat([1, 3, 3, 3]), abs=1e-6)
    assert shares("clean") == pytest.approx(np.full(10, 0.1), abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "window", "dead"),
    [
        (FLAT, (0, 9), None),
        (FALLING, (6, 14), None),
        (OVERFITS, (6, 9), 15),
        (EARLY, (1, 8), None),
        (NEVER, (7, 7), None),
        # Two bumps above the threshold of 1.365 that come down again; the last one does not.
        ([2, 1.0, 1.05, 1.1, 1.5, 1.6, 1.2, 1.5, 1.3, 1.4, 1.5], (1, 8), None),
    ],
)
@pytest.mark.parametrize("segment", [1, 4])
def test_clean_semantics_take_every_step_of_the_window_once(losses, window, dead, segment) -> None:
    found, valley = coefficients(LossValley(SwadConfig(semantics="clean")), losses, segment)
    first, last = window[0] * segment, (window[1] + 1) * segment
    wanted = np.zeros(len(losses) * segment)
    wanted[first:last] = 1 / (last - first)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert valley.dead_step == (None if dead is None else (dead + 1) * segment - 1)


def test_segments_overlap_under_the_released_default_reset() -> None:
    valley = LossValley(SwadConfig(n_converge=2, n_tolerance=1, segment_reset="vl2v_default"))
    ends: dict[int, float] = {}
    for step in range(4501):
        valley.add_step({"w": torch.tensor([float(step)])})
        if step % 500 == 0:
            valley.close_segment(5000.0 - step, step)  # always falling: never converged with n_converge=2
            ends[step] = valley._recent[-1].mean["w"].item()
    # Means of 0..step until the first reset, after the evaluation of step 3000, and after that of step 4000.
    expected = {step: step / 2 for step in range(0, 3001, 500)}
    expected |= {3500: (3001 + 3500) / 2, 4000: (3001 + 4000) / 2, 4500: (4001 + 4500) / 2}
    assert ends == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="swad.segment_reset"):
        SwadConfig(semantics="clean", segment_reset="vl2v_default")


@pytest.mark.parametrize("semantics", ["reference", "clean"])
@pytest.mark.parametrize("losses", [row[0] for row in GOLDEN])
def test_a_valley_goes_on_bit_for_bit_after_every_evaluation_and_inside_a_segment(semantics, losses) -> None:
    torch.manual_seed(0)
    weights = torch.randn(len(losses) * 3, 5)

    def run(interrupted: bool) -> torch.Tensor:
        valley = LossValley(SwadConfig(semantics=semantics))
        for step, row in enumerate(weights):
            valley.add_step({"a": row[:2], "b": row[2:]})
            if step % 3 == 2:
                valley.close_segment(losses[step // 3], step)
            if interrupted:
                valley = restored(lambda: LossValley(SwadConfig(semantics=semantics)), valley.state())
        return torch.cat(list(valley.weights().values()))

    assert torch.equal(run(False), run(True))


def test_asking_for_the_average_changes_nothing() -> None:
    asked: list[torch.Tensor] = []

    def look(valley: LossValley) -> LossValley:
        asked.append(valley.weights()["w"].clone())
        return valley

    for losses, *_, golden in GOLDEN:
        found, _ = coefficients(LossValley(SwadConfig()), losses, between=look)
        assert found == pytest.approx(np.array(golden) / sum(golden), abs=1e-6)
        assert found == asked[-1].tolist()


def test_a_tensor_that_never_moves_keeps_its_exact_value() -> None:
    mean = RunningMean()
    for _ in range(1000):
        mean.add({"w": torch.tensor([0.1, 1e-8])})
    assert torch.equal(mean.mean["w"], torch.tensor([0.1, 1e-8]))
