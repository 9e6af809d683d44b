"""scripts/distill_folder.sh: bad input in one line before anything is trained, the planned runs, and whole runs."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from scripts.to_onnx import missing_for_onnx
from tests.projects.vl2v_adip.tiny import CLASSES, domain_tree, export_teacher
from tests.projects.zygote import Zygote
from vlmkd.config import RunConfig
from vlmkd.errors import UserError
from vlmkd.export.classifier import load_classifier
from vlmkd.train.durations import in_steps

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts/distill_folder.py"))


def test_has_field() -> None:
    known = ["steps", "optim.lr", "optim.groups.1.lr", "deepspeed.extra.prescale"]
    assert all(SCRIPT["has_field"](RunConfig, path) for path in known)
    assert not any(SCRIPT["has_field"](RunConfig, path) for path in ["step", "optim.lrr", "log.x.y"])


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of ten images, not one of which is ever opened; commands run in the folder above."""
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "pets", *(f"{name}/{n}.jpg" for name in ("big_cat", "dog") for n in range(10)))
    return tmp_path / "pets"


def planned(*argv: str) -> list[Any]:
    """The stages of a command."""
    args = SCRIPT["_parse"](list(argv))
    return SCRIPT["_plan"](args, SCRIPT["_checked_set"](args))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "promptkd"], "the following arguments are required: IMAGES"),
        (["pets"], "the following arguments are required: --method"),
        (["pets", "--method", "clipkd"], "invalid choice: 'clipkd'"),
        (["nowhere", "--method", "dho"], "nowhere does not exist"),
        (["pets", "--method", "dho", "--colour"], "unrecognized arguments: --colour"),
        (["pets", "--method", "dho", "more"], "'more' is neither an option nor field=value"),
        (["pets", "--method", "dho", "--shots", "0"], "dho learns from labels"),
        (["pets", "--method", "dho", "--epochs", "0"], "--epochs 0 is too small"),
        (["pets", "--method", "dho", "--hold-out", "dog"], "dho has none"),
        (["pets", "--method", "dho", "--prompt", "a pet"], "has no {} for the class name"),
        (["pets", "--method", "dho", "--teacher", "ViT-L-14"], "names no weights"),
        (["pets", "--method", "dho", "--student", "timm:x", "run_dir=here"], "run_dir is decided by --out"),
        (["pets", "--method", "dho", "teacher:steps=2ep"], "no stage 'teacher', only student"),
        (
            ["pets", "--method", "dho", "optim.lrr=1"],
            "unknown config field optim.lrr; did you mean optim.lr?",
        ),
        (["pets", "--method", "dho", "steps=many"], "steps"),
        (["pets", "--method", "promptkd", "--prompt", "{} here"], "has no word before {}"),
        (["pets", "--method", "vl2v_adip"], "pets/big_cat holds 0 class folders"),
    ],
)
def test_bad_commands(pets: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        SCRIPT["main"](arguments)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not Path("runs").exists()


def test_bad_folders(pets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *arguments: str, method: str = "promptkd") -> None:
        with pytest.raises(UserError, match=message):
            SCRIPT["main"](["pets", "--method", method, *arguments])

    names = pets.with_name("names.txt")
    names.write_text("dog\n")
    refused("'big cat' has no line", "--classes", "names.txt")
    names.write_text("dog\tcat\nbig cat\tCat\n")
    refused("have the same prompt", "--classes", "names.txt")
    refused("does not exist", "--classes", "other.txt")
    (pets / "empty").mkdir()
    refused("class folder .*empty .*holds no image", method="dho")
    shutil.rmtree(pets / "empty")
    touch(pets, "Big cat/1.jpg")
    refused("'Big cat'.*'big cat'.*same prompt", method="dho")
    shutil.rmtree(pets)
    touch(pets, "a/1.jpg", "b/1.jpg")
    refused("no class has two images")
    shutil.rmtree(pets)
    touch(pets, *(f"unlabelled/{n}.jpg" for n in range(30)))
    refused("holds 0 class folders")
    names.write_text("dog\ncat\n")
    refused("dho learns from labels", "--classes", "names.txt", method="dho")
    shutil.rmtree(pets)
    touch(pets, *(f"{domain}/{name}/{n}.jpg" for domain in "xy" for name in "ab" for n in range(5)))
    refused("--hold-out z: .*pets has the domains x, y", "--hold-out", "z", method="vl2v_adip")
    touch(pets, "unlabelled/1.jpg")
    refused("unlabelled holds 0 class folders; a domain needs at least two", method="vl2v_adip")
    assert not Path("runs").exists()

    script = ["bash", str(ROOT / "scripts/distill_folder.sh"), str(pets), "--method", "vl2v_adip"]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_finished_runs_do_not_pass_for_runs_on_other_images(pets: Path) -> None:
    def check(*more: str) -> None:
        args = SCRIPT["_parse"](["pets", "--method", "dho", *more])
        SCRIPT["_check_same_images"](args, SCRIPT["_checked_set"](args))

    check()
    check()
    touch(pets, "dog/new.jpg")
    with pytest.raises(UserError, match="runs/pets_dho: its runs are of other images"):
        check()
    check("--out", "new")
    pets.with_name("names.txt").write_text("dog\nbig cat\n")
    with pytest.raises(UserError, match="of other images or classes"):
        check("--out", "new", "--classes", "names.txt")
    with pytest.raises(UserError, match="cannot be written"):
        check("--out", "names.txt")
    noted = Path("new/images.json")
    assert [path.name for path in noted.parent.iterdir()] == [noted.name]
    for torn in (b"", noted.read_bytes()[:20], b"[]", b"{}", b"\xff\xfe"):
        noted.write_bytes(torn)
        with pytest.raises(UserError, match="images.json is damaged"):
            check("--out", "new")


def test_promptkd_learns_prompts_only_from_labels(pets: Path) -> None:
    teacher, student = planned(
        "pets", "--method", "promptkd", "--epochs", "7", "seed=5", "student:optim.lr=0.5"
    )
    prompted, distilled = teacher.config(), student.config()
    assert (teacher.name, student.name) == ("teacher", "student")
    assert (prompted.classes, prompted.shots, prompted.steps) == ("all", 16, "20ep")
    assert (prompted.clip.model, prompted.clip.pretrained) == ("ViT-L-14-quickgelu", "openai")
    assert distilled.teacher.clip == prompted.clip and prompted.run_dir == "runs/pets_promptkd/teacher"
    assert distilled.teacher.prompts == "runs/pets_promptkd/teacher/export"
    assert (distilled.protocol, distilled.steps, distilled.select) == ("cross_dataset", "7ep", "last")
    assert (distilled.student.model, distilled.data.set) == ("ViT-B-16-quickgelu", f"folder:{pets}")
    assert (prompted.seed, distilled.seed, prompted.optim.lr, distilled.optim.lr) == (5, 5, 0.005, 0.5)

    teacher, student = planned("pets", "--method", "promptkd", "--prompt", "an emoji of {}")
    prompts = teacher.config().prompts
    assert (prompts.template, prompts.init, prompts.text_length) == ("an emoji of {}", "an emoji of", 3)
    assert student.config().data.templates == ["an emoji of {}"]

    (alone,) = planned(
        "pets", "--method", "promptkd", "--shots", "0", "--teacher", "zoo:tinyclip-emoji-teacher"
    )
    assert alone.config().teacher.prompts == "" and alone.config().teacher.clip.pretrained == ""
    shutil.rmtree(pets)
    touch(pets, *(f"unlabelled/{n}.jpg" for n in range(30)))
    pets.with_name("names.txt").write_text("dog\ncat\n")
    (alone,) = planned("pets", "--method", "promptkd", "--classes", "names.txt", "--out", "else where")
    assert (alone.config().data.class_names, alone.config().run_dir) == ("names.txt", "else where/student")


def test_dho_counts_passes_over_all_training_images(pets: Path) -> None:
    (stage,) = planned("pets", "--method", "dho")
    cfg = stage.config()
    assert (cfg.split.percent, cfg.split.shots, cfg.split.validation, cfg.selection) == (
        100,
        0,
        "val",
        "best",
    )
    assert cfg.steps == "max(500, 30ep)" and in_steps(cfg, 5).optim.warmup_steps == 50
    assert in_steps(cfg, 5).evaluation.every_steps == 20 and cfg.epoch == "unlabelled"
    assert cfg.student.backbone == "torchvision:resnet18" and cfg.loss.method == "dho"
    touch(pets, *(f"unlabelled/{n}.jpg" for n in range(1000)))
    (stage,) = planned("pets", "--method", "dho", "--epochs", "4", "--shots", "2", "batch_size=20")
    cfg = stage.config()
    assert (cfg.steps, cfg.split.shots, cfg.split.percent) == ("4ep", 2, 0)
    (stage,) = planned("pets", "--method", "dho", "--student", "timm:test_vit", "steps=30")
    assert in_steps(stage.config(), 0).optim.warmup_steps == 3

    shutil.rmtree(pets)
    touch(pets, *(f"{name}/{n}.jpg" for name in "cj" for n in range(4)))
    (stage,) = planned("pets", "--method", "dho")
    cfg = stage.config()
    assert (cfg.split.validation, cfg.mixing.mode, cfg.selection) == ("none", "fixed", "last")


def test_a_micro_batch_fits_and_shares_out_every_stream() -> None:
    """By hand, and no batch is another part of one stream than of the other."""
    fit = SCRIPT["micro_batch"]
    assert fit(128, [64, 64], 1, image=100, room=12_800) == 128
    assert fit(128, [64, 64], 1, image=100, room=12_799) == 64
    assert fit(128, [64, 64], 1, image=100, room=3_300) == 32
    assert fit(128, [64, 64], 2, image=100, room=3_300) == 32  # a rank has 64
    assert fit(60, [12, 48], 1, image=1, room=31) == 30
    assert fit(60, [12, 48], 1, image=1, room=1) == 20  # four of the first stream, however little memory
    assert fit(128, [128, 0], 1, image=1, room=20) == 16  # labels alone
    assert fit(96, [32], 1, image=1, room=50) == 48
    assert fit(10, [3, 7], 1, image=1, room=1) == 10  # cannot be divided


def test_runs_on_own_images_get_a_micro_batch_that_fits_and_keep_it(
    pets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_memory = SCRIPT["_fit_memory"]
    images: dict[str, int] = {}

    def told(free: float, *more: str) -> tuple[int, str]:
        monkeypatch.setattr(SCRIPT["memory"], "available", lambda: int(free))
        (stage,) = planned("pets", "--method", "dho", "--student", "timm:test_resnet", *more)
        fit_memory(stage, -1)
        return stage.config().micro_batch_size, capsys.readouterr().out

    micro, line = told(1e12)
    assert micro == 0 and line.startswith("student: 128 images at a time of a batch of 128")
    images["bytes"] = round(float(line.split("takes about ")[1].split(" MB")[0]) * 1e6)
    micro, line = told(3 * 40 * images["bytes"])
    assert micro == 32 and "student: 32 images at a time" in line
    assert told(1, "micro_batch_size=64") == (64, "")
    (pets.parent / "runs/pets_dho/student").mkdir(parents=True)
    (pets.parent / "runs/pets_dho/student/config.yaml").write_text("steps: 3\nmicro_batch_size: 16\n")
    assert told(1e12) == (16, "")  # a run goes on as it began
    (pets.parent / "runs/pets_dho/student/config.yaml").write_bytes(b"\xff")
    assert told(1e12) == (0, "")  # and says itself what is wrong with its folder


def test_labels_alone_need_no_teacher(pets: Path) -> None:
    (stage,) = planned("pets", "--method", "dho", "loss.method=ce", "--epochs", "8", "batch_size=4")
    cfg = stage.config()
    assert (cfg.teacher.model, cfg.labelled_images, cfg.steps) == ("", 4, "8ep")


def test_vl2v_holds_out_the_last_domain_or_the_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(
        tmp_path / "d",
        *(f"{domain}/{name}/{n}.jpg" for domain in ("x", "y", "07") for name in "ab" for n in range(5)),
    )
    align, distill = planned("d", "--method", "vl2v_adip", "distill:swad.enabled=false")
    first, second = align.config(), distill.config()
    assert (first.method, second.method, first.runs, second.runs) == (
        "align",
        "distill",
        *["runs/d_vl2v_adip"] * 2,
    )
    assert first.fold.test_domain == second.fold.test_domain == "y"
    assert first.batch_size == 64 and first.steps == second.steps == "max(1000, 20ep)"
    assert not second.swad.enabled and second.student.backbone.startswith("timm:vit_small_patch16_224.")
    align, _ = planned("d", "--method", "vl2v_adip", "--hold-out", "07", "--epochs", "1")
    assert align.config().fold.test_domain == "07" and align.config().steps == "1ep"


# ------------------------------------------------------------------------------------------------------ whole runs


def environment() -> dict[str, str]:
    """For a script that uses this interpreter."""
    found = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"
    return found | {"VLMKD_NO_VENV": "1", "PYTHON": sys.executable, "PATH": path, "OMP_NUM_THREADS": "1"}


def distil(folder: Path, *arguments: str, zygote: Zygote | None = None) -> str:
    """Run the command in `folder`, by its shell script or as the zygote's child; its output."""
    words = [*arguments, "--teacher", "local-dir:teacher", "threads=1", "data.workers=0", "log.every_steps=1"]
    if zygote is not None:
        code, said = zygote.run(str(ROOT / "scripts/distill_folder.py"), words, folder / "output.txt")
    else:
        command = ["bash", str(ROOT / "scripts/distill_folder.sh"), *words]
        done = subprocess.run(
            command,
            env=environment(),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        code, said = done.returncode, done.stdout
    assert code == 0, said[-4000:]
    assert ("ONNX was not written" in said) == bool(missing_for_onnx())
    return said


def write_classes(folder: Path, per_class: int, unlabelled: int = 0) -> None:
    """Noise whose colour says the class."""
    rng = np.random.default_rng(0)
    places = [f"{name}/{n}.png" for name in CLASSES for n in range(per_class)]
    for place in [*places, *(f"unlabelled/{n}.png" for n in range(unlabelled))]:
        pixels = rng.normal(128, 40, (32, 36, 3))
        name = place.partition("/")[0]
        pixels[..., CLASSES.index(name) if name in CLASSES else rng.integers(3)] += 80
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / place)


def check_results(run_dir: Path, report: Path, dataset: str, class_names: list[str]) -> None:
    """Export, held-out results with their details, report and ONNX file."""
    assert load_classifier(run_dir / "export").class_names == class_names
    assert (run_dir / "export" / "model.onnx").is_file() != bool(missing_for_onnx())
    models = json.loads((run_dir / "eval" / "models.json").read_text())
    details = json.loads((run_dir / "eval" / "details.json").read_text())[models["exported"]][dataset]
    assert details["classes"] == class_names
    wrong = sum(number for label, predicted, number in details["confusion"] if label != predicted)
    page = report.read_text()
    assert f"{dataset}: true class (row) and answers" in page
    assert page.count('<figure class="card"') == min(wrong, 24)


@pytest.mark.slow
def test_promptkd_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "pets", 8, unlabelled=5)
    export_teacher(tmp_path)
    (tmp_path / "names.txt").write_text("Cat\nDog\nred fox\n")
    output = distil(
        tmp_path, "pets", "--method", "promptkd", "--classes", "names.txt", "--student", "local-dir:teacher",
        "--epochs", "2", "teacher:steps=1ep", "batch_size=4", "teacher:prompts.image_depth=1",
        "teacher:prompts.text_depth=1", "student:prompts.depth=1",
    )  # fmt: skip
    out = tmp_path / "runs/pets_promptkd"
    check_results(out / "student", out / "report.html", "pets", ["Cat", "Dog", "red fox"])
    assert "pets top-1" in output and f"report: {Path('runs/pets_promptkd/report.html')}" in output
    data = json.loads((out / "student/data.json").read_text())["streams"]["train"]
    train = sum(item["items"] for item in [data])
    assert data["labelled"] == 0 and train > 5
    evaluate = runpy.run_path(str(ROOT / "scripts/eval_zero_shot.py"))["main"]
    (tmp_path / "pets" / "unlabelled").rename(tmp_path / "unlabelled")
    model = f"classifier:{out / 'student' / 'export'}"
    assert evaluate(["--model", model, "--data", str(tmp_path / "pets"), "--device", "cpu", "--quiet"]) == 0
    assert "top-1" in capsys.readouterr().out


@pytest.mark.slow
def test_dho_from_end_to_end_and_again(tmp_path: Path, zygote: Zygote) -> None:
    write_classes(tmp_path / "pets", 8, unlabelled=5)
    export_teacher(tmp_path)
    (tmp_path / "names.txt").write_text("red_fox\ta fox\ndog\ncat\n")
    command = [
        "pets", "--method", "dho", "--classes", "names.txt", "--student", "timm:test_resnet", "student.pretrained=false",
        "student.image_size=32", "--epochs", "3", "batch_size=8", "--out", "mine",
    ]  # fmt: skip
    assert "is complete" not in distil(tmp_path, *command, zygote=zygote)
    out = tmp_path / "mine"
    check_results(out / "student", out / "report.html", "pets", ["a fox", "dog", "cat"])
    streams = json.loads((out / "student/data.json").read_text())["streams"]
    assert streams["unlabelled"]["items"] == streams["labelled"]["items"] + 5
    (out / "report.html").unlink()
    assert "run mine/student is complete" in distil(tmp_path, *command, zygote=zygote)
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_vl2v_from_end_to_end(tmp_path: Path, zygote: Zygote) -> None:
    domain_tree(tmp_path / "pets")
    export_teacher(tmp_path)
    output = distil(
        tmp_path, "pets", "--method", "vl2v_adip", "--hold-out", "oil", "--student", "timm:test_resnet",
        "student.pretrained=false", "student.image_size=32", "steps=9", "batch_size=6", zygote=zygote,
    )  # fmt: skip
    out = tmp_path / "runs/pets_vl2v_adip"
    check_results(out / "distill", out / "report.html", "oil_in", ["cat", "dog", "red fox"])
    assert "oil_in top-1" in output and "timm.create_model" in output
    assert json.loads((out / "distill/eval/models.json").read_text())["exported"] == "SWAD"


def test_kept_for_backward_by_hand() -> None:
    """Linear keeps its input, ReLU its output, the second Linear that same output; fp32."""
    images = torch.randn(3, 10)
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5), nn.Sigmoid())
    assert SCRIPT["kept_for_backward"](net, images) == 4 * 3 * (20 + 5)
    assert SCRIPT["kept_for_backward"](net.requires_grad_(False), images) == 0
