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
    assert keep_freed_memory(varied={varied})
def step():
    for size in {sizes}:
        torch.zeros(size, dtype=torch.uint8).add_(1)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool, varied: bool = False, sizes: tuple[int, ...] = (40_000_000, 60_000_000)) -> int:
    """Pages that five equal steps have to get anew after a first one."""
    program = PROGRAM.format(keep=keep, varied=varied, sizes=sizes)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    assert page_faults(keep=True) < page_faults(keep=False) / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_of_varied_batches_the_largest_are_given_back_and_others_kept() -> None:
    small = (20_000_000, 30_000_000)
    assert page_faults(True, True, small) < page_faults(True, True) / 2
