r"""Evaluate teachers, students and plain CLIPs by the paper's protocols, over seeds and data sets.

    bash scripts/launch.sh projects/promptkd/eval.py --setting base2novel --data dtd --root DATA \
        --ckpt 'runs/promptkd/base2novel/{data}/student_s{seed}/export' --seeds 1 2 3 --results dtd.jsonl

A checkpoint is a run's export folder, a published checkpoint or its `zoo:NAME` (`--clip` names the CLIP of its size; a
student also needs its teacher, `--teacher` with `--teacher-clip`, or `--bank`), or `clip:MODEL[@PRETRAINED]`, a
zero-shot CLIP with the data set's own prompts. `{data}` and `{seed}` in paths stand for each set and seed. The harmonic
mean is that of the mean base and mean novel accuracies over the seeds, as in the paper; standard deviations over seeds
stand beside the numbers (the harmonic mean's: of the seeds' harmonic means).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from projects.promptkd import legacy
from projects.promptkd.config import ClipConfig, Setting, TeacherSource
from projects.promptkd.protocols import held_out
from projects.promptkd.student import student_classifier
from projects.promptkd.teacher import Teacher, load_teacher
from vlmkd import distributed
from vlmkd.allocator import keep_freed_memory
from vlmkd.class_names import require_same_classes
from vlmkd.data.labelled import LabelledSet
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.datasets.splits import base_and_novel
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.classify import Classification, harmonic_mean
from vlmkd.export.classifier import CONFIG, load_classifier
from vlmkd.files import check_writable
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import load_clip
from vlmkd.predictors import ImageClassifier
from vlmkd.results import Number, markdown, numbers_of, write_results
from vlmkd.zoo import weights_file

SETTINGS: dict[str, Setting] = {
    "base2novel": "base_to_novel",
    "cross": "cross_dataset",
    "dg": "domain_generalization",
}
COLUMNS = {
    "base2novel": ("base_top1", "novel_top1", "harmonic_mean"),
    "cross": ("top1",),
    "dg": ("top1",),
}


def evaluator(setting: str, dataset: LabelledSet, split: str, hold_out: float, seed: int) -> Classification:
    """What a setting measures on a data set."""
    if setting == "base2novel":
        base, novel = base_and_novel(items_of(dataset, "train"))
        return Classification.of(dataset, split, base=base, novel=novel)
    if setting == "dg":
        _, test = held_out(items_of(dataset, split), hold_out, seed)
        return Classification(test, dataset.class_names, dataset=dataset.name)
    return Classification.of(dataset, split)


def classifier(
    name: str,
    dataset: LabelledSet,
    clip: ClipConfig,
    teacher: TeacherSource,
    bank: str,
    device: torch.device,
    setting: Setting,
) -> ImageClassifier:
    """The classifier of `dataset` that a `--ckpt` names; `setting` chooses among published teachers."""

    def loaded(source: TeacherSource) -> Teacher:
        found = load_teacher(source, dataset.name, setting)
        found.module.to(device)
        return found

    if name.startswith("clip:"):
        return loaded(TeacherSource(clip=_clip(name.removeprefix("clip:")))).classifier(dataset)
    path = weights_file(name)
    path = path / "export" if (path / "export").is_dir() else path
    if (path / CONFIG).is_file():
        student = load_classifier(path)
        require_same_classes(student.class_names, dataset.class_names, f"student {path}")
        student.module.to(device)
        return student
    state = {} if path.is_dir() else legacy.read_checkpoint(path)
    if path.is_dir() or legacy.kind_of(state, name) == "teacher":
        return loaded(TeacherSource(prompts=str(path), clip=clip)).classifier(dataset)
    if not clip.model:
        raise UserError(
            f"{name} is a published student; name its CLIP, e.g. --clip ViT-B-16-quickgelu@openai"
        )
    base = load_clip(clip.model, clip.pretrained)
    published = legacy.load_student(state, base, name).to(device)
    if bank:
        vectors = ClassVectors.load(Path(bank), expect_class_names=dataset.class_names)
    elif teacher.named:
        vectors = loaded(teacher).class_vectors(dataset)
    else:
        raise UserError(
            f"{name} is a published student without class vectors; name its teacher with --teacher and --teacher-clip, or a "
            "file of build_bank.py with --bank"
        )
    width = published.projector.config["embed_dim"]
    if vectors.vectors.shape[1] != width:
        raise UserError(
            f"{name} projects to {width} dimensions, its class vectors have {vectors.vectors.shape[1]}; name its own teacher"
        )
    return student_classifier(name, published, vectors, base.image_spec)


def table(numbers: Sequence[Number], setting: str) -> str:
    """The results as Markdown, in per cent, by data set and on average (its deviation: that of the seeds' averages)."""
    columns = COLUMNS[setting]
    found: dict[Any, dict[Any, dict[str, float]]] = {}
    for one in numbers:
        if one.metric in columns:
            found.setdefault(one.tags["data"], {}).setdefault(one.tags["seed"], {})[one.metric] = one.value
    sets = list(found.values())
    rows = found | {"average": {seed: _mean([by_seed[seed] for by_seed in sets]) for seed in sets[0]}}
    lines = []
    for name, by_seed in rows.items():
        mean, cells = _mean(list(by_seed.values())), []
        for column in columns:
            values = [100 * row[column] for row in by_seed.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{100 * mean[column]:.2f}{spread}")
        lines.append([name, *cells])
    return markdown(["data set", *columns], lines)


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    if "harmonic_mean" in mean:
        mean["harmonic_mean"] = harmonic_mean(mean["base_top1"], mean["novel_top1"])
    return mean


def evaluate(args: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """The numbers of every data set and seed, and details by checkpoint."""
    device = distributed.device_named(args.device)
    context = Context(device, args.batch_size, args.workers, progress=not args.quiet)
    numbers: list[Number] = []
    details: dict[str, Any] = {}
    for name in args.data:
        dataset = load_set(name, args.root)
        for seed in args.seeds:
            ckpt, bank, prompts = (
                text.replace("{data}", name).replace("{seed}", str(seed))
                for text in (args.ckpt, args.bank, args.teacher)
            )
            source = TeacherSource(prompts=prompts, clip=_clip(args.teacher_clip))
            model = classifier(ckpt, dataset, _clip(args.clip), source, bank, device, SETTINGS[args.setting])
            measured = evaluator(args.setting, dataset, args.split, args.hold_out, seed)
            (result,) = measured.run(model, context)
            tags = {"setting": args.setting, "data": name, "seed": seed}
            numbers += numbers_of([result], run=ckpt, model=ckpt, tags=tags)
            details.setdefault(ckpt, {})[name] = result.details
    return numbers, details


def _clip(name: str) -> ClipConfig:
    model, _, pretrained = name.partition("@")
    return ClipConfig(model=model, pretrained=pretrained)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--setting", choices=SETTINGS, required=True)
    add("--ckpt", required=True, help="checkpoint, with {data} and {seed} where there are several")
    add("--data", nargs="+", required=True, help="data sets, as data.set")
    add("--root", default="", help="as data.root")
    add("--split", default="test", help="split that is evaluated")
    add("--seeds", type=int, nargs="+", default=[1])
    add("--hold-out", type=float, default=0.5, help="dg: hold_out of the student run; 0 as published")
    add("--clip", default="", metavar="MODEL@TAG", help="the CLIP of a published checkpoint")
    add("--teacher", default="", help="teacher of a published student: export or checkpoint")
    add("--teacher-clip", default="", metavar="MODEL@TAG", help="the CLIP under --teacher")
    add("--bank", default="", help="class vectors, instead of --teacher")
    add("--results", default="", metavar="FILE", help="write a line a number to FILE, and details beside it")
    add("--batch-size", type=int, default=100)
    add("--workers", type=at_least(0), default=0)
    add("--threads", type=at_least(0), default=0)
    add("--device", default="")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.results:
        check_writable(args.results, "--results")
    if len(args.seeds) > 1 and "{seed}" not in args.ckpt:
        raise UserError("--seeds names several seeds, but --ckpt has no {seed}")
    numbers, details = evaluate(args)
    print(table(numbers, args.setting))
    if args.results:
        write_results(Path(args.results), numbers, details, "--results")
    return 0


if __name__ == "__main__":
    run_tool(main)
