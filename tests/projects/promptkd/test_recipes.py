"""The shipped recipes: published values, the published learning rates, and what the configs refuse."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from projects.promptkd.build import _steps_per_epoch
from projects.promptkd.config import BankConfig, StudentConfig, TeacherConfig
from projects.promptkd.gaussian import GaussianAverage
from projects.promptkd.objective import epoch_cosine
from projects.promptkd.protocols import held_out, only_classes, student_protocol, teacher_protocol
from vlmkd import config
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import UNLABELLED, Item, LabelledSet
from vlmkd.errors import UserError

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "projects" / "promptkd" / "configs"
# lr .005, N = 20 (docs/papers/promptkd.md#recipe)
RATES = [
    1e-5, .005, .00496922, .00487764, .00472752, .00452254, .00426777, .00396946, .00363498, .00327254, .00289109,
    .0025, .00210891, .00172746, .00136502, .00103054, .00073223, .00047746, .00027248, .00012236,
]  # fmt: skip


LOOKS: dict[str, Any] = {"evaluation.every_steps": "1ep"}


def load(stage: str, *names: str, **fields: Any) -> Any:
    """A run's config, stacked on its stage's recipe."""
    cls = TeacherConfig if stage == "teacher" else StudentConfig
    words = [str(CONFIGS / f"{name}.yaml") for name in (f"base/{stage}", *names)]
    return config.load(cls, [*words, *(f"{name}={value}" for name, value in fields.items())])


@pytest.mark.parametrize(
    ("name", "batch", "lr", "epochs", "depth", "gpa", "classes"),
    [
        ("promptsrc_base2novel_b16", 4, 0.0025, 20, 9, (15, 1), "base"),
        ("teacher_base2novel", 8, 0.005, 20, 9, (15, 1), "base"),
        ("promptsrc_cross_b16", 8, 0.005, 20, 3, (6, 10), "all"),
        ("promptsrc_few_shot_b16", 8, 0.005, 50, 9, (30, 30), "all"),
    ],
)
def test_rows_of_the_published_table(
    name: str, batch: int, lr: float, epochs: int, depth: int, gpa: tuple[int, int], classes: str
) -> None:
    cfg = load("teacher", name)
    assert (cfg.batch_size, cfg.optim.lr, cfg.steps, cfg.classes) == (batch, lr, f"{epochs}ep", classes)
    assert (cfg.prompts.image_depth, cfg.prompts.text_depth) == (depth, depth)
    assert (cfg.average.mean, cfg.average.std) == gpa
    assert (cfg.optim.momentum, cfg.optim.weight_decay, cfg.optim.decay_all) == (0.9, 5e-4, True)


def test_students_of_the_published_table() -> None:
    for name, depth in (("base2novel", 9), ("cross_dataset", 3), ("domain_generalization", 3)):
        cfg = load("student", name)
        assert (cfg.batch_size, cfg.optim.lr, cfg.steps, cfg.prompts.depth) == (8, 0.005, "20ep", depth)
        assert (cfg.loss.weight, cfg.loss.temperature, cfg.loss.reduction) == (1000.0, 1.0, "element")
    assert load("student", "base2novel", "sets/weight_200").loss.weight == 200.0
    assert load("student", "base2novel", "add/batch_256").optim.lr == 0.16
    late = load("teacher", "promptsrc_few_shot_b16", "sets/few_shot_late")
    assert (late.average.mean, late.average.std, late.steps) == (45.0, 5.0, "50ep")


def test_the_learning_rate_and_the_average_are_the_published_ones() -> None:
    optim = load("student", "base2novel").optim
    assert [optim.lr * epoch_cosine(epoch, 20, optim) for epoch in range(20)] == pytest.approx(
        RATES, abs=5e-9
    )
    average = GaussianAverage(20, 15.0, 1.0).coefficients
    assert average[10:19] == pytest.approx(
        [.00013, .00443, .05399, .24197, .39894, .24197, .05399, .00443, .00013], abs=5e-6
    )  # fmt: skip


def test_a_batch_is_no_larger_than_an_epoch() -> None:
    cfg = load("student", "base2novel")
    assert _steps_per_epoch(cfg, 93) == 11
    with pytest.raises(UserError, match="batch_size is 8, more than the 7 training images"):
        _steps_per_epoch(cfg, 7)


def labelled(train: int = 20, val: int = 3, test: int = 4) -> LabelledSet:
    """Five classes with so many images a split."""
    splits = {
        name: [
            Item(f"{name}/{label}/{number}", ImageRef(f"{number}.png"), label)
            for label in range(5)
            for number in range(count)
        ]
        for name, count in (("train", train), ("val", val), ("test", test))
        if count
    }
    return LabelledSet("five", list("abcde"), ["a photo of a {}."], splits)


def test_chosen_classes_are_labelled_anew_in_their_order() -> None:
    items = [Item(str(label), ImageRef("x"), label) for label in (7, 3, 9, 7)]
    assert [(item.key, item.label) for item in only_classes(items, [9, 7])] == [("7", 1), ("9", 0), ("7", 1)]


def test_a_teacher_sees_base_labels_and_a_student_sees_none() -> None:
    cfg = load("teacher", "teacher_base2novel", select="val", **LOOKS)
    protocol = teacher_protocol(cfg, labelled())
    assert protocol.classes == [0, 1, 2] and len(protocol.train) == 3 * 16
    assert {item.label for item in protocol.train} == {0, 1, 2}
    assert protocol.test.groups == {"base": [0, 1, 2], "novel": [3, 4]} and len(protocol.test.items) == 20
    assert protocol.validation is not None and {item.label for item in protocol.validation.items} == {0, 1, 2}
    every = teacher_protocol(load("teacher", "promptsrc_cross_b16"), labelled())
    assert every.classes == [0, 1, 2, 3, 4] and every.test.groups == {}

    student = student_protocol(load("student", "base2novel"), labelled())
    assert len(student.train) == 100 and {item.label for item in student.train} == {UNLABELLED}
    assert len(student_protocol(load("student", "base2novel", shots=4), labelled()).train) == 20
    assert student.selection_metric == "base_top1"
    across = student_protocol(load("student", "cross_dataset"), labelled())
    assert across.test.groups == {} and across.selection_metric == "top1"
    with pytest.raises(UserError, match="five has no validation images"):
        student_protocol(load("student", "base2novel", select="val", **LOOKS), labelled(val=0))


def test_domain_generalization_holds_images_out_unless_told_not_to(caplog: pytest.LogCaptureFixture) -> None:
    one_split = labelled(train=0, val=0, test=10)
    published = student_protocol(load("student", "domain_generalization"), one_split)
    assert [item.key for item in published.train] == [item.key for item in published.test.items]
    assert "both the unlabelled training set and the test set" in caplog.text
    honest = student_protocol(load("student", "domain_generalization", hold_out=0.3), one_split)
    keys = [{item.key for item in part} for part in (honest.train, honest.test.items)]
    assert not keys[0] & keys[1] and (len(keys[0]), len(keys[1])) == (35, 15)
    train, test = held_out(labelled().splits["train"], 0.5, 3)
    assert (train, test) == held_out(labelled().splits["train"], 0.5, 3)
    with pytest.raises(UserError, match="one side has none"):
        held_out(one_split.splits["test"][:1], 0.5, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "upstream"}, "select is upstream, but evaluation.every_steps is 0"),
        ({"optim.warmup_steps": 5}, "optim.warmup_steps is 5, but epoch_cosine"),
        ({"deepspeed.precision": "bf16"}, "set autocast=bf16"),
        ({"deepspeed.zero_stage": 3}, "deepspeed.zero_stage is 3"),
        ({"text_every_step": "true", "class_vectors": "a"}, "text_every_step computes"),
        ({"loss.weight": 0}, "loss.weight is 0"),
        ({"teacher.prompts": "", "teacher.clip.model": ""}, "teacher is empty"),
        (
            {"protocol": "domain_generalization", "select": "val", "evaluation.every_steps": "1ep"},
            "select is val",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("student", "base2novel", **fields)


def test_the_scripts_start_the_published_runs() -> None:
    def commands(script: str, *words: str, **env: str) -> list[list[str]]:
        variables = {**os.environ, "DRY_RUN": "1", "DATA": "/data", **env}
        done = subprocess.run(
            ["bash", str(ROOT / "projects/promptkd/scripts" / script), *words],
            env=variables, capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        return [shlex.split(line) for line in done.stdout.splitlines()]

    def students(found: list[list[str]]) -> Any:
        (words,) = [words for words in found if "projects.promptkd.train_student" in words]
        return config.load(StudentConfig, words[words.index("projects.promptkd.train_student") + 1 :])

    found = commands("base_to_novel.sh", "dtd", "3")
    assert [words[words.index("-m") + 1].rpartition(".")[2] for words in found] == [
        "train_teacher", "build_bank", "train_student", "eval",
    ]  # fmt: skip
    cfg = students(found)
    assert (cfg.loss.weight, cfg.seed, cfg.data.set, cfg.protocol) == (200.0, 3, "dtd", "base_to_novel")
    assert cfg.class_vectors == "runs/promptkd/base2novel/dtd/class_vectors.safetensors"
    published = commands("base_to_novel.sh", "food101", "1", TEACHER="/t/Food101.pth.tar-20")
    assert len(published) == 3 and students(published).loss.weight == 1000.0
    assert students(published).teacher.prompts == "/t/Food101.pth.tar-20"
    assert students(commands("domain_generalization.sh", "imagenet-a", "1")).hold_out == 0.5
    assert students(commands("domain_generalization.sh", "imagenet-a", "1", HOLD_OUT="0")).hold_out == 0.0
    across = commands("cross_dataset.sh", "eurosat", "2")
    assert students(across).prompts.depth == 3
    for found, setting in ((published, "base_to_novel"), (across, "cross_dataset")):
        (words,) = [words for words in found if "projects.promptkd.build_bank" in words]
        bank = config.load(BankConfig, words[words.index("projects.promptkd.build_bank") + 1 :])
        assert bank.protocol == setting == students(found).protocol

    for length, seeds, shots in (("first", [1], 64), ("full", [1, 2, 3], 0)):
        words = [
            line for line in commands("nano.sh", LENGTH=length) if "projects.promptkd.train_student" in line
        ]
        at = words[0].index("projects.promptkd.train_student") + 1
        runs = [config.load(StudentConfig, line[at:]) for line in words]
        named = [cfg for cfg in runs if "student_s" in cfg.run_dir]
        assert [cfg.seed for cfg in named] == seeds and {cfg.shots for cfg in named} == {shots}
