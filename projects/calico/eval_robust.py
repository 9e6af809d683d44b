"""Evaluate a finished fine-tuning run on damaged frames, and attack it by false points.

  python -m projects.calico.eval_robust runs/SCRATCH --results scratch.jsonl
  python -m projects.calico.eval_robust runs/NAME --scratch scratch.jsonl --results robust.jsonl
  python -m projects.calico.eval_robust runs/NAME --corruptions density fov_loss --severities 1 3 5 --attacks 60 200

Every model meets the same damage and the same attacks: they are functions of the frame. With --scratch, the results of
this command on a model that was trained from scratch, errors are told as shares of its errors (mCE).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from projects.calico.evaluate import Finished, finished, parser
from projects.calico.evaluation import robust
from projects.calico.evaluation.frames import SceneEvaluation, scene_evaluation
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.base import Result, progress
from vlmkd.results import Meaning, read_results

ATTACKS = (60, 100, 200)
"""False points of an attack (the paper's)."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    options, known = parser(__doc__ or ""), robust.CORRUPTIONS
    add = options.add_argument
    told = f"of {', '.join(known)}; default: all that the model meets"
    add("--corruptions", nargs="*", metavar="NAME", help=told)
    add("--severities", nargs="+", type=at_least(1), default=list(robust.SEVERITIES), help="1 to 5 (all)")
    told = "false points; default: 60 100 200 with a LiDAR"
    add("--attacks", nargs="*", type=at_least(1), metavar="POINTS", help=told)
    add("--scratch", type=Path, metavar="FILE", help="results of this command on the model from scratch")
    args = options.parse_args(argv)
    model = finished(args)
    points, images = (part.encoder != "none" for part in (model.cfg.model.lidar, model.cfg.model.camera))
    met = [name for name in known if (images if name in robust.OF_CAMERAS else points)]
    names = met if args.corruptions is None else args.corruptions
    finds = model.cfg.model.head.detection != "none"
    attacks = (ATTACKS if points and finds else ()) if args.attacks is None else args.attacks
    if attacks and not finds:
        raise UserError("--attacks: the model finds no boxes, so that no false vehicle can be shown to it")
    evaluation = scene_evaluation(model.cfg)
    # What can go wrong does so before the hours, not after them.
    pairs = [(name, severity) for name in names for severity in args.severities]
    for pair in pairs:
        robust.check(*pair)
    before = _nds(args.scratch) if args.scratch else {}
    if lacking := [pair for pair in pairs if args.scratch and pair not in before]:
        told = f"{lacking[0][0]} {lacking[0][1]}; run it with the same options"
        raise UserError(f"--scratch has no NDS under {told}")
    read = evaluation.pipeline.read
    vehicles = robust.traces(read(index) for index in evaluation.indices) if attacks else []
    for most in attacks:
        robust.fitting(vehicles, most)
    results = damaged(model, evaluation, pairs, before)
    results += attacked(model, evaluation, attacks, vehicles)
    model.write(results, args.results)
    return 0


def damaged(
    model: Finished,
    plain: SceneEvaluation,
    pairs: Sequence[tuple[str, int]],
    before: Mapping[tuple[str, int], float],
) -> list[Result]:
    """Scores on whole frames, then under each corruption and severity; and mCE, where `before` has their NDS from scratch."""
    results = plain.run(model.predictor, model.context)
    found: dict[str, list[float]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    for name, severity in pairs:
        title = f"{plain.dataset} {name} {severity}"
        change = partial(robust.corrupt, name=name, severity=severity)
        own = replace(plain, change=change, dataset=title).run(model.predictor, model.context)
        results += own
        if before:
            found[name] += [one.metrics["nds"] for one in own if "nds" in one.metrics]
            others[name].append(before[name, severity])
    if any(found.values()):
        mean, each = robust.mean_corruption_error(found, others)
        lower = partial(Meaning, unit="share", higher_is_better=False)
        meanings = {"mce": lower("mCE", main=True)}
        meanings |= {f"ce_{name}": lower(f"CE {name.replace('_', ' ')}") for name in each}
        metrics = {"mce": mean} | {f"ce_{name}": value for name, value in each.items()}
        results.append(Result("robust", plain.dataset, metrics, results[0].count, meanings=meanings))
    return results


def _nds(path: Path) -> dict[tuple[str, int], float]:
    """NDS by corruption and severity, of a results file of this command."""
    found = {}
    for number in read_results(path):
        *_, name, severity = ["", "", *number.dataset.split(" ")]
        if number.metric == "nds" and name in robust.CORRUPTIONS and severity.isdecimal():
            found[name, int(severity)] = number.value
    return found


def attacked(
    model: Finished, evaluation: SceneEvaluation, attacks: Sequence[int], known: Sequence[robust.Trace]
) -> list[Result]:
    """The share of the attacked frames in which the false vehicle, one of the known traces, was seen."""
    pipeline, classes, frames = evaluation.pipeline, model.cfg.model.classes, evaluation.indices
    meaning = Meaning("attack success rate", "share", higher_is_better=False, main=True)
    results = []
    for points in attacks:
        seen: list[bool] = []
        title = f"{evaluation.dataset} spoofed by {points} points"
        for index in progress(frames, len(frames), title, model.context):
            frame = pipeline.read(index)
            attack = robust.plan_attack(frame, known, points)
            if attack is None:
                continue
            shown = robust.spoof(frame, attack)
            found, _ = evaluation.predicted(model.predictor, [(shown, index)], model.context)
            assert found is not None
            boxes, scores, labels = (part.cpu().numpy() for part in found[0])
            seen.append(robust.succeeded(attack, boxes, [classes[label] for label in labels], scores))
        if seen:
            rate = {"attack_success": sum(seen) / len(seen)}
            results.append(Result("attack", title, rate, len(seen), meanings={"attack_success": meaning}))
    return results


if __name__ == "__main__":
    run_tool(main)
