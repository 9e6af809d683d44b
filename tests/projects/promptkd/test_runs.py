"""Teacher, class vectors, student and evaluation from end to end on a tiny image tree."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from projects.promptkd import build_bank
from projects.promptkd import eval as evaluation
from projects.promptkd.build import class_vectors
from projects.promptkd.config import ClipConfig, StudentConfig, TeacherSource
from projects.promptkd.prompts import class_tokens
from projects.promptkd.student import PromptedStudent, student_classifier
from projects.promptkd.teacher import TEACHER_JSON, load_teacher, read_export
from tests.projects.promptkd import released
from tests.projects.zygote import Zygote
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Result
from vlmkd.export.classifier import load_classifier
from vlmkd.export.clip import export_clip
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import build_clip, load_clip
from vlmkd.results import FILE, Number, last_of, numbers_of, read_results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
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


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree and two CLIPs."""
    path = tmp_path_factory.mktemp("promptkd")
    write_tree(path / "tree")
    write_clip(path / "large", 32, 24, 1)
    write_clip(path / "small", 16, 16, 2)
    return path


@pytest.fixture(scope="module")
def run(root: Path, zygote: Zygote) -> Run:
    """`run(NAME, STAGE, FIELDS)` is a whole run of train_STAGE.py; it returns the folder of its export.

    `again` goes on with the run's config; `verified` reloads the export in a fresh process, which takes seconds.
    """

    def start(
        name: str, stage: str, fields: dict[str, Any], *, again: bool = False, verified: bool = False
    ) -> Path:
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
        code, output = zygote.run(
            f"projects.promptkd.train_{stage}",
            [str(path), f"run_dir={root / name}"],
            root / f"{name}.txt",
            without=()
            if verified
            else ("projects.promptkd.task:verify", "projects.promptkd.task:verify_classifiers"),
        )
        assert code == 0, output
        return root / name / "export"

    return start


@pytest.fixture(scope="module")
def place(root: Path, run: Run) -> Path:
    """The same folder with a trained teacher."""
    fields = {
        "steps": "3ep",
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
    run("teacher", "teacher", fields, verified=True)
    return root


def student_fields(root: Path, **fields: Any) -> dict[str, Any]:
    """A student run of two epochs."""
    return {
        "steps": "2ep",
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
    content = last_of(read_results(run_dir / FILE))
    sets = {model: [dataset for dataset, _ in found if dataset][-1:] for model, found in content.items()}
    return {
        model: {metric: one.value for (dataset, metric), one in found.items() if [dataset] == sets[model]}
        for model, found in content.items()
    }


def test_the_teacher_trains_on_shots_of_the_base_classes(place: Path) -> None:
    data = json.loads((place / "teacher" / "data.json").read_text())["streams"]["train"]
    assert (data["items"], data["labelled"]) == (6, 6)  # 2 shots of 3 base classes
    train = lines(place / "teacher", "train")
    assert len(train) == 6  # 3 epochs of 2 whole batches
    assert {"loss/ce", "loss/text", "loss/image", "loss/logit"} <= train[0].keys()
    rates = [line["lr"] for line in train]
    assert rates[:2] == pytest.approx([1e-5] * 2) and rates[2:4] == pytest.approx([0.005] * 2)
    assert rates[4] == pytest.approx(0.00375)  # (1 + cos(pi / 3)) / 2
    facts = json.loads((place / "teacher" / "export" / TEACHER_JSON).read_text())
    assert facts["class_names"] == NAMES[:3]
    measured = results(place / "teacher")["student"]
    assert {"base_top1", "novel_top1", "harmonic_mean"} <= measured.keys()


def test_cached_and_recomputed_class_vectors_give_the_same_student(
    place: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, views = place / "bank.safetensors", place / "outputs"
    data = [f"data.set=folder:{place / 'tree'}", "data.workers=0", f"data.teacher_outputs={views}"]
    argv = [f"out={bank}", f"teacher.prompts={place / 'teacher' / 'export'}", "image_views=2", *data]
    assert build_bank.main(argv) == 0, capsys.readouterr().err

    teacher = load_teacher(TeacherSource(prompts=str(place / "teacher" / "export")), "tree", "base_to_novel")
    dataset = load_set(f"folder:{place / 'tree'}", "")
    stored = ClassVectors.load(bank, expect_class_names=NAMES)
    assert torch.equal(stored.vectors, teacher.class_vectors(dataset).vectors)

    cached = run("cached", "student", student_fields(place, class_vectors=str(bank)), verified=True)
    fresh = run("fresh", "student", student_fields(place, text_every_step=True))
    one, other = (load_file(folder / "model.safetensors") for folder in (cached, fresh))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line["loss"] for line in lines(folder.parent, "train")] for folder in (cached, fresh)]
    assert len(losses[0]) == 12 and losses[0] == losses[1]
    frozen = load_clip(f"local-dir:{place / 'small'}").module.visual.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(one[f"backbone.tower.{name}"], value) for name, value in frozen.items())
    assert one["backbone.prompts"].abs().min() > 0
    labelled = json.loads((cached.parent / "data.json").read_text())["streams"]["train"]
    assert (labelled["items"], labelled["labelled"]) == (30, 0)

    both = student_fields(place, class_vectors=str(bank), data={"teacher_outputs": str(views)})
    both["teacher"] = {"prompts": ""}  # neither tower of the teacher is loaded
    without = run("stored", "student", both)
    assert set(results(without.parent)) == {"student"}
    assert json.loads((without.parent / "data.json").read_text())["teacher_outputs"]["views"] == 2

    plain = TeacherSource(clip=ClipConfig(model=f"local-dir:{place / 'large'}"))
    other = load_teacher(plain, "tree", "base_to_novel")
    cfg = StudentConfig(
        run_dir="unused",
        student=ClipConfig(model="unused"),
        teacher=TeacherSource(clip=ClipConfig(model="unused")),
        class_vectors=str(bank),
    )
    assert torch.equal(class_vectors(cfg, dataset, teacher).vectors, stored.vectors)
    with pytest.raises(UserError, match="make them again with build_bank.py"):
        class_vectors(cfg, dataset, other)


