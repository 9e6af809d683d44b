"""How many bytes of memory there are for this process, and how many it has taken."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_MEMBERSHIP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_OLD, _NEW = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def available() -> int:
    """Of the GPU, or of the machine as far as control groups let this process have it."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return min([psutil.virtual_memory().available, *(most - used for most, used in _group_limits())])


def held() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, use without page cache) of the Linux control groups around this process that have a limit."""
    lines = _MEMBERSHIP.read_text().splitlines() if _MEMBERSHIP.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        most, used = _OLD if controllers else _NEW
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if (group / most).is_file() and (text := (group / most).read_text().strip()) != "max":
                yield int(text), int((group / used).read_text()) - _page_cache(group)
            if group == root:
                break


def _page_cache(group: Path) -> int:
    stat = group / "memory.stat"
    fields = dict(line.split(" ", 1) for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))
