"""Training steps with stored teacher outputs against the same steps with the teacher beside the student.

    python benchmarks/stored_teacher.py [--teachers nano ViT-B-32] [--classes 5 100 397] [--seconds 10] [--threads 2]

PromptKD (text tower at every step, stored class vectors, stored class vectors and image embeddings; at 5, 100 and 397
classes), DHO, and VL2V-ADiP's Align. Every way is a run as its project builds it, in the training loop of all runs; the
ways of a case take turns of a few steps until --seconds are spent (at least one turn each), and the first step of a turn
is left out. An epoch has the same number of steps whichever way, so the ratio of steps is that of epochs.

`nano` is the zoo's teacher with the students of the emoji runs. Any other name is an open_clip architecture with random
weights, whose students are ViT-S-32 (PromptKD) and ResNet-18; speed does not depend on what a model knows. Pictures and class
names are drawn from the packages of the emoji set.

All ways of a case must give equal numbers, which is judged after their first step: the difference of the loss, as a share
of it, and the distance of the weights, as a share of the distance that the step has moved them. (Later on rounding grows:
1e-7 of noise in the teacher's weights puts a random ResNet-18 3 % of its way off in three steps of DHO.) The script fails
where one is above LIMITS. Stored embeddings are float32 here
(`embed_labelled.py --fp32`); with --dtype float16, the tools' default, their rounding shows, and the limits are wider.
Adam's eps is 1e-3: a smaller one makes whole steps of the rounding of gradients that are 0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from data_tools.embed_labelled import embed_items
from data_tools.emoji.catalog import STYLES, concepts
from data_tools.emoji.draw import concept_picture
from projects.dho.build import student_job as dho_job
from projects.dho.config import DhoConfig
from projects.promptkd.build import student_job, teacher_job
from projects.promptkd.config import StudentConfig, TeacherConfig, TeacherSource
from projects.promptkd.teacher import load_teacher
from projects.vl2v_adip.build import job as vl2v_job
from projects.vl2v_adip.config import AlignConfig
from vlmkd import config, distributed
from vlmkd.allocator import keep_freed_memory
from vlmkd.config import LabelledDataConfig
from vlmkd.data.labelled import Item
from vlmkd.data.samples import view_config
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.export.clip import export_clip
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.train import engine
from vlmkd.train.metrics import Metrics
from vlmkd.train.trainer import Job, fit

CONFIGS = Path(__file__).resolve().parents[1] / "projects"
NANO = "nano"
LIMITS = {"float32": (1e-5, 1e-4), "float16": (1e-2, 0.1)}
"""Of the loss and of the weights, by type of the stored embeddings."""
FEW_CLASSES = 5
"""Of DHO and Align, whose teachers are asked about images alone."""
_COMMON = (
    "data.workers=0", "data.view_count=1", "seed=0", "optim.schedule=constant", "optim.warmup_steps=0", "optim.eps=1e-3",
    "log.every_steps=1", "checkpoint.every_steps=0", "evaluation.every_steps=0", "evaluation.phase=0",
)  # fmt: skip
"""Of all runs: the stored views from the first pass on, and no end that a schedule would look to."""


# ----------------------------------------------------------------------------------------------------- models and data


@dataclass(frozen=True)
class Models:
    """A teacher and its students, as overrides of the emoji runs' configs."""

    name: str
    teacher: str
    promptkd: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()
    """Student of DHO and VL2V-ADiP."""

    @classmethod
    def of(cls, name: str, folder: Path) -> Models:
        """`nano`, or a random model of an open_clip architecture, written into `folder` so that it has a digest."""
        if name == NANO:
            return cls(name, "zoo:tinyclip-emoji-teacher")
        export_clip(folder / name, load_clip(name, seed=0))
        resnet = (
            "student.backbone=torchvision:resnet18",
            "student.pretrained=false",
            "student.image_size=224",
        )
        return cls(name, f"local-dir:{folder / name}", ("student.model=ViT-S-32",), resnet)


