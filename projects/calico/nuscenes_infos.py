"""Write the info file of a split of nuScenes from its official tables.

    python -m projects.calico.nuscenes_infos ROOT OUT.jsonl --version v1.0-trainval --split train

ROOT holds v1.0-trainval/, samples/, sweeps/ and maps/. A call that was interrupted goes on where it stopped. Files that the
records name are looked for at the end; `--no-check` leaves that out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tqdm import tqdm

from projects.calico.maps import missing_maps
from projects.calico.readers.nuscenes import Infos, Tables, header, info_record
from projects.calico.splits import nuscenes_scenes
from vlmkd.errors import UserError, at_least, run_tool

VERSIONS = dict(
    train="v1.0-trainval", val="v1.0-trainval", test="v1.0-test", mini_train="v1.0-mini", mini_val="v1.0-mini"
)


def build(root: Path, out: Path, version: str, split: str, *, sweeps: int = 10) -> Infos:
    """Write OUT and return what it holds."""
    tables = Tables(root, version)
    scenes, wanted = tables.scenes(), nuscenes_scenes(split)
    if missing := [name for name in wanted if name not in scenes]:
        there = f"{len(wanted) - len(missing)} of the {len(wanted)} scenes of {split}, not {missing[0]}"
        raise UserError(f"{tables.folder} has {there}; name the version of that split ({VERSIONS[split]})")
    samples = [sample for name in wanted for sample in scenes[name]]
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    # What an interrupted call with the same options wrote whole is kept; what it tore off is cut away.
    first = json.dumps(header(version, split) | {"sweeps": sweeps}) + "\n"
    content = partial.read_text("utf-8") if partial.is_file() else ""
    whole = content[: content.rfind("\n") + 1]
    whole = whole if whole.startswith(first) else first
    partial.write_text(whole, "utf-8")
    done = whole.count("\n") - 1
    with partial.open("a", encoding="utf-8") as file:
        for sample in tqdm(
            samples[done:], f"{version} {split}", initial=done, total=len(samples), mininterval=1
        ):
            record = info_record(tables, sample, sweeps)
            file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
    os.replace(partial, out)
    return Infos(out)


def missing_files(infos: Infos, root: Path) -> list[str]:
    """Sweeps and images that records name and the folder lacks."""
    named: dict[str, None] = {}
    for record in tqdm(infos, "look for files", mininterval=1):
        readings = (*record["sweeps"], *record["cams"].values())
        named |= dict.fromkeys([record["lidar"], *(one["path"] for one in readings)])
    return [file for file in named if not (root / file).is_file()]


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", required=True, choices=tuple(VERSIONS))
    parser.add_argument("--version", default="", help="folder of the tables; empty: the split's")
    parser.add_argument("--sweeps", type=at_least(0), default=10, help="past sweeps of a record (10)")
    parser.add_argument("--no-check", action="store_true", help="do not look for sweeps, images and maps")
    options = parser.parse_args(argv)
    version = options.version or VERSIONS[options.split]
    infos = build(options.root, options.out, version, options.split, sweeps=options.sweeps)
    scenes = {entry.scene for entry in infos.entries}
    print(f"{options.out}: {len(infos)} key frames of {len(scenes)} scenes")
    if options.no_check:
        return 0
    if missing := missing_files(infos, options.root):
        told = f"{len(missing)} files below {options.root} are missing, first {missing[0]}"
        raise UserError(f"{told}; fetch the archives that hold them")
    if absent := missing_maps(options.root, {entry.location for entry in infos.entries}):
        print(f"for map segmentation also fetch the map expansion (v1.3): {', '.join(absent)} missing")
    return 0


if __name__ == "__main__":
    run_tool(main)
