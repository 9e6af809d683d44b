"""Teacher, class vectors, student and evaluation from end to end on a tiny image tree."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from projects.promptkd import build_bank
from projects.promptkd import eval as evaluation
from projects.promptkd.build import (
    class_vectors,
    data_set,
    resolve_student,
    resolve_teacher,
    student_job,
    teacher_job,
)
from projects.promptkd.config import ClipConfig, StudentConfig, TeacherConfig, TeacherSource
from projects.promptkd.exports import read_student, read_teacher
from projects.promptkd.teacher import load_teacher
from vlmkd.errors import UserError
from vlmkd.export import export_clip
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import build_clip, load_clip
from vlmkd.run import main

pytestmark = pytest.mark.slow

NAMES = ["amber", "blue", "cyan", "dark", "emerald"]
COLOURS = [(250, 180, 20), (20, 30, 230), (30, 230, 230), (10, 10, 10), (20, 200, 90)]


def write_tree(folder: Path) -> None:
    """Five classes of coloured pictures: 6 training, 2 validation and 3 test images each."""
    rng = random.Random(0)
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for name, colour in zip(NAMES, COLOURS, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shade = tuple(min(255, max(0, part + rng.randint(-20, 20))) for part in colour)
                Image.new("RGB", (20, 18), shade).save(folder / split / name / f"{number}.png")


def write_clip(folder: Path, width: int, embed_dim: int, seed: int) -> None:
    """A random CLIP with open_clip's own tokenizer as a model folder."""
    path = folder.with_suffix(".json")
    tower = {"width": width, "layers": 2}
    config = {
        "embed_dim": embed_dim,
        "vision_cfg": {**tower, "image_size": 16, "head_width": 16, "patch_size": 8},
        "text_cfg": {**tower, "context_length": 16, "vocab_size": 49408, "heads": width // 16},
    }
    path.write_text(json.dumps(config))
    clip = load_clip(str(path))
    clip.module.load_state_dict(build_clip(config, seed=seed).state_dict())
    export_clip(folder, clip)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree, two CLIPs and a trained teacher."""
    root = tmp_path_factory.mktemp("promptkd")
    write_tree(root / "tree")
    write_clip(root / "large", 32, 24, 1)
    write_clip(root / "small", 16, 16, 2)
    fields = {
        "epochs": 3,
        "batch_size": 3,
        "shots": 2,
        "clip": {"model": f"local-dir:{root / 'large'}"},
        "prompts": {
            "image_depth": 2,
            "image_length": 2,
            "text_depth": 2,
            "text_length": 2,
            "init": "a photo of a",
        },
        "average": {"mean": 2.0, "std": 1.0},
        "frozen_templates": "set",
        "classes_per_chunk": 2,
    }
    run(root, "teacher", TeacherConfig, fields)
    return root


def run(root: Path, name: str, cls: Any, fields: dict[str, Any], code: int = 0, again: bool = False) -> Path:
    """A whole run in a forked process, which spares its imports; the folder of its export. `again`: the same config."""
    shared: dict[str, Any] = {
        "threads": 1,
        "data": {"set": f"folder:{root / 'tree'}", "workers": 0},
        "log": {"every_steps": 1},
        "checkpoint": {"every_steps": 0},
    }
    for key, value in fields.items():
        shared[key] = {**shared[key], **value} if key in shared and isinstance(value, dict) else value
    path = root / f"{name}.yaml"
    if not again:
        path.write_text(yaml.safe_dump(shared))
    child = multiprocessing.get_context("fork").Process(
        target=_run, args=(cls, [str(path), f"run_dir={root / name}"], root / f"{name}.txt")
    )
    child.start()
    child.join(120)
    assert child.exitcode == code, (root / f"{name}.txt").read_text()
    return root / name / "export"


def _run(cls: Any, argv: list[str], output: Path) -> None:
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    job, resolve = (teacher_job, resolve_teacher) if cls is TeacherConfig else (student_job, resolve_student)
    main(cls, job, argv, resolve=resolve)


def student_fields(root: Path, **fields: Any) -> dict[str, Any]:
    """A student run of two epochs."""
    return {
        "epochs": 2,
        "batch_size": 5,
        "student": {"model": f"local-dir:{root / 'small'}"},
        "prompts": {"depth": 2, "length": 2},
        "teacher": {"prompts": str(root / "teacher" / "export")},
        "loss": {"weight": 10.0},
        **fields,
    }


def restarted(place: Path, export: Path) -> list[tuple[str, Path, str]]:
    """Run, export folder and weights file of the runs whose average or selection must survive a restart."""
    return [
        ("teacher", place / "teacher" / "export", "prompts.safetensors"),
        ("selected_s7", export, "model.safetensors"),
    ]


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one kind."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def results(run_dir: Path) -> dict[str, dict[str, float]]:
    """Metrics of the final evaluation by model, on the test images."""
    content = json.loads((run_dir / "eval" / "results.json").read_text())
    return {model: found[-1]["metrics"] for model, found in content.items()}


def test_the_teacher_trains_on_shots_of_the_base_classes(place: Path) -> None:
    data = json.loads((place / "teacher" / "data.json").read_text())["streams"]["train"]
    assert (data["items"], data["labelled"]) == (6, 6)  # 2 shots of 3 base classes
    train = lines(place / "teacher", "train")
    assert len(train) == 6  # 3 epochs of 2 whole batches
    assert {"loss/ce", "loss/text", "loss/image", "loss/logit"} <= train[0].keys()
    rates = [line["lr"] for line in train]
    assert rates[:2] == pytest.approx([1e-5] * 2) and rates[2:4] == pytest.approx([0.005] * 2)
    assert rates[4] == pytest.approx(0.00375)  # (1 + cos(pi / 3)) / 2
    prompted, _, facts = read_teacher(place / "teacher" / "export")
    assert facts.class_names == NAMES[:3]
    measured = results(place / "teacher")["student"]
    assert {"base_top1", "novel_top1", "harmonic_mean"} <= measured.keys()


def test_cached_and_recomputed_class_vectors_give_the_same_student(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, views = place / "bank.safetensors", place / "outputs"
    data = [f"data.set=folder:{place / 'tree'}", "data.workers=0", f"data.teacher_outputs={views}"]
    argv = [f"out={bank}", f"teacher.prompts={place / 'teacher' / 'export'}", "image_views=2", *data]
    assert build_bank.main(argv) == 0, capsys.readouterr().err

    teacher = load_teacher(TeacherSource(prompts=str(place / "teacher" / "export")), "tree")
    dataset = data_set(f"folder:{place / 'tree'}", "")
    stored = ClassVectors.load(bank, expect_class_names=NAMES)
    assert torch.equal(stored.vectors, teacher.class_vectors(dataset).vectors)

    cached = run(place, "cached", StudentConfig, student_fields(place, class_vectors=str(bank)))
    fresh = run(place, "fresh", StudentConfig, student_fields(place, text_every_step=True))
    one, other = (load_file(folder / "model.safetensors") for folder in (cached, fresh))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line["loss"] for line in lines(folder.parent, "train")] for folder in (cached, fresh)]
    assert len(losses[0]) == 12 and losses[0] == losses[1]
    frozen = load_clip(f"local-dir:{place / 'small'}").module.visual.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(one[f"image.tower.{name}"], value) for name, value in frozen.items())
    assert not torch.equal(one["image.prompts"], torch.zeros_like(one["image.prompts"]))
    labelled = json.loads((cached.parent / "data.json").read_text())["streams"]["train"]
    assert (labelled["items"], labelled["labelled"]) == (30, 0)

    both = student_fields(place, class_vectors=str(bank), data={"teacher_outputs": str(views)})
    both["teacher"] = {"prompts": ""}  # neither tower of the teacher is loaded
    without = run(place, "stored", StudentConfig, both)
    assert set(results(without.parent)) == {"student"}
    assert json.loads((without.parent / "data.json").read_text())["teacher_outputs"]["views"] == 2

    other = load_teacher(TeacherSource(clip=ClipConfig(model=f"local-dir:{place / 'large'}")), "tree")
    cfg = StudentConfig(
        run_dir="unused",
        student=ClipConfig(model="unused"),
        teacher=TeacherSource(clip=ClipConfig(model="unused")),
        class_vectors=str(bank),
    )
    assert torch.equal(class_vectors(cfg, dataset, teacher).vectors, stored.vectors)
    with pytest.raises(UserError, match="make them again with build_bank.py"):
        class_vectors(cfg, dataset, other)


def test_selection_exports_the_chosen_epoch_and_eval_agrees(place: Path, tmp_path: Path) -> None:
    fields = student_fields(place, select="upstream", seed=7)
    export = run(place, "selected_s7", StudentConfig, fields)
    evaluations = [line for line in lines(export.parent, "eval") if line["model"] == "student"]
    assert len(evaluations) == 2
    measured = results(export.parent)
    best = max(line["tree/base_top1"] for line in evaluations)
    assert measured["selected"]["base_top1"] == pytest.approx(best)

    first = {name: load_file(folder / file) for name, folder, file in restarted(place, export)}
    for name, folder, _ in restarted(place, export):  # as if the machine had died during the final evaluation
        (folder.parent / "done.json").unlink()
        run(place, name, TeacherConfig if name == "teacher" else StudentConfig, {}, again=True)
        assert "resumed from" in (place / f"{name}.txt").read_text()
    for name, folder, file in restarted(place, export):
        again = load_file(folder / file)
        assert all(torch.equal(again[key], value) for key, value in first[name].items()), name

    out = tmp_path / "result.json"
    common = ["--data", f"folder:{place / 'tree'}", "--quiet", "--device", "cpu"]
    argv = [
        "--setting",
        "base2novel",
        "--ckpt",
        str(place / "selected_s{seed}"),
        "--seeds",
        "7",
        "--json",
        str(out),
    ]
    assert evaluation.main([*argv, *common]) == 0
    content = json.loads(out.read_text())
    assert content["runs"][0]["metrics"] == pytest.approx(measured["selected"])
    student = read_student(export)
    assert student.class_names == NAMES
    for ckpt in (str(place / "teacher"), f"clip:local-dir:{place / 'small'}"):
        assert evaluation.main(["--setting", "cross", "--ckpt", ckpt, *common]) == 0


def test_harmonic_mean_is_that_of_the_mean_accuracies() -> None:
    runs = [
        {"data": "a", "metrics": {"base_top1": 0.9, "novel_top1": 0.5, "harmonic_mean": 0.0}},
        {"data": "a", "metrics": {"base_top1": 0.7, "novel_top1": 0.7, "harmonic_mean": 0.0}},
        {"data": "b", "metrics": {"base_top1": 0.4, "novel_top1": 0.2, "harmonic_mean": 0.0}},
    ]
    result = evaluation.summary(runs)
    assert result["data"]["a"]["harmonic_mean"] == pytest.approx(2 * 0.8 * 0.6 / 1.4)
    assert result["average"]["base_top1"] == pytest.approx(0.6)  # of the sets, not of the runs
    assert result["average"]["harmonic_mean"] == pytest.approx(2 * 0.6 * 0.4 / 1.0)
    # The published table's own average row (spec f).
    assert evaluation.harmonic_mean(86.96, 80.73) == pytest.approx(83.73, abs=0.005)
