"""Where the time of a step goes, without stalling a GPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "V100": 125,
}  # fmt: skip
"""Dense half-precision TFLOP/s by the maker's data sheets; the first that is part of the device's name counts."""


def peak_tflops() -> float:
    """Of this process's GPU; 0: not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), 0)


class Stopwatch:
    """Sums named spans; on CUDA by events, read only when asked."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._cuda = torch.cuda.is_available()  # asked once: it costs more than a short span

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name`."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds per name since the last call."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000.0
        seconds, self._seconds = self._seconds, defaultdict(float)
        self._events.clear()
        return seconds
