"""Memory that a step frees serves the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from vlmkd.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    for size in (40_000_000, 60_000_000):
        torch.zeros(size, dtype=torch.uint8).add_(1)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    """Pages that five equal steps have to get anew after a first one."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    assert page_faults(keep=True) < page_faults(keep=False) / 2
