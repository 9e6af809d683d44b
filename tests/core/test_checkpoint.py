"""Damaged checkpoints are seen, reported and passed over; a full disk costs nothing that was saved."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmkd import checkpoint
from vlmkd.errors import UserError


class StubEngine:
    """Writes one file, or fails as a full disk does."""

    def __init__(self, full_disk: bool = False) -> None:
        self.full_disk = full_disk
        self.loaded: Path | None = None

    def save(self, folder: Path) -> None:
        """Write the stub's shard."""
        if self.full_disk:
            (folder / "model.bin").write_bytes(b"ha")
            raise OSError(28, "No space left on device")
        (folder / "model.bin").write_bytes(b"weights" * 100)

    def load(self, folder: Path) -> None:
        """Remember what was asked for."""
        self.loaded = folder


def _save(state_dir: Path, step: int, engine: Any = None) -> None:
    engine = engine or StubEngine()
    checkpoint.save(state_dir, step, engine, shared={"step": step}, per_rank={"x": torch.ones(2)}, keep=2)


def test_the_newest_stay_and_come_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    engine = StubEngine()
    newest = checkpoint.latest(tmp_path)
    shared, own = checkpoint.load(newest, engine)
    assert engine.loaded == newest
    assert shared == {"step": 3} and torch.equal(own["x"], torch.ones(2))


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "no_manifest"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    folder = tmp_path / "step_000020"
    target = folder / "model.bin"
    if damage == "truncate":
        target.write_bytes(target.read_bytes()[:-1])
    elif damage == "flip":
        target.write_bytes(b"W" + target.read_bytes()[1:])
    elif damage == "delete":
        target.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    logging.getLogger("vlmkd").propagate = True
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"
    assert "step_000020 is damaged" in caplog.text


def test_a_killed_save_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    shutil.copytree(tmp_path / "step_000010", tmp_path / ".partial_step_000020")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"
    _save(tmp_path, 20)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000020"


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_survives(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    with pytest.raises(UserError, match="step_000020 could not be written .*No space left.*free disk space"):
        _save(tmp_path, 20, StubEngine(full_disk=True))
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000010"]


def test_no_checkpoint_means_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
