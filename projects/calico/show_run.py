"""Draw what a finished run makes of a frame: boxes found and true, and the maps of its branches side by side.

    python -m projects.calico.show_run RUN --frame 0 --out run.html

RUN is a fine-tuning run, or one of RAD, whose teacher's map is then drawn beside the student's. Features are shown by their
three main directions of change, as red, green and blue, of each map by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from projects.calico import export as exports
from projects.calico.evaluate import config_of
from projects.calico.frames import open_frames
from projects.calico.pipeline import evaluation_pipeline
from projects.calico.pretraining import Teacher
from projects.calico.regions import preset_of, regions_of
from projects.calico.scenes import DRIVING_AXIS, FrameKind
from projects.calico.show import facts, find, page, pictures
from vlmkd.errors import UserError, run_tool
from vlmkd.files import write_text


def feature_picture(bev: Tensor, kind: FrameKind, side: int = 600) -> Image.Image:
    """A map [C, X, Y] as a square picture, the way that the car drives up."""
    cells = bev.float().flatten(1).T
    cells = (cells - cells.mean(0)) / cells.std(0).clamp(min=1e-6)
    _, vectors = torch.linalg.eigh(cells.T @ cells / len(cells))
    main = vectors[:, -3:].flip(1)
    # An eigenvector has no sign of its own.
    main = main * main.gather(0, main.abs().argmax(0, keepdim=True)).sign()
    shown = cells @ main
    if shown.shape[1] < 3:
        shown = shown[:, :1].expand(-1, 3)
    low, high = (torch.quantile(shown, q, 0) for q in (0.02, 0.98))
    colours = ((shown - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).reshape(*bev.shape[1:], 3).numpy()
    # Rows from far ahead to behind, columns from left to right.
    up = colours[::-1, ::-1] if DRIVING_AXIS[kind] == "x" else colours.transpose(1, 0, 2)[::-1]
    return Image.fromarray((255 * up).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a finished run of RAD or fine-tuning")
    add("--frame", default="0", help="token or number (0), among the frames that the run was evaluated on")
    add("--info", default="", help="other frames")
    add(
        "--root",
        type=Path,
        help="folder that an info file's paths are below; else that of --info, or the run's",
    )
    add("--score", type=float, default=0.2, help="boxes below are left out (0.2)")
    add("--out", type=Path, default=Path("run.html"), help="the page (run.html)")
    args = parser.parse_args(argv)
    cfg = config_of(args.run)
    if cfg.stage not in ("rad", "finetune"):
        told = f"is a run of stage={cfg.stage}; boxes and maps of rad and finetune are drawn"
        raise UserError(f"{args.run} {told}")
    own = (
        (cfg.evaluation.info, cfg.evaluation.data_root)
        if cfg.evaluation.info
        else (cfg.data.info, cfg.data.root)
    )
    info, root = (args.info, args.root) if args.info else (own[0], args.root or own[1])
    frames = open_frames(Path(info), Path(root) if root else None, sweeps=cfg.data.sweeps)
    pipeline = evaluation_pipeline(cfg, frames)
    pipeline.layers = []
    index = find(frames, args.frame)
    frame = pipeline.read(index)
    batch = pipeline.collate([pipeline.prepare(frame, index)])
    model = exports.load(args.run / "export")
    boxes = None
    with torch.no_grad():
        output = model(batch["lidar"][0], batch.get("cameras"))
        if model.detection is not None:
            (seen,) = model.detection.decode(output.detection)
            boxes = seen.boxes[seen.scores >= args.score].numpy()
        maps = {"features of the LiDAR": output.lidar, "features of the cameras": output.camera}
        if cfg.stage == "rad":
            torch.manual_seed(cfg.seed)  # an untrained one has the run's weights
            teacher = Teacher(cfg).model.lidar
            assert teacher is not None
            maps = {"features of the teacher, LiDAR": teacher(batch["lidar"][0]), **maps}
    regions = regions_of(frame, preset_of(cfg.regions.preset))
    told = facts(frame, regions, cfg.regions.preset)
    if boxes is not None:
        told += f"; {len(boxes)} boxes found with a score of at least {args.score:g}"
    half = max(abs(bound) for bound in (*cfg.model.range[:2], *cfg.model.range[3:5]))
    (name, above), *views = pictures(frame, regions, half, found=boxes).items()
    features = {n: feature_picture(bev[0].cpu(), frame.frame) for n, bev in maps.items() if bev is not None}
    drawn = {name: above, **features, **dict(views)}
    write_text(args.out, page(drawn, f"{args.run.name}: {frame.frame} {frame.token}", told), "page")
    print(f"{args.out}: {told}")
    return 0


if __name__ == "__main__":
    run_tool(main)
