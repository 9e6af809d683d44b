"""Evaluate a finished fine-tuning run on damaged frames, and attack it by false points.

  python -m projects.calico.eval_robust runs/SCRATCH --results scratch.jsonl
  python -m projects.calico.eval_robust runs/NAME --scratch scratch.jsonl --results robust.jsonl
  python -m projects.calico.eval_robust runs/NAME --corruptions density fov_loss --severities 1 3 5 --attacks 60 200

Every model meets the same damage and the same attacks: they are functions of the frame. With --scratch, the results of
this command on a model that was trained from scratch, errors are told as shares of its errors (mCE).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from projects.calico.evaluate import Finished, finished, parser
from projects.calico.evaluation.frames import SceneEvaluation, scene_evaluation
from projects.calico.evaluation.robust import (
    CORRUPTIONS,
    OF_CAMERAS,
    SEVERITIES,
    corrupt,
    mean_corruption_error,
    plan_attack,
    spoof,
    succeeded,
    traces,
)
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.base import Result, progress
from vlmkd.results import Meaning, read_results

ATTACKS = (60, 100, 200)
"""False points of an attack (the paper's)."""
_SUCCESS = Meaning("attack success rate", "share", higher_is_better=False, main=True)
_ERROR = Meaning("mCE", "share", higher_is_better=False, main=True)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parser(__doc__ or "")
    add = options.add_argument
    add(
        "--corruptions",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(CORRUPTIONS)}; default: all that the model meets",
    )
    add("--severities", nargs="+", type=at_least(1), default=list(SEVERITIES), help="1 to 5 (all)")
    add(
        "--attacks",
        nargs="*",
        type=at_least(1),
        metavar="POINTS",
        help="false points; default: 60 100 200 with a LiDAR",
    )
    add("--scratch", type=Path, metavar="FILE", help="results of this command on the model from scratch")
    args = options.parse_args(argv)
    model = finished(args)
    points, images = (
        model.cfg.model.lidar.encoder != "none",
        model.cfg.model.camera.encoder != "none",
    )
    met = [name for name in CORRUPTIONS if (images if name in OF_CAMERAS else points)]
    names = met if args.corruptions is None else args.corruptions
    attacks = (ATTACKS if points else ()) if args.attacks is None else args.attacks
    scratch = _nds(args.scratch) if args.scratch else None
    results = _damaged(model, names, args.severities, scratch)
    results += _attacked(model, attacks) if attacks else []
    model.write(results, args.results)
    return 0


def dataset_name(data: str, name: str, severity: int) -> str:
    """How results call the frames under a corruption."""
    return f"{data} {name} {severity}"


def _damaged(
    model: Finished,
    names: Sequence[str],
    severities: Sequence[int],
    scratch: dict[tuple[str, int], float] | None,
) -> list[Result]:
    """Scores on whole frames, then under each corruption at each severity; and mCE, where it can be told."""
    plain = scene_evaluation(model.cfg)
    results = plain.run(model.predictor, model.context)
    found: dict[str, list[float]] = defaultdict(list)
    before: dict[str, list[float]] = defaultdict(list)
    for name in names:
        for severity in severities:
            dataset = dataset_name(plain.dataset, name, severity)
            change = partial(corrupt, name=name, severity=severity)
            own = replace(plain, change=change, dataset=dataset).run(model.predictor, model.context)
            results += own
            if scratch is not None:
                if (name, severity) not in scratch:
                    raise UserError(
                        f"--scratch has no NDS under {name} {severity}; run it with the same options"
                    )
                found[name] += [one.metrics["nds"] for one in own if "nds" in one.metrics]
                before[name].append(scratch[name, severity])
    if any(found.values()):
        mean, each = mean_corruption_error(found, before)
        metrics = {"mce": mean} | {f"ce_{name}": value for name, value in each.items()}
        meanings = {"mce": _ERROR} | {
            f"ce_{name}": Meaning(f"CE {name.replace('_', ' ')}", "share", higher_is_better=False)
            for name in each
        }
        results.append(Result("robust", plain.dataset, metrics, results[0].count, meanings=meanings))
    return results


def _nds(path: Path) -> dict[tuple[str, int], float]:
    """NDS by corruption and severity, of a results file of this command."""
    found = {}
    for number in read_results(path):
        *_, name, severity = ["", "", *number.dataset.split(" ")]
        if number.metric == "nds" and name in CORRUPTIONS and severity.isdecimal():
            found[name, int(severity)] = number.value
    return found


def _attacked(model: Finished, attacks: Sequence[int]) -> list[Result]:
    """The share of the attacked frames in which the false vehicle was seen."""
    evaluation: SceneEvaluation = scene_evaluation(model.cfg)
    pipeline, classes = evaluation.pipeline, model.cfg.model.classes
    known = traces(pipeline.read(index) for index in evaluation.indices)
    results = []
    for points in attacks:
        seen: list[bool] = []
        title = f"{evaluation.dataset} spoofed by {points} points"
        for index in progress(evaluation.indices, len(evaluation.indices), title, model.context):
            frame = pipeline.read(index)
            attack = plan_attack(frame, known, points)
            if attack is None:
                continue
            found = evaluation.predicted(model.predictor, [(spoof(frame, attack), index)], model.context)
            if found is None:
                raise UserError(
                    "the model finds no boxes, so that no false vehicle can be shown to it; use --attacks"
                )
            names = [classes[label] for label in found[0].labels.tolist()]
            boxes, scores = (part.float().cpu().numpy() for part in (found[0].boxes, found[0].scores))
            seen.append(succeeded(attack, boxes, names, scores))
        if seen:
            rate = {"attack_success": sum(seen) / len(seen)}
            results.append(Result("attack", title, rate, len(seen), meanings={"attack_success": _SUCCESS}))
    return results


if __name__ == "__main__":
    run_tool(main)
