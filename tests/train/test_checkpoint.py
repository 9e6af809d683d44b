"""Damaged checkpoints are seen, reported and passed over; a full disk costs nothing that was saved."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlmkd.errors import UserError
from vlmkd.train import checkpoint


class StubEngine:
    """Writes one file, or fails as a full disk does."""

    zero_stage = 1

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


def _forge(folder: Path, **changes: Any) -> None:
    """Change the manifest and give it its right digest, as somebody could who wants it to be believed."""
    facts = json.loads((folder / "manifest.json").read_text()) | changes
    facts.pop("sha256")
    facts = {name: value for name, value in facts.items() if value is not None}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(facts | {"sha256": digest}))


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "{}", "null", '{"files": []}', "[" * 100_000, b"\xff\x00", "flip"],
    ids=["list", "number", "empty", "null", "files", "deep", "binary", "one byte"],
)
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, text: str | bytes) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    manifest = tmp_path / "step_000020" / "manifest.json"
    if text == "flip":
        text = manifest.read_text().replace('"ranks": 1', '"ranks": 3')
    manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"


@pytest.mark.parametrize(
    "files", [None, [], {}, "x", {"other.pt": "0"}, {"shared.pt": 5}, {"shared.pt": "0"}]
)
def test_a_forged_list_of_files_is_damage(tmp_path: Path, files: Any) -> None:
    _save(tmp_path, 10)
    _forge(tmp_path / "step_000010", files=files)
    assert checkpoint.latest(tmp_path) is None


def test_a_file_in_the_place_of_a_checkpoint_is_damage(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    (tmp_path / "step_000030").write_text("no folder")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"
    _save(tmp_path, 30)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000030"


def test_damaged_checkpoints_do_not_count_among_the_kept(tmp_path: Path) -> None:
    """Two damaged ones with higher numbers: what is saved after them stays."""
    for step in (20, 24):
        _save(tmp_path, step)
        (tmp_path / f"step_{step:06d}" / "model.bin").write_bytes(b"torn")
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 15):
        _save(tmp_path, step)
        assert checkpoint.latest(tmp_path) == tmp_path / f"step_{step:06d}"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000010", "step_000015"]


@pytest.mark.parametrize(("fact", "value"), [("ranks", 3), ("deepspeed.zero_stage", 2)])
def test_another_number_of_ranks_or_stage_is_told(tmp_path: Path, fact: str, value: int) -> None:
    _save(tmp_path, 10)
    _forge(tmp_path / "step_000010", **{fact: value})
    engine = StubEngine()
    with pytest.raises(UserError, match=f"written with {fact}={value} and this run has 1"):
        checkpoint.load(checkpoint.latest(tmp_path), engine)
    assert engine.loaded is None


def test_a_state_that_does_not_fit_the_model_is_told(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    engine = StubEngine()
    engine.load = lambda folder: nn.Linear(2, 3).load_state_dict(nn.Linear(2, 2).state_dict())  # type: ignore[method-assign]
    with pytest.raises(UserError, match="step_000010 does not fit this run .*size mismatch"):
        checkpoint.load(checkpoint.latest(tmp_path), engine)


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


@pytest.mark.parametrize("place", ["mkdir", "write_text"])
def test_a_disk_that_is_full_before_or_after_the_weights_is_one_line(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 10)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, place, full)
    with pytest.raises(UserError, match="step_000020 could not be written .*No space left.*free disk space"):
        _save(tmp_path, 20)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000010"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"


def test_no_checkpoint_means_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
