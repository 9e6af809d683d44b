"""Memory that there is, and memory that this process has."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from vlmkd import memory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are facts of the host")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """10,000 bytes are free; the folder in which control groups would be."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    return tmp_path


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_free_memory_is_the_machines_without_control_groups(machine: Path) -> None:
    assert memory.available() == 10_000
    (machine / "cgroup").write_text("0::/user.slice\n")
    group(machine / "groups/user.slice", memory__max="max", memory__current=5, memory__stat="anon 5")
    assert memory.available() == 10_000


def test_the_tightest_control_group_counts_without_the_page_cache(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/a/b\n")
    stat = "anon 1000\ninactive_file 300"
    group(machine / "groups/a/b", memory__max="max", memory__current=1, memory__stat="anon 1")
    (machine / "groups/a/memory.max").write_text("4000\n")
    (machine / "groups/a/memory.current").write_text("1300\n")
    (machine / "groups/a/memory.stat").write_text(stat)
    assert memory.available() == 4000 - (1300 - 300)


def test_a_container_sees_its_own_group_at_the_root(machine: Path) -> None:
    (machine / "cgroup").write_text("5:cpu:/docker/x\n4:memory:/docker/x\n")
    group(
        machine / "groups/memory",
        memory__limit_in_bytes=6000,
        memory__usage_in_bytes=2000,
        memory__stat="inactive_file 0\ntotal_inactive_file 500",
    )
    assert memory.available() == 6000 - 1500


def test_held_and_peak_are_of_this_process() -> None:
    before = memory.held()
    with mmap.mmap(-1, 50_000_000) as block:  # pages that no allocator had before
        block.write(bytes([1]) * len(block))
        assert memory.held() - before > 0.8 * len(block)
        assert memory.peak() >= memory.held() * 0.95
