"""Find the regions of every key sweep of a data set and keep them for training.

    python -m projects.calico.region_cache DATA OUT --preset default --workers 8

DATA is what `projects.calico.frames.open_frames` takes: a folder of synthdrive scenes, of KITTI, of Argoverse 2, or an
info file of nuScenes. Each sweep gets a file of its own in OUT, whole or not at all; a call that was interrupted goes on
where it stopped, and one with another preset is refused.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from projects.calico.frames import open_frames
from projects.calico.parallel import each
from projects.calico.regions import PRESETS, RegionCache, preset_of, regions_of
from projects.calico.scenes import Frames
from vlmkd.errors import at_least, run_tool
from vlmkd.files import new_folder


def build(
    data: Path, cache: RegionCache, *, root: Path | None = None, workers: int = 1
) -> list[tuple[int, int, int]]:
    """Write the files that are missing; (clusters, regions, points in regions) of each of those.

    Raises:
        UserError: the folder has files of another preset; a frame that cannot be read.
    """
    frames = open_frames(data, root, sweeps=0)
    new_folder(cache.folder, "region cache")
    missing = []
    for index, token in enumerate(frames.tokens):
        if not cache.path(token).exists():
            missing.append(index)
        elif len(missing) == index:  # the first that is there tells whose they are
            cache.read(token, frames.kind, int(frames.read(index, cameras=False).key.sum()))
    return each(
        partial(_one, frames, cache), missing, workers, "regions", done=len(frames.tokens) - len(missing)
    )


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
    parser.add_argument("frames", type=Path, metavar="DATA")
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, help="folder that an info file's paths are below; else its own")
    parser.add_argument("--preset", default="default", help=f"{' or '.join(PRESETS)} (default)")
    parser.add_argument("--workers", type=at_least(1), default=1, help="processes (1)")
    options = parser.parse_args(argv)
    cache = RegionCache(options.out, preset_of(options.preset))
    found = build(options.frames, cache, root=options.root, workers=options.workers)
    if found:
        clusters, regions, points = (sum(column) / len(found) for column in zip(*found, strict=True))
        print(
            f"{options.out}: {len(found)} sweeps; each has {clusters:.1f} clusters, {regions:.1f} regions and"
            f" {points:.0f} points in them on average"
        )
    else:
        print(f"{options.out}: nothing was missing")
    return 0


if __name__ == "__main__":
    run_tool(main)
