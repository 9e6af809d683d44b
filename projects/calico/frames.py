"""Which reader a path needs."""

from __future__ import annotations

from pathlib import Path

from projects.calico.readers.argoverse import ArgoverseFrames
from projects.calico.readers.kitti import KittiFrames
from projects.calico.readers.mmdet3d import nuscenes_frames
from projects.calico.readers.nuscenes import Infos, NuScenesFrames
from projects.calico.readers.waymo import WaymoFrames
from projects.calico.scenes import Frames
from projects.calico.synthdrive import SynthdriveFrames
from vlmkd.config import require
from vlmkd.errors import UserError


def open_frames(path: Path, root: Path | None = None, *, sweeps: int = 9) -> Frames:
    """The frames of a folder or of an info file, whose paths are below `root` (else beside it).

    `sweeps`: past ones of a nuScenes frame; synthdrive gives those that it was written with, others the key sweep alone.
    """
    if (path / "synthdrive.json").is_file():
        return SynthdriveFrames.open(path)
    if any((path / name).is_file() for name in ("annotations_calib.json", "city_SE3_egovehicle.feather")):
        return ArgoverseFrames(path)
    if any((path / name).is_dir() for name in ("velodyne", "training/velodyne")):
        return KittiFrames.of_folder(path)
    if (path / "vehicle_pose").is_dir():
        return WaymoFrames.of_folder(path)
    if path.suffix == ".jsonl":
        infos = Infos(path)
        _check_sweeps(path, sweeps, infos.sweeps)
        return NuScenesFrames(infos, root or path.parent, sweeps)
    info = path if path.suffix in (".json", ".pkl") else path / "info.json"
    if info.is_file():
        if found := nuscenes_frames(info, root, sweeps):
            _check_sweeps(info, sweeps, max((len(one["sweeps"]) for one in found.records), default=0))
            return found
        return KittiFrames.of_info(info)
    raise UserError(
        f"{path} {'is' if path.exists() else 'does not exist, and is'} none of: a folder of KITTI (with velodyne/ or"
        " training/velodyne/, or mmdetection3d's info.json), of Argoverse 2 (a log, with city_SE3_egovehicle.feather), of Waymo (with"
        " vehicle_pose/), of synthdrive scenes, or an info file of nuScenes (.jsonl, or mmdetection3d's .pkl or .json)"
    )


def _check_sweeps(path: Path, wanted: int, there: int | None) -> None:
    """The key sweep stands in for past ones that the beginning of a drive lacks, and for no others."""
    told = f"is {wanted}, but info file {path} has {there} past sweeps of a frame; set it to {there}, or write the file"
    require(there is None or there >= wanted, "data.sweeps", f"{told} with {wanted}")