def test_selection_exports_the_chosen_epoch_and_eval_agrees(
    place: Path, run: Run, zygote: Zygote, tmp_path: Path
) -> None:
    fields = student_fields(place, select="upstream", seed=7, evaluation={"every_steps": "1ep"})
    export = run("selected_s7", "student", fields)
    evaluations = [line for line in lines(export.parent, "eval") if line["model"] == "student"]
    assert len(evaluations) == 2
    measured = results(export.parent)
    best = max(line["tree/base_top1"] for line in evaluations)
    assert measured["selected"]["base_top1"] == pytest.approx(best)

    first = {name: load_file(folder / file) for name, folder, file in restarted(place, export)}
    for name, folder, _ in restarted(place, export):  # as if the machine had died during the final evaluation
        (folder.parent / "done.json").unlink()
        run(name, "teacher" if name == "teacher" else "student", {}, again=True)
        assert "resumed from" in (place / f"{name}.txt").read_text()
    for name, folder, file in restarted(place, export):
        again = load_file(folder / file)
        assert all(torch.equal(again[key], value) for key, value in first[name].items()), name

    assert load_classifier(export).class_names == NAMES

    # The README's first command, over seeds; the second one's run is a link to the first's.
    (place / "selected_s8").symlink_to(place / "selected_s7")
    out = tmp_path / "result.jsonl"
    seeds = ["--seeds", "7", "8", "--ckpt", str(place / "selected_s{seed}"), "--results", str(out)]
    arguments = ["--setting", "base2novel", *common(place), *seeds]
    code, said = zygote.run("projects.promptkd.eval", arguments, tmp_path / "eval.txt")
    assert code == 0, said[-2000:]
    content = read_results(out)
    assert sorted({one.tags["seed"] for one in content}) == [7, 8]
    first = {one.metric: one.value for one in content if one.tags["seed"] == 7}
    assert first == pytest.approx(measured["selected"])
    columns = (measured["selected"][name] for name in ("base_top1", "novel_top1", "harmonic_mean"))
    assert f"| average | {' | '.join(f'{100 * value:.2f} ± 0.00' for value in columns)} |" in said


def common(place: Path) -> list[str]:
    """Arguments of every evaluation here."""
    return ["--data", f"folder:{place / 'tree'}", "--quiet", "--device", "cpu"]


