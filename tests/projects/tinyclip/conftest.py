"""Tiny TinyCLIP runs on synthetic data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.projects.tinyclip.tiny_runs import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Configs and runs in a temporary folder."""
    return Runs(tmp_path)
