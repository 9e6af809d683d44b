"""The real frames of tests: never part of the repository, see `FRAMES`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FRAMES = Path(
    os.environ.get("VLMKD_BEV_SAMPLES") or Path(__file__).resolve().parents[4] / "shared/data/bev_samples"
)
"""Folder with `nuscenes`, `kitti`, `av2` and `nuscenes_schema_lyft`: $VLMKD_BEV_SAMPLES, else ../shared/data/bev_samples."""

needs_frames = pytest.mark.skipif(
    not (FRAMES / "nuscenes").is_dir(),
    reason=f"no real frames in {FRAMES}; set VLMKD_BEV_SAMPLES to their folder",
)
