"""The launch script's commands load for every stage, student and data set, and hold the published values."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from projects.vl2v_adip.config import CONTINUES, FROZEN_BACKBONE, WITHOUT_TEACHER, AlignConfig, DistillConfig
from vlmkd import config
from vlmkd.datasets.published_sets import SETS

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "projects" / "vl2v_adip"
STAGES = sorted(path.stem for path in (PROJECT / "configs" / "stages").glob("*.yaml"))
STUDENTS = sorted(path.stem for path in (PROJECT / "configs" / "students").glob("*.yaml"))


def script(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """scripts/run.sh without starting anything."""
    return subprocess.run(
        ["bash", str(PROJECT / "scripts" / "run.sh"), *arguments],
        env={**os.environ, "DRY_RUN": "1", "RUNS": "/out", **extra},
        capture_output=True,
        text=True,
    )


def loaded(*arguments: str) -> Any:
    """The config of the command that the script prints."""
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    words = words[words.index("-m") + 1 :]
    cls = {"train_align": AlignConfig, "train_distill": DistillConfig}[words[0].rpartition(".")[2]]
    return config.load(cls, [word if "=" in word else str(ROOT / word) for word in words[1:]])


@pytest.mark.parametrize("dataset", sorted(key for key, found in SETS.items() if found.domains))
def test_data_sets_hold_the_published_recipe(dataset: str) -> None:
    domain = SETS[dataset].domains[-1]
    cfg = loaded("distill", "vit_b16", dataset, domain, "data.root=/data", "fold.trial_seed=2")
    assert cfg.run_dir == f"/out/{dataset}/vit_b16/{domain.replace(' ', '_')}_t2/distill"
    assert (cfg.fold.test_domain, cfg.fold.trial_seed, cfg.data.set, cfg.runs) == (domain, 2, dataset, "/out")
    sources = len(SETS[dataset].domains) - 1
    assert cfg.batch_size == 32 * sources
    assert (cfg.steps, cfg.evaluation.every_steps) == (
        (15001, 1000) if dataset == "domain_net" else (5001, 200)
    )
    assert cfg.evaluation.phase == 1 and (cfg.steps - 1) % cfg.evaluation.every_steps == 0
    optim = cfg.optim
    assert (optim.name, optim.lr, optim.weight_decay, optim.schedule, optim.warmup_steps, optim.clip_grad_norm) == (
        "adam", 5e-5, 0.0, "constant", 0, 0.0,
    )  # fmt: skip
    data = cfg.data
    assert (data.crop_scale, data.flip, data.color_jitter, data.hue, data.grayscale, data.interpolation) == (
        [0.7, 1.0], 0.5, 0.3, 0.3, 0.1, "bilinear",
    )  # fmt: skip
    swad = cfg.swad
    assert (swad.enabled, swad.n_converge, swad.n_tolerance, swad.tolerance_ratio) == (True, 3, 6, 0.3)
    assert (cfg.loss.image_weight, cfg.seed, cfg.deepspeed.precision) == (0.5, 0, "fp32")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_loads_on_a_real_and_on_the_embedded_set(stage: str) -> None:
    student = "clip_vitb16" if stage == "vl2v_sd" else "resnet50"
    for arguments in ((stage, student, "pacs", "sketch"), (stage, "emoji_lite0", "emoji", "noto")):
        if stage == "vl2v_sd" and arguments[1] == "emoji_lite0":
            continue
        cfg = loaded(*arguments)
        assert cfg.method == stage
        assert bool(cfg.teacher.model) == (stage not in WITHOUT_TEACHER)
        assert isinstance(cfg, AlignConfig if stage in FROZEN_BACKBONE else DistillConfig)
        assert cfg.swad.enabled == (stage not in FROZEN_BACKBONE)


def test_released_oddities_are_set_where_the_scripts_have_them() -> None:
    def odd(stage: str, student: str) -> tuple[str, int]:
        cfg = loaded(stage, student, "office_home", "Real World")
        return cfg.swad.segment_reset, cfg.select_from_step

    assert odd("distill", "vit_b16") == ("every_eval", 100)
    assert odd("align", "vit_b16") == ("vl2v_default", 1000)
    assert odd("distill", "resnet50") == ("vl2v_default", 1000)
    assert odd("distill", "deit_s") == ("vl2v_default", 100)


@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_is_a_known_backbone_pinned_to_its_weights(student: str) -> None:
    from vlmkd.models.backbones import load_backbone

    cfg = loaded("distill", student, "pacs", "photo")
    backbone = load_backbone(cfg.student.backbone, False, image_size=cfg.student.image_size or None)
    widths = {
        "vit_b16": 768,
        "vit_s16": 384,
        "deit_s": 384,
        "resnet50": 2048,
        "clip_vitb16": 512,
        "emoji_lite0": 1280,
    }
    assert backbone.dim == widths[student]
    norms = {"vit_b16": 0.5, "vit_s16": 0.5, "deit_s": 0.485, "resnet50": 0.485, "clip_vitb16": 0.48145466}
    assert student not in norms or backbone.image_spec.mean[0] == pytest.approx(norms[student])


def test_mistakes_of_the_launch_command_are_named() -> None:
    done = script("nonsense", "resnet50", "pacs", "photo")
    assert done.returncode == 2 and "there are: align distill" in done.stderr
    assert script("align", "resnet50").returncode == 2
    assert "emoji domain_net" in script("align", "resnet50", "imagenet", "x").stderr


def test_all_goes_through_every_domain(tmp_path: Path) -> None:
    for domain in SETS["vlcs"].domains:
        for name in SETS["vlcs"].classes:
            (tmp_path / "VLCS" / domain / name).mkdir(parents=True)
            (tmp_path / "VLCS" / domain / name / "1.jpg").touch()
    done = script(
        "align", "resnet50", "vlcs", f"data.root={tmp_path}", VLMKD_NO_VENV="1", PATH=path_with_this_python()
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    held_out = [
        word.partition("=")[2] for line in lines for word in shlex.split(line) if "test_domain=" in word
    ]
    assert held_out == list(SETS["vlcs"].domains)


def path_with_this_python() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_stages_that_continue_name_stages_that_exist() -> None:
    assert set(CONTINUES) | set(CONTINUES.values()) <= set(STAGES)
