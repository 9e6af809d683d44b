"""A checkpoint of the released VL2V-ADiP code -> a run folder with its export and its results.

    python -m projects.vl2v_adip.convert_vl2v TE0_best.pth RUN_FOLDER CONFIG.yaml [...] [field=value ...]

CONFIG and fields are those of the run that could have made the file; held-out domain, trial seed and stage are the
file's where it tells them. Distill starts from the folder with `legacy_norm=true`, because the released code feeds
everything ImageNet's statistics. Released files are `{args, model_hparams, test_envs, model_dict}`; nothing in them is
executed.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.vl2v_adip.build import VECTORS, assemble, fill, student_backbone
from projects.vl2v_adip.config import LINEAR_HEAD, Vl2vConfig
from projects.vl2v_adip.folds import FACTS
from projects.vl2v_adip.task import BEST
from vlmkd import distributed
from vlmkd.config import load, require
from vlmkd.datasets.labelled_sets import configured_set
from vlmkd.errors import UserError, run_tool
from vlmkd.evaluation.base import Context
from vlmkd.export.classifier import export_classifier, load_classifier
from vlmkd.files import write_json
from vlmkd.models.backbones import Backbone, load_backbone_weights
from vlmkd.results import FILE, details_of, numbers_of, write_results
from vlmkd.tensor_files import read_torch

BACKBONE, PROJECTOR, CLASSIFIERS = "featurizer.network.", "proj_lyr.", ("clip_cls.", "classifier.")
_METHODS = {"DFC_STAGE1": "align", "DFC_STAGE2": "distill", "DFC_CLIP_INIT": "vl2v_sd"}
"""The released code's class of each stage."""
_OF_THE_FILE = "of the file"
"""Stands for the held-out domain until its name is known."""


_PLAIN = [
    *(
        (kind, f"{module}.{kind.__name__}")
        for kind in (pathlib.PosixPath, pathlib.PurePosixPath)
        for module in ("pathlib", "pathlib._local")  # as the Python called it that wrote the file
    ),
    argparse.Namespace,
    (OrderedDict, "munch.Munch"),  # a dictionary whose keys are attributes too
    (
        type("Number", (float,), {}),
        "ruamel.yaml.scalarfloat.ScalarFloat",
    ),  # which remembers how it was written
]
"""What a released file holds beside tensors and plain data; no package is imported for it."""


class Released(NamedTuple):
    """Of a released file: `model_dict`, the one of `test_envs`, and `args`."""

    weights: dict[str, Tensor]
    test_env: int
    facts: dict[str, Any]


def read_checkpoint(path: Path) -> Released:
    """A released checkpoint; refuses other content, and a pickle that names what the code never put there."""
    content = read_torch(path, what="checkpoint", plain=_PLAIN)
    state = content.get("model_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint {path} has no model_dict of tensors; it is not of the released code")
    # DataParallel has a prefix.
    weights = {str(name).removeprefix("module."): value for name, value in state.items()}
    args = content.get("args", {})
    match content.get("test_envs"):
        case [int(held_out)]:
            return Released(weights, held_out, dict(args if isinstance(args, Mapping) else vars(args)))
        case other:
            raise UserError(f"checkpoint {path} has test_envs {other!r}; it needs the one held-out domain")


def student_weights(state: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """A released `model_dict` in the names of our student; `backbone` is filled with it."""
    if unknown := [name for name in state if not name.startswith((BACKBONE, PROJECTOR, *CLASSIFIERS))]:
        raise UserError(f"checkpoint has unknown tensors: {', '.join(unknown[:3])}")

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}

    classifiers = [found for prefix in CLASSIFIERS if (found := below(prefix))]
    heads = [found["weight"].float() for found in classifiers if "weight" in found]
    if not heads or not torch.equal(heads[0], heads[-1]):
        raise UserError("checkpoint has no text classifier, or two that differ")
    if any(bool(found["bias"].any()) for found in classifiers if "bias" in found):
        raise UserError("checkpoint's text classifier has a bias, which the method does not train")
    shortest, longest = heads[0].norm(dim=-1).aminmax()
    if not math.isclose(float(shortest), float(longest), rel_tol=1e-2):
        raise UserError(
            "rows of the checkpoint's text classifier differ in length; they are no scaled unit vectors"
        )
    load_backbone_weights(backbone, below(BACKBONE), f"checkpoint ({backbone.source})")
    weights = {f"backbone.{name}": value for name, value in backbone.module.state_dict().items()}
    weights |= {f"projector.layers.0.{name}": value.float() for name, value in below(PROJECTOR).items()}
    return weights | {VECTORS: F.normalize(heads[0], dim=1)}


def convert(path: Path, run_dir: Path, arguments: list[str]) -> None:
    """Write `run_dir`/export and the table's results; `arguments` are those of the run."""
    weights, test_env, told = read_checkpoint(path)
    fields = [f"run_dir={run_dir}", f"fold.test_domain={_OF_THE_FILE}", *arguments]
    if "trial_seed" in told:
        fields.append(f"fold.trial_seed={told['trial_seed']}")
    if told.get("algorithm") in _METHODS:
        fields.append(f"method={_METHODS[told['algorithm']]}")
    cfg = load(Vl2vConfig, [*fields, "legacy_norm=true", "student.pretrained=false"])
    require(cfg.method not in LINEAR_HEAD, "method", f"is {cfg.method}, whose released files are not read")
    dataset = configured_set(cfg.data)
    count = len(dataset.domains)
    if not 0 <= test_env < count:
        raise UserError(f"checkpoint {path} holds out domain {test_env}; {dataset.name} has {count}")
    domain, given = dataset.domains[test_env], cfg.fold.test_domain
    require(given in (_OF_THE_FILE, domain), "fold.test_domain", f"is {given!r}; {path} holds out {domain}")
    cfg = replace(cfg, fold=replace(cfg.fold, test_domain=domain))
    job = assemble(cfg)
    task: Any = job.task
    fill(task.core, student_weights(weights, student_backbone(cfg)), f"checkpoint {path}")
    export = run_dir / "export"
    provenance = {"converted_from": path.name, "vl2v_adip": task.facts}
    export_classifier(export, task.exported, task.core.state_dict(), provenance=provenance)
    write_json(export / FACTS, task.facts)
    print(f"wrote {export}: {cfg.method}, {domain} held out, trial seed {cfg.fold.trial_seed}", flush=True)
    predictor = load_classifier(export)
    predictor.module.to(device := distributed.device())
    context = Context(device=device, batch_size=cfg.evaluation.batch_size)
    evaluators = [*job.evaluators, *job.final_evaluators]
    results = [result for evaluator in evaluators for result in evaluator.run(predictor, context)]
    numbers = numbers_of(results, run=run_dir.resolve().name, model=BEST, tags=task.tags())
    write_results(run_dir / FILE, numbers, details_of({BEST: results}))
    write_json(run_dir / "done.json", {"step": 0, "export": "export"})


def main(argv: list[str]) -> int:
    """Parse arguments and convert; returns the exit code."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("config", nargs="+", help="CONFIG.yaml or field=value")
    args = parser.parse_args(argv)
    convert(args.checkpoint, args.run_folder, args.config)
    return 0


if __name__ == "__main__":
    run_tool(main)