def test_published_files_are_evaluated_like_the_exports_that_they_hold(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files in the reference's layout, half precision and all, made of a run's teacher and of a student."""
    dataset = load_set(f"folder:{place / 'tree'}", "")
    teacher_export, large, small = (
        place / "teacher" / "export",
        *(f"local-dir:{place / name}" for name in ("large", "small")),
    )
    trained_teacher = read_export(teacher_export, ClipConfig())
    clip, prompted = trained_teacher.clip, trained_teacher.prompted
    assert prompted is not None
    tokens = class_tokens(clip.tokenizer, NAMES[:3], trained_teacher.template)
    released.write_checkpoint(place / "teacher.pth.tar", released.teacher_state(prompted, tokens), 3)
    trained = PromptedStudent(load_clip(small), 24, depth=2, length=2, seed=3)
    released.write_checkpoint(place / "student.pth.tar", released.student_state(trained), 2)

    cross = ["--setting", "cross", *common(place), "--ckpt"]
    teacher = [str(place / "teacher.pth.tar"), "--clip", large]
    student = [str(place / "student.pth.tar"), "--clip", small]
    for ckpt in (
        teacher,
        [*student, "--teacher", str(teacher_export)],
        [str(place / "teacher")],
        [f"clip:{small}"],
    ):
        assert evaluation.main([*cross, *ckpt]) == 0, capsys.readouterr().err
        assert "| average |" in capsys.readouterr().out
    with pytest.raises(UserError, match="name its teacher with --teacher"):
        evaluation.main([*cross, *student])

    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    source = TeacherSource(prompts=str(teacher_export))

    def logits(name: str, of: str) -> torch.Tensor:
        clip, device = ClipConfig(model=of), torch.device("cpu")
        found = evaluation.classifier(name, dataset, clip, source, "", device, "base_to_novel")
        return found.classify(images)

    torch.testing.assert_close(
        logits(teacher[0], large), logits(str(teacher_export), large), rtol=0.02, atol=0.02
    )
    vectors = load_teacher(source, "tree", "base_to_novel").class_vectors(dataset)
    ours = student_classifier("", trained, vectors, clip.image_spec).classify(images)
    torch.testing.assert_close(logits(student[0], small), ours, rtol=0.02, atol=0.02)


def test_without_a_label_the_student_is_compared_with_its_teacher(place: Path, run: Run) -> None:
    folder = place / "loose"
    for path in sorted((place / "tree" / "train").rglob("*.png")):
        (folder / "unlabelled").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "unlabelled" / f"{path.parent.name}_{path.name}")
    (place / "names.txt").write_text("\n".join(NAMES))
    fields = student_fields(
        place,
        steps="1ep",
        protocol="cross_dataset",
        teacher={"clip": {"model": f"local-dir:{place / 'large'}"}},
        data={"set": f"folder:{folder}", "class_names": str(place / "names.txt")},
    )
    export = run("unlabelled", "student", fields)
    assert load_classifier(export).class_names == NAMES
    content = last_of(read_results(export.parent / FILE))
    key = ("loose, teacher's answers", "top1")
    student, teacher = (numbers[key] for numbers in content.values() if key in numbers)
    assert "confusion" in json.loads((export.parent / "eval" / "details.json").read_text())["student"][key[0]]
    assert teacher.value == 1.0 and student.count == teacher.count > 0
    data = json.loads((export.parent / "data.json").read_text())["streams"]["train"]
    assert (data["items"] + student.count, data["labelled"]) == (30, 0)


def test_means_are_over_seeds_with_their_spread_and_the_harmonic_mean_is_that_of_the_means() -> None:
    def run(data: str, seed: int, base: float, novel: float) -> list[Number]:
        metrics = {"base_top1": base, "novel_top1": novel, "harmonic_mean": 2 * base * novel / (base + novel)}
        tags = {"data": data, "seed": seed}
        return numbers_of([Result("classification", data, metrics, 1)], run="", model="", tags=tags)

    by_run = [run("a", 1, 0.9, 0.5), run("b", 1, 0.5, 0.2), run("a", 2, 0.7, 0.7), run("b", 2, 0.3, 0.2)]
    runs = [one for found in by_run for one in found]
    root = 2**0.5  # two values that differ by d have the standard deviation d / sqrt 2

    def cells(*pairs: tuple[float, float]) -> str:
        return " | ".join(f"{100 * mean:.2f} ± {100 * spread:.2f}" for mean, spread in pairs)

    lines = evaluation.table(runs, "base2novel").splitlines()
    a = cells((0.8, 0.2 / root), (0.6, 0.2 / root), (2 * 0.8 * 0.6 / 1.4, (0.7 - 0.9 / 1.4) / root))
    assert lines[2] == f"| a | {a} |" == "| a | 80.00 ± 14.14 | 60.00 ± 14.14 | 68.57 ± 4.04 |"
    # The seeds' averages are 0.7 and 0.5, 0.35 and 0.45.
    harmonic = [2 * base * novel / (base + novel) for base, novel in ((0.7, 0.35), (0.5, 0.45))]
    spread = abs(harmonic[0] - harmonic[1]) / root
    average = cells((0.6, 0.2 / root), (0.4, 0.1 / root), (2 * 0.6 * 0.4 / 1.0, spread))
    assert lines[-1] == f"| average | {average} |"
    single = evaluation.table(runs[:6], "base2novel")
    assert "| a | 90.00 | 50.00 | 64.29 |" in single and "±" not in single
    # The published table's own average row.
    assert evaluation.harmonic_mean(86.96, 80.73) == pytest.approx(83.73, abs=0.005)
