"""Which reader a path needs."""

from __future__ import annotations

from pathlib import Path

from projects.calico.readers.argoverse import ArgoverseFrames
from projects.calico.readers.kitti import KittiFrames
from projects.calico.scenes import Frames
from vlmkd.errors import UserError


def open_frames(path: Path, root: Path | None = None) -> Frames:
    """The frames of a folder or of an info file, whose paths are below `root` (else beside it).

    Raises:
        UserError: it is none of those that there are readers for.
    """
    del root
    if (path / "annotations_calib.json").is_file():
        return ArgoverseFrames(path)
    if any((path / name).is_dir() for name in ("velodyne", "training/velodyne")):
        return KittiFrames.of_folder(path)
    if (path / "info.json").is_file():
        return KittiFrames.of_info(path / "info.json")
    raise UserError(
        f"{path} {'is' if path.exists() else 'does not exist, and is'} none of: a folder of KITTI (with velodyne/ or"
        " training/velodyne/, or mmdetection3d's info.json), of Argoverse 2 (with annotations_calib.json), of synthdrive"
        " scenes, or an info file of nuScenes (.jsonl)"
    )
