"""The two learning-rate schedules of the released scripts that are not the core's."""

from __future__ import annotations

from vlmkd.train.optim import half_cosine


def linear(step: int, steps: int, warmup: int) -> float:
    """Share of the peak: step / W, then (steps - step) / (steps - W); step 0 has rate 0 (docs/papers/dho.md, eq. 16)."""
    return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def warmup_times_cosine(step: int, steps: int, warmup: int) -> float:
    """min(1, 0.01 + 0.99 step / W) (1 + cos(pi step / (steps - W))) / 2.

    Both parts run from step 0, so the cosine ends W steps early and then rises again (low-shot ImageNet).
    """
    return min(1.0, 0.01 + 0.99 * step / warmup) * half_cosine(step / (steps - warmup))
