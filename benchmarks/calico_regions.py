"""CALICO's regions: ground, DBSCAN against scikit-learn's on the same points, and the whole of a sweep, as a Markdown table.

    python benchmarks/calico_regions.py [--rounds 3] [--frames FOLDER]

Seconds of one CPU thread, the least of some rounds, the two DBSCANs in turns; it fails unless they agree on every point.
Sweeps of growing size are drawn: a road with stacked walls and things, whose points have neighbours by the thousand. With
FOLDER (or $VLMKD_BEV_SAMPLES) its real frames follow; last, what a scene of the toy world costs. scikit-learn is no
requirement: `pip install scikit-learn`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from projects.calico.frames import open_frames  # noqa: E402
from projects.calico.regions import PRESETS, dbscan2d, gpf, propose, regions_of  # noqa: E402
from projects.calico.scenes import DRIVING_AXIS, SENSOR_HEIGHT, Axis  # noqa: E402
from projects.calico.synthdrive import generate  # noqa: E402

Sweep = tuple[str, np.ndarray, float, Axis]
_SCENES = 20


def drawn(points: int) -> Sweep:
    """Half of the points on the road, a third on walls of 64 stacked rows, the rest on things."""
    rng = np.random.default_rng(points)
    radius, angle = rng.uniform(3, 50, points // 2), rng.uniform(0, 2 * np.pi, points // 2)
    road = np.column_stack([radius * np.cos(angle), radius * np.sin(angle), np.full(points // 2, -1.8)])
    spots = np.repeat(rng.uniform(-50, 50, (points // 192, 2)), 64, 0) * [1, 0.02] + [0, 15]
    walls = np.column_stack([spots + rng.normal(0, 0.02, spots.shape), rng.uniform(-1.5, 6, len(spots))])
    count = points - len(road) - len(walls)
    middle = rng.uniform(-50, 50, (60, 2))[rng.integers(60, size=count)]
    things = np.column_stack([middle + rng.uniform(-1, 1, (count, 2)), rng.uniform(-1.5, 0.5, count)])
    return f"drawn, {points // 1000} k", np.concatenate([road, walls, things]).astype(np.float32), 1.8, "y"


def sweeps(folder: Path | None) -> Iterator[Sweep]:
    yield from (drawn(points) for points in (10_000, 30_000, 100_000, 300_000))
    for name in ("nuscenes", "kitti", "av2"):
        if folder and (folder / name).is_dir():
            frame = open_frames(folder / name, sweeps=0).read(0, cameras=False)
            yield name, frame.points, SENSOR_HEIGHT[frame.frame], DRIVING_AXIS[frame.frame]


def in_turns(rounds: int, *forms: Callable[[], Any]) -> tuple[list[float], list[Any]]:
    """Least seconds of each form, and what each gives."""
    least, found = [float("inf")] * len(forms), [None] * len(forms)
    for _ in range(rounds):
        for n, form in enumerate(forms):
            begin = time.process_time()
            found[n] = form()
            least[n] = min(least[n], time.process_time() - begin)
    return least, found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=Path, default=os.environ.get("VLMKD_BEV_SAMPLES"))
    options = parser.parse_args()
    from sklearn.cluster import DBSCAN

    preset = PRESETS["default"]
    theirs = DBSCAN(eps=preset.eps, min_samples=preset.min_samples)
    print(
        "| sweep | points | off the ground | clusters | scikit-learn s | ours s | times faster | ground s | whole s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, points, height, axis in sweeps(options.frames and Path(options.frames)):
        high = points[~gpf(points, height, axis)]
        xy = high[(np.abs(high[:, :2]) <= preset.extent).all(1), :2]
        (slow, fast), (known, found) = in_turns(
            options.rounds,
            lambda xy=xy: theirs.fit_predict(xy),  # type: ignore[misc]
            lambda xy=xy: dbscan2d(xy, preset.eps, preset.min_samples),  # type: ignore[misc]
        )
        if not np.array_equal(known, found):
            raise SystemExit(f"{name}: {(known != found).sum()} of {len(xy)} points are in other clusters")
        (ground, whole), _ = in_turns(
            options.rounds,
            lambda p=points, h=height, a=axis: gpf(p, h, a),  # type: ignore[misc]
            lambda p=points, h=height, a=axis: propose(p, preset, h, a).region,  # type: ignore[misc]
        )
        cells = [name, len(points), len(xy), found.max() + 1]
        times = [f"{slow:.3f}", f"{fast:.3f}", f"{slow / fast:.0f}", f"{ground:.3f}", f"{whole:.3f}"]
        print("| " + " | ".join(str(cell) for cell in [*cells, *times]) + " |", flush=True)
    forms = {
        "without pictures": lambda: [generate(n, image_size=(0, 0)) for n in range(_SCENES)],
        "with four": lambda: [generate(n) for n in range(_SCENES)],
        "regions": lambda: [regions_of(frame, preset) for frame in frames],
    }
    frames = forms["without pictures"]()
    seconds, _ = in_turns(options.rounds, *forms.values())
    told = ", ".join(f"{name} {value / _SCENES:.3f} s" for name, value in zip(forms, seconds, strict=True))
    print(f"\nA scene of synthdrive, mean of {_SCENES}: {told}")


if __name__ == "__main__":
    main()
