"""Evaluate a finished fine-tuning run on labelled frames: detection scores, map overlap, and a submission file.

  python -m projects.calico.evaluate runs/NAME --info DATA --results out.jsonl
  python -m projects.calico.evaluate runs/NAME --info val.jsonl --root /data/nuscenes --submission results.json
  python -m projects.calico.evaluate runs/NAME --info val.jsonl --root /data/nuscenes --boxes results.json

RUN is a run folder; its config says how frames are read, and its export has the weights. DATA is what
`projects.calico.frames.open_frames` takes; by default the frames that the run was evaluated on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from projects.calico import export as exports
from projects.calico.config import CalicoConfig
from projects.calico.evaluation.frames import scene_evaluation
from projects.calico.task import BevPredictor
from vlmkd import config, distributed
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.base import Context, Result
from vlmkd.export.folder import PROVENANCE
from vlmkd.files import check_writable, read_object
from vlmkd.results import STUDENT, Tags, details_of, numbers_of, write_results


@dataclass(frozen=True)
class Finished:
    """A run's model, ready to be evaluated."""

    cfg: CalicoConfig
    """Of the run, with the frames that were asked for."""
    predictor: BevPredictor
    context: Context
    run: str
    tags: Tags

    def write(self, results: Sequence[Result], path: Path | None) -> None:
        """Print the numbers, and write a line each into `path`, details beside it."""
        for result in results:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            print(f"{result.dataset}  {result.name}  {shown}")
        if path is not None:
            numbers = numbers_of(results, run=self.run, model=STUDENT, tags=self.tags)
            write_results(path, numbers, details_of({STUDENT: results}), "--results")


def parser(text: str) -> argparse.ArgumentParser:
    """Options of every evaluation command."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a finished fine-tuning run")
    add("--info", default="", help="labelled frames; default: those of the run's own evaluation")
    add(
        "--root",
        default="",
        help="folder that an info file's paths are below; else that of --info, or the run's",
    )
    add("--frames", type=at_least(0), help="so many frames, drawn from all; 0: all (the run's)")
    add("--batch-size", type=at_least(1), help="frames at a time (the run's)")
    add("--device", default="", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    add("--results", type=Path, metavar="FILE", help="write a line a number to FILE, and details beside it")
    return made


def config_of(run: Path, *given: str) -> CalicoConfig:
    """The config of a finished run, with other `field=value`."""
    if not (run / "done.json").is_file():
        raise UserError(f"{run} is no finished run; name the folder of one (it has done.json)")
    return config.load(CalicoConfig, [str(run / "config.yaml"), f"run_dir={run}", *given])


def finished(args: argparse.Namespace) -> Finished:
    """The model of the options' run."""
    run: Path = args.run
    given: list[str] = []
    if args.info:
        given.append(f"evaluation.info={args.info}")
    if args.info or args.root:
        given.append(f"evaluation.data_root={args.root}")
    if args.frames is not None:
        given.append(f"evaluation.frames={args.frames}")
    cfg = config_of(run, *given)
    if cfg.stage != "finetune":
        raise UserError(
            f"{run} is a run of stage={cfg.stage}, which has no heads; name one of stage=finetune"
        )
    if not cfg.evaluation.info:
        raise UserError(f"{run} was not evaluated; name labelled frames by --info")
    if args.results:
        check_writable(args.results, "--results")
    context = Context(distributed.device_named(args.device), args.batch_size or cfg.evaluation.batch_size)
    model = exports.load(run / "export").to(context.device)
    tags = read_object(run / "export" / PROVENANCE, "provenance of an export")["calico"]
    return Finished(cfg, BevPredictor(model), context, run.name, {"seed": cfg.seed} | tags)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parser(__doc__ or "")
    options.add_argument(
        "--submission", type=Path, metavar="FILE", help="write the boxes for the nuScenes server"
    )
    told = "score the boxes of such a file, instead of the model's"
    options.add_argument("--boxes", type=Path, metavar="FILE", help=told)
    args = options.parse_args(argv)
    if args.submission:
        check_writable(args.submission, "--submission")
    model = finished(args)
    evaluation = scene_evaluation(model.cfg, submission=args.submission)
    given = [evaluation.of_file(args.boxes)] if args.boxes else None
    model.write(given or evaluation.run(model.predictor, model.context), args.results)
    return 0


if __name__ == "__main__":
    run_tool(main)
