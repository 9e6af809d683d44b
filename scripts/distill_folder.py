"""From a folder of one's own images to a small model: train, test on held-out images, export, report.

  bash scripts/distill_folder.sh IMAGES --method promptkd [--classes names.txt]
  bash scripts/distill_folder.sh IMAGES --method dho --student timm:mobilenetv3_large_100.ra_in1k data.workers=8
  bash scripts/distill_folder.sh DOMAINS --method vl2v_adip --hold-out sketch distill:optim.lr=1e-5

IMAGES holds one folder per class; a part of each is held out, unless there are folders train, val and test with the class
folders in them. Images without a class go to IMAGES/unlabelled, which promptkd and dho train on; promptkd needs no labels
at all. For vl2v_adip the folder holds one folder per domain with the class folders in them.

The stages are runs of the project's own training scripts and configs: teacher and student (promptkd), student (dho),
align and distill (vl2v_adip). field=value goes to every stage that has the field, STAGE:field=value to one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import typing
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that was not installed

import torch
from torch import Tensor, nn

from projects.dho.config import DhoConfig
from projects.promptkd.config import StudentConfig, TeacherConfig
from projects.vl2v_adip.config import AlignConfig, DistillConfig
from scripts.evaluation_command import model_name
from scripts.to_onnx import ONNX, missing_for_onnx, to_onnx
from vlmkd import config, memory
from vlmkd.data.labelled import LabelledSet
from vlmkd.datasets.labelled_sets import DOMAINS, FOLDER, load_set
from vlmkd.errors import UserError, run_tool
from vlmkd.export.classifier import TIMM_WEIGHTS, WEIGHTS
from vlmkd.files import write_json
from vlmkd.models.backbones import load_backbone
from vlmkd.page.report import build_report, main_set, read_run, rows_of

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("promptkd", "dho", "vl2v_adip")
TEACHER = "ViT-L-14-quickgelu@openai"
SHOTS = 16
"""Labelled images a class for a PromptKD teacher (the paper's number)."""
PER_DOMAIN = 32
"""Images of every source domain in a batch (the paper's number)."""
KEPT = 1.1
"""Memory of an image in training, as a multiple of what its forward pass keeps (measured)."""
FEWEST_IMAGES = 4
"""Images of a stream that BatchNorm still sees at a time, however little memory there is."""
FROM_OPTIONS = {
    "run_dir": "--out",
    "runs": "--out",
    "data.set": "IMAGES",
    "data.class_names": "--classes",
    "data.templates": "--prompt",
    "fold.test_domain": "--hold-out",
}


@dataclass
class Stage:
    """One run."""

    name: str
    script: str
    config_class: type[Any]
    configs: list[str]
    """Files below the project's configs folder, without the ending."""
    fields: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    """The user's, which win."""

    @property
    def project(self) -> Path:
        """The folder of the paper."""
        return ROOT / "projects" / self.script.split("/")[0]

    @property
    def arguments(self) -> list[str]:
        """What follows the script on the command line."""
        files = [str(self.project / "configs" / f"{name}.yaml") for name in self.configs]
        return [*files, *(f"{name}={_yaml(value)}" for name, value in self.fields.items()), *self.overrides]

    def config(self) -> Any:
        """The config as the script will see it.

        Raises:
            UserError: a field that it does not have, or a value that it refuses.
        """
        return config.load(self.config_class, self.arguments)


def _yaml(value: Any) -> str:
    """A field's value as an override has it; text that YAML would take for something else is quoted."""
    plain = value == "" or (isinstance(value, str) and re.fullmatch(r"[\w.+-]*[/:@][\w./:@+-]*", value))
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    args = _parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    dataset = _checked_set(args)
    stages = _plan(args, dataset)
    for stage in stages:
        stage.config()
    parts = ", ".join(f"{len(items)} {split}" for split, items in dataset.splits.items()) + " images"
    if dataset.domains:
        count = sum(map(len, dataset.splits.values()))
        parts = f"{count} images of the domains {', '.join(dataset.domains)}"
    print(f"{args.images}: {len(dataset.class_names)} classes, {parts}; runs go to {args.out}", flush=True)
    for stage in stages:
        _fit_memory(stage, len(dataset.domains) - 1)
    dry_run = bool(os.environ.get("DRY_RUN"))
    if not dry_run:
        _check_same_images(args, dataset)
    for stage in stages:
        if code := _launch(stage):
            return code
    if not dry_run:
        _finish(args, args.out / stages[-1].name)
    return 0


# ----------------------------------------------------------------------------------------------------------- input


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; --help lists the options")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="distill_folder.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder of the images")
    add("fields", nargs="*", metavar="field=value", help="fields of the runs' configs")
    add("--method", required=True, choices=METHODS)
    add(
        "--classes",
        default="",
        metavar="FILE",
        help="a class a line: NAME, where the folder reads the same, or FOLDER<tab>NAME; the order is that of the model's "
        "answers (default: the folders' names, sorted)",
    )
    add("--out", type=Path, help="folder of the runs and the report (default: runs/IMAGES_METHOD)")
    add(
        "--teacher",
        default=TEACHER,
        metavar="CLIP",
        help=f"MODEL@TAG, zoo:NAME, local-dir:FOLDER (default: {TEACHER})",
    )
    add(
        "--student",
        default="",
        metavar="MODEL",
        help="promptkd: a CLIP with a ViT image tower (default: ViT-B-16-quickgelu@openai); dho, vl2v_adip: timm:NAME, "
        "torchvision:NAME, clip:MODEL@TAG, efficientnet-lite0 (default: torchvision:resnet18, timm's ViT-S/16)",
    )
    add(
        "--shots",
        type=int,
        help="labelled images of each class that are used: promptkd, for the teacher's prompts (default: 16; 0: zero-shot "
        "teacher); dho (default: all)",
    )
    add(
        "--prompt",
        default="",
        metavar="TEXT",
        help="prompt with {} for the class name (default: a photo of a {}.)",
    )
    add(
        "--hold-out",
        default="",
        metavar="DOMAIN",
        help="vl2v_adip: domain to be tested on (default: the last one)",
    )
    add(
        "--epochs",
        type=int,
        help="passes over the training images (default: 20; dho 30; more in small folders)",
    )
    args = parser.parse_intermixed_args(argv)
    for option, value in (("--shots", args.shots), ("--epochs", args.epochs)):
        if value is not None and value < (option == "--epochs"):
            raise UserError(f"{option} {value} is too small")
    if args.shots is not None and args.method == "vl2v_adip":
        raise UserError(
            "--shots has no effect with --method vl2v_adip, which trains on all labels; leave it out"
        )
    if args.shots == 0 and args.method == "dho":
        raise UserError("--shots 0: dho learns from labels; name 1 or more, or leave it out for all")
    if args.hold_out and args.method != "vl2v_adip":
        raise UserError(
            f"--hold-out names a domain of --method vl2v_adip; {args.method} has none, leave it out"
        )
    if args.prompt and "{}" not in args.prompt:
        raise UserError(f"--prompt {args.prompt!r} has no {{}} for the class name; add it")
    args.images = Path(os.path.abspath(args.images.expanduser()))
    args.out = args.out or Path("runs") / f"{args.images.name}_{args.method}"
    return args


def _checked_set(args: argparse.Namespace) -> LabelledSet:
    """The images and their classes as every stage will read them.

    Raises:
        UserError: they do not fit each other or the method.
    """
    dataset = load_set(_set_name(args), class_names=args.classes)
    if args.method == "vl2v_adip":
        if args.hold_out and args.hold_out not in dataset.domains:
            raise UserError(
                f"--hold-out {args.hold_out}: {args.images} has the domains {', '.join(dataset.domains)}"
            )
        return dataset
    if "test" not in dataset.splits:
        raise UserError(f"{args.images}: no class has two images, so that none can be held out; add images")
    if args.method == "dho" and "train" not in dataset.splits:
        raise UserError(
            f"{args.images} has no class folders, but dho learns from labels; --method promptkd needs none"
        )
    return dataset


def _check_same_images(args: argparse.Namespace, dataset: LabelledSet) -> None:
    """Note which images and classes the runs of a folder are of; a finished run must not pass for one on others.

    Raises:
        UserError: the runs there are of others, or the folder cannot be written.
    """
    splits = {split: [[item.key, item.label] for item in items] for split, items in dataset.splits.items()}
    facts = json.dumps([dataset.class_names, dataset.domains, splits])
    digest = hashlib.sha256(facts.encode()).hexdigest()
    path = args.out / "images.json"
    if path.is_file():
        if _noted_digest(path) != digest:
            raise UserError(
                f"--out {args.out}: its runs are of other images or classes than {args.images} holds now; choose another "
                "folder, or delete it"
            )
        return
    write_json(path, {"images": str(args.images), "sha256": digest}, "--out")


def _noted_digest(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged, so that nobody can tell which images the runs beside it are of; delete it if they are of "
            "these, else choose another --out"
        ) from None


def _set_name(args: argparse.Namespace) -> str:
    return f"{DOMAINS if args.method == 'vl2v_adip' else FOLDER}{args.images}"


# ---------------------------------------------------------------------------------------------------------- stages


def _plan(args: argparse.Namespace, dataset: LabelledSet) -> list[Stage]:
    """The runs of the method, in order, with everything that the command line and the images decide."""
    plans = {"promptkd": _promptkd, "dho": _dho, "vl2v_adip": _vl2v_adip}
    stages = plans[args.method](args, dataset)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for stage in stages:
        stage.fields |= {
            "run_dir": str(args.out / stage.name),
            "data.set": _set_name(args),
            "data.class_names": args.classes,
            "data.workers": min(4, cores - 1),
        }
        if args.prompt:
            stage.fields["data.templates"] = [args.prompt]
    _give_overrides(stages, args.fields)
    return stages


def _promptkd(args: argparse.Namespace, dataset: LabelledSet) -> list[Stage]:
    model, pretrained = model_name(args.teacher)
    shots = SHOTS if args.shots is None else args.shots
    common = {} if torch.cuda.is_available() else {"autocast": "none"}
    stages: list[Stage] = []
    fields: dict[str, Any]
    if shots and "train" in dataset.splits:
        fields = {"clip.model": model, "clip.pretrained": pretrained, "shots": shots, **common}
        if args.shots:
            fields["fewer"] = "refuse"
        if args.prompt:
            fields |= _learned_prompt(args.prompt)
        configs = ["base/teacher", "own_images/teacher"]
        stages.append(Stage("teacher", "promptkd/train_teacher.py", TeacherConfig, configs, fields))
    fields = {"teacher.clip.model": model, "teacher.clip.pretrained": pretrained, **common}
    if stages:
        fields["teacher.prompts"] = str(args.out / "teacher" / "export")
    if args.student:
        fields |= dict(zip(("student.model", "student.pretrained"), model_name(args.student), strict=True))
    if args.epochs:
        fields["steps"] = f"{args.epochs}ep"
    configs = ["base/student", "own_images/student"]
    return [*stages, Stage("student", "promptkd/train_student.py", StudentConfig, configs, fields)]


def _learned_prompt(prompt: str) -> dict[str, Any]:
    """Learned vectors take the place of at most four words before the class name, and start from them."""
    words = prompt.partition("{}")[0].split()[:4]
    if not words:
        raise UserError(
            f"--prompt {prompt!r} has no word before {{}}, whose place learned vectors could take; begin with one or more, "
            "or use --shots 0"
        )
    return {
        "prompts.template": prompt,
        "prompts.init": " ".join(words),
        "prompts.text_length": len(words),
    }


def _dho(args: argparse.Namespace, dataset: LabelledSet) -> list[Stage]:
    model, pretrained = model_name(args.teacher)
    alone = "loss.method=ce" in args.fields
    fields: dict[str, Any] = {} if alone else {"teacher.model": model, "teacher.pretrained": pretrained}
    if args.student:
        fields["student.backbone"] = args.student
    if args.shots:
        fields |= {"split.shots": args.shots, "split.percent": 0}
    if args.epochs:
        fields["steps"] = f"{args.epochs}ep"
    if "val" not in dataset.splits:
        print("no class has five images: without validation images both heads count the same", flush=True)
        fields |= {"split.validation": "none", "mixing.mode": "fixed", "selection": "last"}
    configs = ["fine_grained", "students/resnet18", "own_images"]
    return [Stage("student", "dho/train_student.py", DhoConfig, configs, fields)]


def _vl2v_adip(args: argparse.Namespace, dataset: LabelledSet) -> list[Stage]:
    model, pretrained = model_name(args.teacher)
    fields: dict[str, Any] = {
        "teacher.model": model,
        "teacher.pretrained": pretrained,
        "fold.test_domain": args.hold_out or dataset.domains[-1],
        "runs": str(args.out),
        "batch_size": PER_DOMAIN * (len(dataset.domains) - 1),
        "steps": f"{args.epochs}ep"
        if args.epochs
        else "max(1000, 20ep)",  # a small folder is passed over more often
        "evaluation.every_steps": "max(2, 4%)",
        "select_from_step": "min(100, 20%)",
    }
    if args.student:
        fields["student.backbone"] = args.student
    return [
        Stage(
            name,
            f"vl2v_adip/train_{name}.py",
            cls,
            ["base", "students/vit_s16", f"stages/{name}"],
            dict(fields),
        )
        for name, cls in (("align", AlignConfig), ("distill", DistillConfig))
    ]


def _fit_memory(stage: Stage, domains: int) -> None:
    """Give a run micro-batches that this machine has memory for, and say which; one that has begun keeps its own.

    A third of what is free is for what the student's images keep for the backward pass; the rest is for the teacher, weights,
    evaluations, loaders and everybody else. PromptKD's eight images a batch, and a
    student of which only the head is trained, are left alone.
    """
    cfg = stage.config()
    if any(argument.startswith("micro_batch_size=") for argument in stage.overrides):
        return
    begun = Path(cfg.run_dir) / "config.yaml"
    if begun.is_file():
        text = begun.read_text(encoding="utf-8", errors="replace")
        own = re.search(r"^micro_batch_size: (\d+)$", text, re.M)
        micro = int(own[1]) if own else 0
    else:
        micro = _micro_batch_of(stage.name, cfg, domains)
    if micro:
        evaluated = min(cfg.evaluation.batch_size, micro)
        stage.fields |= {"micro_batch_size": micro, "evaluation.batch_size": evaluated}


def _micro_batch_of(name: str, cfg: Any, domains: int) -> int:
    """Images at a time for a run that begins here, 0 for the whole batch."""
    if isinstance(cfg, DhoConfig):
        shares = [cfg.labelled_images, cfg.batch_size - cfg.labelled_images]
    elif isinstance(cfg, DistillConfig):
        shares = [cfg.batch_size // domains]
    else:
        return 0
    if os.environ.get("HOSTFILE") or os.environ.get("SLURM_STEP_ID"):
        return 0  # other machines, of which nothing is known here
    counts = [os.environ.get(variable, "") for variable in ("NPROC", "NNODES")]
    here, machines = (max(1, int(count)) if count.isdecimal() else 1 for count in counts)
    backbone = load_backbone(cfg.student.backbone, False, image_size=cfg.student.image_size or None)
    images = torch.zeros(2, 3, *backbone.image_spec.size)
    image = math.ceil(KEPT * kept_for_backward(backbone.module.train(), images) / len(images))
    free = _free_memory() // (1 if torch.cuda.is_available() else here)
    micro = micro_batch(cfg.batch_size, shares, here * machines, image, free // 3)
    print(
        f"{name}: {micro} images at a time of a batch of {cfg.batch_size}; each takes about {image / 1e6:.0f} MB, and "
        f"{free / 1e9:.1f} GB are free (micro_batch_size=... for another choice)",
        flush=True,
    )
    return micro if micro * here * machines < cfg.batch_size else 0


def kept_for_backward(module: nn.Module, images: Tensor) -> int:
    """What autograd keeps between `module(images)` and its backward pass, parameters and the images left out."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), images)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(images)
    del output  # alive until here, so that no storage took another's place
    return sum(kept.values())


def micro_batch(batch: int, shares: list[int], ranks: int, image: int, room: int) -> int:
    """The most images at a time that fit into `room` bytes, as many parts of each stream's share as of the batch.

    Args:
        batch: images of an optimiser step over all ranks.
        shares: images of a step that each stream of the loader gives.
        ranks: processes.
        image: bytes of one image.
        room: bytes of one process.
    """
    share = math.gcd(*shares) // ranks
    parts = [part for part in range(1, share + 1) if share % part == 0 and share // part >= FEWEST_IMAGES]
    fitting = [part for part in parts if batch // (ranks * part) * image <= room]
    return batch // (ranks * (fitting or parts[-1:] or [1])[0])


def _free_memory() -> int:
    """Bytes; asked in another process where it is a GPU's, of which this one would hold a part for ever."""
    if not torch.cuda.is_available():
        return memory.available()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory.available)


def _give_overrides(stages: list[Stage], arguments: list[str]) -> None:
    """`field=value` to every stage that has the field, `STAGE:field=value` to that one.

    Raises:
        UserError: no such stage, no stage with such a field, or a field that is an option of this command.
    """
    by_name = {stage.name: stage for stage in stages}
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        prefix, colon, path = name.partition(":")
        if not equals:
            raise UserError(f"{argument!r} is neither an option nor field=value; --help lists the options")
        if colon and prefix not in by_name:
            raise UserError(f"{argument}: there is no stage {prefix!r}, only {', '.join(by_name)}")
        path = path if colon else name
        if path in FROM_OPTIONS:
            raise UserError(f"{argument}: {path} is decided by {FROM_OPTIONS[path]}")
        chosen = (
            [by_name[prefix]] if colon else [stage for stage in stages if has_field(stage.config_class, path)]
        )
        for stage in chosen or stages[-1:]:  # where no stage has it, the last one's error names what is near
            stage.overrides.append(argument.partition(":")[2] if colon else argument)


def has_field(cls: type[Any], path: str) -> bool:
    """Whether `cls` has the field `path`, such as `optim.lr`; not looked at below a list or a plain value."""
    name, _, rest = path.partition(".")
    hint = typing.get_type_hints(cls).get(name)
    if rest and isinstance(hint, type) and is_dataclass(hint):
        return has_field(hint, rest)
    return hint is not None


def _launch(stage: Stage) -> int:
    """Run a stage by scripts/launch.sh; a SIGTERM goes on to it, so that it saves. Returns its exit code."""
    command = ["bash", str(ROOT / "scripts" / "launch.sh"), f"projects/{stage.script}", *stage.arguments]
    print(f"== {stage.name}", flush=True)
    child = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------------------------------------- results


def _finish(args: argparse.Namespace, run_dir: Path) -> None:
    """The export in its other forms, the report, and what came out of it all in a few lines."""
    export = run_dir / "export"
    print("== export and report", flush=True)
    print(
        f"{export / WEIGHTS}: vlmkd.export.classifier.load_classifier; `--model classifier:{export}` in scripts/eval_zero_shot.py"
    )
    if (export / TIMM_WEIGHTS).is_file():
        print(f"{export / TIMM_WEIGHTS}: timm.create_model, whose arguments are in the file's metadata")
    if missing := missing_for_onnx():
        print(
            f"ONNX was not written ({', '.join(missing)} not installed): pip install 'vlmkd[export]', then give this command "
            "again"
        )
    else:
        if not (export / ONNX).is_file():
            to_onnx(export)
        print(f"{export / ONNX}: compared with onnxruntime")
    report = build_report([run_dir], args.out / "report.html", title=f"{args.images.name}: {args.method}")
    run = read_run(run_dir)
    key = (main_set([run]), "top1")
    for row in rows_of([run]):
        if key in row.scores and row.exported:
            print(
                f"{key[0]} top-1 {row.scores[key].shown()} %: {row.label}{' (teacher)' if row.teacher else ''}"
            )
    print(f"report: {report}")


if __name__ == "__main__":
    run_tool(main)
