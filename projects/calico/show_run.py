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
from projects.calico.config import CalicoConfig
from projects.calico.frames import open_frames
from projects.calico.model import BevOutput
from projects.calico.pipeline import evaluation_pipeline
from projects.calico.pretraining import Teacher
from projects.calico.regions import preset_of, regions_of
from projects.calico.scenes import DRIVING_AXIS, Frame, FrameKind
from projects.calico.show import (
    PREDICTION,
    TRUTH,
    Outlines,
    camera_view,
    facts,
    find,
    from_above,
    page,
    region_colours,
)
from vlmkd import config
from vlmkd.errors import UserError, run_tool
from vlmkd.files import write_text


def feature_picture(bev: Tensor, kind: FrameKind, side: int = 600) -> Image.Image:
    """A map [C, X, Y] as a square picture, the way that the car drives up."""
    _, x, y = bev.shape
    cells = bev.float().flatten(1).T
    cells = (cells - cells.mean(0)) / cells.std(0).clamp(min=1e-6)
    _, vectors = torch.linalg.eigh(cells.T @ cells / len(cells))
    main = vectors[:, -3:].flip(1)
    main = (
        main * main.gather(0, main.abs().argmax(0, keepdim=True)).sign()
    )  # an eigenvector has no sign of its own
    shown = cells @ main
    if shown.shape[1] < 3:
        shown = shown[:, :1].expand(-1, 3)
    low, high = (torch.quantile(shown, q, 0) for q in (0.02, 0.98))
    colours = ((shown - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).reshape(x, y, 3).numpy()
    # Rows from far ahead to behind, columns from left to right.
    up = colours[::-1, ::-1] if DRIVING_AXIS[kind] == "x" else colours.transpose(1, 0, 2)[::-1]
    picture = Image.fromarray((255 * up).astype(np.uint8))
    return picture.resize((side, side), Image.Resampling.NEAREST)


def drawn(cfg: CalicoConfig, frame: Frame, output: BevOutput, boxes: np.ndarray) -> dict[str, Image.Image]:
    """From above with regions and boxes, the maps that there are, and the cameras."""
    points = frame.points[frame.key]
    regions = regions_of(frame, preset_of(cfg.regions.preset))
    colours = region_colours(regions.region, regions.ground)
    outlines = [] if frame.labels is None else [Outlines(frame.labels.boxes, TRUTH)]
    outlines += [Outlines(boxes, PREDICTION)] if len(boxes) else []
    half = max(abs(bound) for bound in (*cfg.model.range[:2], *cfg.model.range[3:5]))
    found = {
        "true boxes green, found boxes red": from_above(frame.frame, points, colours, outlines, half=half)
    }
    teaches = "teacher, LiDAR" if cfg.stage == "rad" else "LiDAR"
    for name, bev in (
        (f"features of the {teaches}", output.lidar),
        ("features of the cameras", output.camera),
    ):
        if bev is not None:
            found[name] = feature_picture(bev[0].cpu(), frame.frame)
    for name, camera in frame.cameras.items():
        found[name] = camera_view(camera, points, colours, outlines, width=640, title=name)
    return found


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a finished run of RAD or fine-tuning")
    add(
        "--frame",
        default="0",
        help="its token, or its number (0), among the frames that the run was evaluated on",
    )
    add("--info", default="", help="other frames")
    add("--root", type=Path, help="folder that an info file's paths are below; else its own")
    add("--score", type=float, default=0.2, help="boxes below are left out (0.2)")
    add("--out", type=Path, default=Path("run.html"), help="the page (run.html)")
    args = parser.parse_args(argv)
    if not (args.run / "done.json").is_file():
        raise UserError(f"{args.run} is no finished run; name the folder of one (it has done.json)")
    cfg = config.load(CalicoConfig, [str(args.run / "config.yaml"), f"run_dir={args.run}"])
    if cfg.stage not in ("rad", "finetune"):
        raise UserError(
            f"{args.run} is a run of stage={cfg.stage}; boxes and maps of rad and finetune are drawn"
        )
    frames = open_frames(
        Path(args.info or cfg.evaluation.info or cfg.data.info), args.root, sweeps=cfg.data.sweeps
    )
    pipeline = evaluation_pipeline(cfg, frames)
    pipeline.layers = []
    index = find(frames, args.frame)
    frame = pipeline.read(index)
    batch = pipeline.collate([pipeline.prepare(frame, index)])
    model = exports.load(args.run / "export")
    boxes = np.empty((0, 9), np.float32)
    with torch.no_grad():
        output = model(batch["lidar"][0], batch.get("cameras"))
        if model.detection is not None:
            (seen,) = model.detection.decode(output.detection)
            boxes = seen.boxes[seen.scores >= args.score].numpy()
        if cfg.stage == "rad":
            teacher = Teacher(cfg).model.lidar
            assert teacher is not None
            output = output._replace(lidar=teacher(batch["lidar"][0]))
    told = facts(frame, regions_of(frame, preset_of(cfg.regions.preset)), cfg.regions.preset)
    told += f"; {len(boxes)} boxes found with a score of at least {args.score:g}" * (cfg.stage == "finetune")
    pictures = drawn(cfg, frame, output, boxes)
    write_text(args.out, page(pictures, f"{args.run.name}: {frame.frame} {frame.token}", told), "page")
    print(f"{args.out}: {told}")
    return 0


if __name__ == "__main__":
    run_tool(main)
