"""Find the regions of every key sweep of a data set and keep them for training.

    python -m projects.calico.region_cache DATA OUT --preset default --workers 8

DATA is what `projects.calico.frames.open_frames` takes: a folder of synthdrive scenes, of KITTI, of Argoverse 2, or an
info file of nuScenes. Each sweep gets a file of its own in OUT, whole or not at all; a call that was interrupted goes on
where it stopped, and one with another preset is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from projects.calico.frames import open_frames
from projects.calico.parallel import each
from projects.calico.readers.files import read_arrays
from projects.calico.regions import PRESETS, Preset, Regions, preset_of, regions_of
from projects.calico.scenes import DRIVING_AXIS, SENSOR_HEIGHT, FrameKind, Frames
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.files import new_file, new_folder

_VERSION = 1
"""Of the algorithm: with another one, cached regions are refused."""


@dataclass(frozen=True)
class RegionCache:
    """A folder with a file for each key sweep."""

    folder: Path
    preset: Preset

    def told(self, kind: FrameKind) -> dict[str, Any]:
        """Everything that the regions of a sweep depend on, beside its points."""
        own = {"sensor_height": SENSOR_HEIGHT[kind], "driving_axis": DRIVING_AXIS[kind], "version": _VERSION}
        return json.loads(json.dumps(asdict(self.preset) | own))

    def digest(self, kind: FrameKind) -> str:
        """The preset's hash: 16 hex digits of `told`."""
        return hashlib.sha256(json.dumps(self.told(kind), sort_keys=True).encode()).hexdigest()[:16]

    def path(self, token: str) -> Path:
        """The file of a frame."""
        return self.folder / f"{token}.npz"

    def write(self, token: str, kind: FrameKind, regions: Regions) -> None:
        """Keep the regions of a frame."""
        made = {"digest": self.digest(kind), "clusters": regions.clusters, "preset": self.told(kind)}
        with new_file(self.path(token), "region cache") as partial_file, partial_file.open("wb") as file:
            np.savez_compressed(file, region=regions.region, made=np.array(json.dumps(made)))

    def read(self, token: str, kind: FrameKind, points: int) -> np.ndarray:
        """int16 [n] of a frame with `points` points in its key sweep.

        Raises:
            UserError: no such file, a damaged one, or one of another preset or another sweep.
        """
        mend = f"run `python -m projects.calico.region_cache DATA {self.folder}`, or set regions.cache to nothing"
        what = f"region cache {self.path(token)}"
        found = read_arrays(self.path(token), "region cache", mend, ("region", "made"))
        region, then, now = found["region"], json.loads(str(found["made"]))["preset"], self.told(kind)
        if other := [key for key in now if then.get(key) != now[key]]:
            told = ", ".join(f"{key} {then.get(key)} and not {now[key]}" for key in other)
            raise UserError(
                f"{what} was made with another preset: {told}; set regions.preset to that one, or name another"
                " folder for this one"
            )
        if region.shape != (points,):
            raise UserError(
                f"{what} is of a sweep of {len(region)} points, and this one has {points}; {mend}"
            )
        return region


def build(
    data: Path, cache: RegionCache, *, root: Path | None = None, workers: int = 1
) -> list[tuple[int, int, int]]:
    """Write the files that are missing; (clusters, regions, points in regions) of each of those."""
    frames = open_frames(data, root, sweeps=0)
    new_folder(cache.folder, "region cache")
    there = [cache.path(token).exists() for token in frames.tokens]
    if any(there):  # the first that is there tells whose they are
        first = there.index(True)
        points = int(frames.read(first, cameras=False).key.sum())
        cache.read(frames.tokens[first], frames.kind, points)
    missing = [index for index, done in enumerate(there) if not done]
    return each(partial(_one, frames, cache), missing, workers, "regions", done=sum(there))


def _one(frames: Frames, cache: RegionCache, index: int) -> tuple[int, int, int]:
    frame = frames.read(index, cameras=False)
    regions = regions_of(frame, cache.preset)
    cache.write(frame.token, frame.frame, regions)
    return regions.clusters, regions.count, int((regions.region >= 0).sum())


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("frames", type=Path, metavar="DATA")
    add("out", type=Path)
    add("--root", type=Path, help="folder that an info file's paths are below; else its own")
    add("--preset", default="default", help=f"{' or '.join(PRESETS)} (default)")
    add("--workers", type=at_least(1), default=1, help="processes (1)")
    options = parser.parse_args(argv)
    cache = RegionCache(options.out, preset_of(options.preset))
    found = build(options.frames, cache, root=options.root, workers=options.workers)
    told = "nothing was missing"
    if found:
        clusters, regions, points = np.mean(found, 0)
        told = (
            f"{len(found)} sweeps; each has {clusters:.1f} clusters, {regions:.1f} regions and"
            f" {points:.0f} points in them on average"
        )
    print(f"{options.out}: {told}")
    return 0


if __name__ == "__main__":
    run_tool(main)