def draw(folder: Path, classes: int, images: int, styles: tuple[str, ...] = tuple(STYLES)) -> None:
    """`images` pictures in `classes` numbered class folders, and the names of as many concepts."""
    pictures = [(concept, style) for concept in concepts() for style in styles]
    for number, (concept, style) in enumerate(islice(pictures, images)):
        place = folder / f"{number % classes:03d}"
        place.mkdir(parents=True, exist_ok=True)
        concept_picture(concept, style).save(place / f"{number:04d}.png")


def class_folders(folder: Path, classes: int, images: int) -> str:
    """A labelled set with the first `classes` concepts as class names; as a config names it."""
    names = list(dict.fromkeys(concept.name for concept in concepts()))[:classes]
    for split in ("train", "test"):
        draw(folder / split, classes, max(classes, images))
    (folder / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return f"folder:{folder}"


def store(
    encoder: Any, digest: str, data: LabelledDataConfig, items: list[Item], folder: Path, dtype: str
) -> str:
    """One view of each item through the teacher, as embed_labelled.py stores them; says what it took."""
    begin = time.perf_counter()
    embed_items(
        encoder, items, folder, name=data.set, source=encoder.name, digest=digest, views=view_config(data),
        view_count=1, dtype=getattr(torch, dtype), device=distributed.device(),
    )  # fmt: skip
    return f"{len(items)} images in {time.perf_counter() - begin:.1f} s"


# ---------------------------------------------------------------------------------------------------- one way to train


@dataclass
class Way:
    """A run that is prolonged turn by turn."""

    name: str
    cfg: Any
    build: Callable[[Any], Job]
    done: int = 0
    seconds: list[dict[str, float]] = field(default_factory=list)
    """Of each timed step: in all, of the teacher, of waiting for data."""
    loss: float = math.nan
    """Of the first turn, which is of one step and judged, not timed."""

    def __post_init__(self) -> None:
        self.folder = Path(self.cfg.run_dir)
        self.folder.mkdir(parents=True)
        torch.manual_seed(self.cfg.seed)
        self.job = self.build(self.cfg)
        self.start = weights(self.job.task.student)
        self.around = engine.Engine(self.job.task, self.cfg)
        for teacher in self.job.task.teachers:
            self.around.place_teacher(teacher, shard=False)
        self.metrics = Metrics(self.folder, self.cfg.log, {})

    def go_on(self, steps: int) -> None:
        """One turn: a step that warms up and `steps` that count, by the training loop of all runs."""
        end = self.done + 1 + steps
        job = replace(self.job, cfg=replace(self.cfg, steps=end))
        fit(job, self.around, self.metrics, self.folder / "state", start=self.done)
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        own = [line for line in lines if line["kind"] == "train" and line["step"] > self.done]
        if not self.done:
            self.loss = own[0]["loss"]
            self.early = weights(self.around.module)
        self.seconds += [
            {name: line.get(f"{name}_s", 0.0) for name in ("step", "teacher", "data_wait")}
            for line in own[1:]
        ]
        self.done = end

    def median(self, name: str) -> float:
        """Seconds of a timed step."""
        return statistics.median(part[name] for part in self.seconds)


def weights(module: torch.nn.Module) -> Tensor:
    """All trained weights in one vector."""
    return torch.cat([p.detach().flatten().double().cpu() for p in module.parameters() if p.requires_grad])


def measure(ways: list[Way], steps: int, seconds: float) -> None:
    """A step of each way to be compared, then turns of all until `seconds` have passed."""
    for way in ways:
        way.go_on(0)
    begin = time.perf_counter()
    while not ways[0].seconds or time.perf_counter() - begin < seconds:
        for way in ways:
            way.go_on(steps)


def difference(way: Way, live: Way) -> tuple[float, float]:
    """Difference of the loss, and distance of the weights, after the first turn; both as shares."""
    loss = abs(way.loss - live.loss) / abs(live.loss)
    moved = torch.linalg.vector_norm(live.early - live.start)
    return loss, float(torch.linalg.vector_norm(way.early - live.early) / moved)


# ----------------------------------------------------------------------------------------------------------- the cases


@dataclass
class Case:
    """Rows that are compared with the first of them."""

    project: str
    classes: int
    batch: int
    ways: list[Way]
    note: str
    """What was stored, and how long that took."""


def promptkd(models: Models, folder: Path, args: argparse.Namespace) -> Iterator[Case]:
    """The student's step at several numbers of classes, with a teacher whose prompts are as they start."""
    emoji = CONFIGS / "promptkd" / "configs" / "emoji"
    batch, unused = args.batch_sizes[0], f"run_dir={folder}/unused"
    sets = {count: class_folders(folder / f"set_{count}", count, 2 * batch) for count in args.classes}
    fields = [
        "steps=1ep",
        "batch_size=1",
        "shots=0",
        "average.std=0",
        f"data.set={sets[min(sets)]}",
        f"clip.model={models.teacher}",
        unused,
    ]
    stage_1 = config.load(TeacherConfig, [*_files(emoji / "base", emoji / "teacher"), *fields])
    task = teacher_job(stage_1).task
    task.export(folder / "teacher", dict(task.student.state_dict()), "teacher")
    source = TeacherSource(prompts=str(folder / "teacher"))
    for count, name in sets.items():
        teacher, dataset = load_teacher(source, name, "base_to_novel"), load_set(name)
        assert teacher.prompted is not None
        teacher.prompted.to(distributed.device())
        vectors, outputs = folder / f"vectors_{count}.safetensors", folder / f"outputs_{count}"
        begin = time.perf_counter()
        teacher.class_vectors(dataset).save(vectors)
        text = time.perf_counter() - begin
        common = [
            *_files(emoji / "base", emoji / "student"), *_COMMON, "steps=1ep", "shots=0",
            f"batch_size={batch}", f"data.set={name}", f"teacher.prompts={source.prompts}", *models.promptkd,
        ]  # fmt: skip
        data = config.load(StudentConfig, [*common, unused]).data
        images = store(teacher.encoder(), teacher.digest, data, dataset.splits["train"], outputs, args.dtype)
        ways = {
            "text tower every step": ["text_every_step=true"],
            "class vectors stored": [f"class_vectors={vectors}"],
            "class vectors and images stored": [
                f"class_vectors={vectors}", f"data.teacher_outputs={outputs}", "teacher.prompts=",
            ],
        }  # fmt: skip
        started = [
            Way(
                way,
                config.load(StudentConfig, [*common, *own, f"run_dir={folder}/{count}_{number}"]),
                student_job,
            )
            for number, (way, own) in enumerate(ways.items())
        ]
        yield Case("PromptKD", count, batch, started, f"{count} class vectors in {text:.1f} s, {images}")


def dho(models: Models, folder: Path, args: argparse.Namespace) -> Iterator[Case]:
    """Two heads, labelled and unlabelled images."""
    batch = args.batch_sizes[1]
    name = class_folders(folder / "set", FEW_CLASSES, max(2 * batch, 8 * FEW_CLASSES))
    fields = [
        *_files(CONFIGS / "dho" / "configs" / "emoji" / "base"), *_COMMON, "steps=1", f"batch_size={batch}",
        f"data.set={name}", "split.validation=none", "split.pool_per_class=0", "mixing.mode=fixed",
        f"teacher.model={models.teacher}", *models.classifier,
    ]  # fmt: skip
    items = load_set(name).splits["train"]
    yield _with_and_without("DHO", DhoConfig, dho_job, fields, items, folder, args.dtype)


def align(models: Models, folder: Path, args: argparse.Namespace) -> Iterator[Case]:
    """VL2V-ADiP's first stage: the backbone is frozen, a projector learns."""
    batch = args.batch_sizes[2]
    for style in STYLES:
        draw(
            folder / "set" / style,
            FEW_CLASSES,
            max(2 * batch // (len(STYLES) - 1), 3 * FEW_CLASSES),
            (style,),
        )
    name, configs = f"domains:{folder / 'set'}", CONFIGS / "vl2v_adip" / "configs"
    files = ("base", "emoji/base", "students/emoji_lite0", "emoji/align", "stages/align")
    fields = [
        *_files(*(configs / file for file in files)), *_COMMON, "steps=1", f"batch_size={batch}", f"data.set={name}",
        f"fold.test_domain={STYLES[-1]}", "select_from_step=0", f"teacher.model={models.teacher}", *models.classifier,
    ]  # fmt: skip
    items = [item for item in load_set(name).splits["all"] if not item.key.startswith(STYLES[-1])]
    yield _with_and_without("VL2V-ADiP Align", AlignConfig, vl2v_job, fields, items, folder, args.dtype)


def _with_and_without(
    project: str,
    config_class: type[Any],
    build: Callable[[Any], Job],
    fields: list[str],
    items: list[Item],
    folder: Path,
    dtype: str,
) -> Case:
    """A teacher beside the student, and the same teacher's stored image embeddings of `items`."""
    outputs = folder / "outputs"
    live = config.load(config_class, [*fields, f"run_dir={folder}/live"])
    clip = load_clip(live.teacher.model)
    clip.module.to(distributed.device())
    note = store(ClipPredictor.of(clip), clip.digest, live.data, items, outputs, dtype)
    stored = config.load(
        config_class, [*fields, f"run_dir={folder}/stored", f"data.teacher_outputs={outputs}"]
    )
    ways = [Way("teacher every step", live, build), Way("images stored", stored, build)]
    return Case(project, FEW_CLASSES, live.batch_size, ways, note)


def _files(*paths: Path) -> list[str]:
    return [f"{path}.yaml" for path in paths]


# ----------------------------------------------------------------------------------------------------------- the table


def print_rows(models: Models, case: Case, limits: tuple[float, float]) -> bool:
    """One line for each way; whether all give equal numbers."""
    live, equal = case.ways[0], True
    for way in case.ways:
        loss, distance = difference(way, live)
        equal = equal and loss <= limits[0] and distance <= limits[1]
        print(
            f"| {models.name} | {case.project} | {case.classes} | {case.batch} | {way.name} | {way.median('step'):.3f} "
            f"| {way.median('teacher'):.3f} | {way.median('data_wait'):.3f} "
            f"| {live.median('step') / way.median('step'):.2f} | {loss:.1e} | {distance:.1e} | {len(way.seconds)} |",
            flush=True,
        )
    return equal


def main(argv: list[str]) -> int:
    """Parse the arguments and measure; 1 where two ways give different numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teachers", nargs="+", default=[NANO, "ViT-B-32"], help="nano, or open_clip architectures")
    add("--projects", nargs="+", choices=list(PROJECTS), default=list(PROJECTS))
    add("--classes", type=int, nargs="+", default=[5, 100, 397], help="of PromptKD")
    add("--batch-sizes", type=int, nargs=3, default=[8, 32, 30], metavar=("PROMPTKD", "DHO", "ALIGN"))
    add("--steps", type=int, default=3, help="timed steps of a turn")
    add("--seconds", type=float, default=10.0, help="a case takes turns for so long")
    add("--dtype", choices=list(LIMITS), default="float32", help="of the stored embeddings")
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    engine.start_ranks()
    try:
        equal = measure_all(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    distributed.leave()
    return 0 if equal else 1


def measure_all(args: argparse.Namespace) -> bool:
    """Print the table of all cases; whether all ways give equal numbers."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} thread(s)"
    print(f"Stored embeddings {args.dtype}, torch {torch.__version__}, {device}\n")
    print(
        "| teacher | project | classes | batch | teacher's outputs | s/step | of it teacher s | of it data s | times faster "
        "| loss difference | distance of the weights | steps |"
    )
    print("|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    notes, equal = [], True
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.teachers:
            models = Models.of(name, Path(scratch))
            for project in args.projects:
                folder = Path(scratch) / f"{name}_{project}"
                for case in PROJECTS[project](models, folder, args):
                    measure(case.ways, args.steps, args.seconds)
                    equal = print_rows(models, case, LIMITS[args.dtype]) and equal
                    notes.append(f"{name}, {case.project}: {case.note}")
    print("\nStored once:\n" + "\n".join(f"- {note}" for note in notes))
    print(
        "\nAll ways give equal numbers."
        if equal
        else f"\nNOT EQUAL: a difference is above {LIMITS[args.dtype]}."
    )
    return equal


PROJECTS = {"promptkd": promptkd, "dho": dho, "align": align}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
