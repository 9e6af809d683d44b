"""The clock of the benchmarks."""

from __future__ import annotations

import time

import torch


def clock(device: str) -> float:
    """Seconds; CPU time on a CPU, so that other work beside does not count."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
