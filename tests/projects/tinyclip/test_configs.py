"""TinyCLIP's shipped recipes: every YAML and every command of the scripts loads, and holds the published values."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from braceexpand import braceexpand

from projects.tinyclip.config import DistillConfig, MaskConfig
from vlmkd import config
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "projects" / "tinyclip"
CONFIGS, SCRIPTS = PROJECT / "configs", PROJECT / "scripts"
RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
ADDED = sorted(path.stem for path in CONFIGS.glob("add/*.yaml"))
CLASSES = {"projects.tinyclip.train_distill": DistillConfig, "projects.tinyclip.train_mask": MaskConfig}
RECIPES = {  # script -> the runs that it starts, in order
    "vit_b32_manual": ["vit_b32_manual_75", "vit_b32_manual_50"],
    "rn50_manual": ["rn50_manual_75", "rn50_manual_50"],
    "vit_b16_yfcc": ["vit_b16_yfcc_39m", "vit_b16_yfcc_8m"],
    "vit_b32_auto": [
        f"vit_b32_auto_{stage}_{part}" for stage in (75, 50, 25) for part in ("mask", "distill")
    ],
}
PER_EPOCH = 400_000_000 // 8192


def command_of(path: Path) -> list[str]:
    """The arguments of the training command in the comment that opens `path`, without the script itself."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = "\n".join(line.lstrip("# ") for line in comment).replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if line.startswith("bash scripts/launch.sh")]
    return shlex.split(command)[2:]


@cache
def loaded(*words: str) -> Any:
    """The config of a command `projects/tinyclip/train_X.py YAML ... field=value ...`, its lengths in steps."""
    module = words[0].removesuffix(".py").replace("/", ".")
    cfg = config.load(CLASSES[module], [word if "=" in word else str(ROOT / word) for word in words[1:]])
    return in_steps(cfg, cfg.data.samples_per_epoch // cfg.batch_size)


def published(name: str) -> Any:
    """The config of a run, stacked as its first comment says."""
    return loaded(*command_of(CONFIGS / f"{name}.yaml"))


def overlay(name: str) -> Any:
    """The config of the run with an overlay that the overlay's first comment names."""
    return loaded(*command_of(CONFIGS / "add" / f"{name}.yaml"))


def dry_run(script: str, *args: str, **extra: str) -> list[list[str]]:
    """The distinct training commands that a script prints, as `command_of` gives them."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER"))}
    for name in ("NPROC", "NNODES", "NODE_RANK", "HOSTFILE", "LAUNCH", "CACHE", "YFCC", "SIZES"):
        env.pop(name, None)
    env |= {
        "DRY_RUN": "1",
        "DATA": "/data/{00000..00099}.tar",
        "IMAGENET": "/images/in 1k",
        "RUNS": "/out",
        **extra,
    }
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found: list[list[str]] = []
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        if "-m" in words and ".train_" in words[words.index("-m") + 1]:
            words = words[words.index("-m") + 1 :]
            words[0] = words[0].replace(".", "/") + ".py"
            if words not in found:
                found.append(words)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_runs_hold_the_common_recipe(name: str) -> None:
    cfg = published(name)
    assert isinstance(cfg, MaskConfig if name.endswith("_mask") else DistillConfig)
    assert cfg.run_dir == f"runs/{name}" and cfg.seed == 0
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.clip_grad_norm) == (1e-4, 0.2, 5.0)
    vit = "vit" in name
    assert (cfg.optim.betas, cfg.optim.eps) == (([0.9, 0.98], 1e-6) if vit else ([0.9, 0.999], 1e-8))
    assert cfg.optim.schedule == "cosine" and cfg.data.crop_scale == [0.9, 1.0]
    assert (cfg.data.flip, cfg.data.color_jitter) == (0.0, 0.0)
    assert (cfg.logit_scale.mode, cfg.logit_scale.value) == ("fixed", 50.0)
    assert (cfg.loss.affinity, cfg.loss.contrastive, cfg.loss.affinity_reduction) == (1.0, 0.0, "half")
    assert [(teacher.model, teacher.pretrained) for teacher in cfg.teachers] == [("ViT-B-32", "laion2b_e16")]
    assert (cfg.deepspeed.zero_stage, cfg.deepspeed.precision) == (
        1,
        "bf16",
    ) and cfg.deepspeed.activation_checkpointing
    assert [(item.class_names, item.templates) for item in cfg.evaluation.zero_shot] == [
        ("imagenet", "openai")
    ]
    if "yfcc" not in name:
        assert cfg.batch_size == 8192 and batch_triple(cfg, 8) == (1024, 1)


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith(("manual_75", "manual_50"))])
def test_manual_runs_last_six_epochs(name: str) -> None:
    cfg = published(name)
    assert (cfg.steps, cfg.optim.warmup_steps) == (6 * PER_EPOCH, 2000)
    assert cfg.inherit.layers == "interval_front" and cfg.inherit.width == "front"


@pytest.mark.parametrize("name", ["vit_b16_yfcc_39m", "vit_b16_yfcc_8m"])
def test_yfcc_runs_last_25_epochs(name: str) -> None:
    cfg = published(name)
    assert (cfg.batch_size, cfg.optim.warmup_steps) == (4096, 2000)
    assert cfg.steps == 25 * (15_000_000 // 4096)


@pytest.mark.parametrize(
    ("stage", "prune", "start", "target"),
    [(75, 3000, 0.0, 0.25), (50, 5000, 0.25, 0.5), (25, 8000, 0.5, 0.75)],
)
def test_automatic_stages(stage: int, prune: int, start: float, target: float) -> None:
    mask, distill = published(f"vit_b32_auto_{stage}_mask"), published(f"vit_b32_auto_{stage}_distill")
    assert (mask.steps, mask.optim.warmup_steps) == (prune, prune)
    assert (distill.steps, distill.optim.warmup_steps) == (6 * PER_EPOCH - prune, 0)
    masks = mask.masks
    assert (masks.start_sparsity, masks.target_sparsity, masks.sparsity_warmup_steps) == (start, target, 1000)
    assert (masks.lr, masks.multiplier_lr, masks.sides, masks.joint) == (0.02, 0.02, "one", True)
    assert masks.freeze_pruned == (stage != 75) and not masks.legacy_projection_scale
    assert distill.student.model == f"local-dir:{mask.run_dir}/export"
    assert distill.inherit.image_from.model == "" and distill.inherit.text_from.model == ""


def test_stages_start_from_the_one_before() -> None:
    assert published("vit_b32_auto_75_mask").student.pretrained == "laion2b_e16"
    for before, stage in ((75, 50), (50, 25)):
        previous = published(f"vit_b32_auto_{before}_distill")
        assert published(f"vit_b32_auto_{stage}_mask").student.model == f"local-dir:{previous.run_dir}/export"
    for kind in ("vit_b32", "rn50"):
        source = f"local-dir:runs/{kind}_manual_75/export"
        inherit = published(f"{kind}_manual_50").inherit
        assert (inherit.image_from.model, inherit.text_from.model) == (source, source)


@pytest.mark.parametrize(("name", "source"), [("rn50_manual_75", "RN50"), ("vit_b16_yfcc_39m", "ViT-B-16")])
def test_openai_sources_change_their_activation(name: str, source: str) -> None:
    inherit = published(name).inherit
    assert inherit.allow_activation_change
    for tower in (inherit.image_from, inherit.text_from):
        assert (tower.model, tower.pretrained) == (source, "openai")


@pytest.mark.parametrize("name", RUNS)
def test_local_models_exist_and_headers_tell_origin(name: str) -> None:
    cfg = published(name)
    if cfg.student.model.endswith(".json"):
        assert (ROOT / cfg.student.model).is_file()
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert (
        "not run" in text and "Result:" in text and re.search(r"\[(code|paper|maintainer|third|ours)\]", text)
    )


@pytest.mark.parametrize("name", ADDED)
def test_overlays_load(name: str) -> None:
    plain = published("vit_b16_yfcc_39m")
    cfg = overlay(name)
    assert cfg != plain and cfg.optim == plain.optim and cfg.student == plain.student


def test_overlays_set_what_they_say() -> None:
    loss = overlay("clipkd").loss
    assert (loss.affinity, loss.contrastive, loss.feature, loss.interactive) == (1.0, 1.0, 2000.0, 1.0)
    assert overlay("teacher_cache").cached and len(overlay("two_teachers").teachers) == 2
    assert overlay("ema").ema_decay == 0.9998


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_print_commands_that_load(recipe: str) -> None:
    """Paths with braces and spaces arrive whole; each stage reads the export of the one before."""
    commands = dry_run(f"{recipe}.sh", "seed=3", LAUNCH="bash scripts/launch.sh")
    configs = [loaded(*words) for words in commands]
    assert [cfg.run_dir for cfg in configs] == [f"/out/{name}" for name in RECIPES[recipe]]
    for cfg, name in zip(configs, RECIPES[recipe], strict=True):
        assert isinstance(cfg, type(published(name)))
        assert (cfg.steps, cfg.optim) == (published(name).steps, published(name).optim)
        assert cfg.seed == 3 and cfg.evaluation.zero_shot[0].data == "/images/in 1k"
        assert cfg.data.sources[0].shards == ["/data/{00000..00099}.tar"]
    exports = [re.findall(r"local-dir:(\S+)/export", " ".join(words)) for words in commands]
    for index, used in enumerate(exports[1:], 1):
        assert recipe == "vit_b16_yfcc" or set(used) == {configs[index - 1].run_dir}


def test_mask_overrides_reach_mask_runs_only_and_yfcc_is_mixed_in() -> None:
    commands = dry_run("vit_b32_auto.sh", "masks.round_to=8", "steps=9", NPROC="1", YFCC="/yfcc/*.tar")
    assert ["masks.round_to=8" in words for words in commands] == [True, False] * 3
    assert all("steps=9" in words for words in commands)
    for cfg in (loaded(*commands[0]), loaded(*commands[1])):
        assert cfg.steps == 9
        assert [source.shards for source in cfg.data.sources] == [
            ["/data/{00000..00099}.tar"],
            ["/yfcc/*.tar"],
        ]
        assert [source.weight for source in cfg.data.sources] == [400.0, 15.0]


def test_one_gpu_accumulates_to_the_published_batch() -> None:
    for words in dry_run("one_gpu.sh", "vit_b16_yfcc", "optim.lr=2e-4", MICRO="512", CACHE="/cache"):
        cfg = loaded(*words)
        assert batch_triple(cfg, 1) == (512, 8) and cfg.optim.lr == 2e-4
        assert cfg.data.sources[0].teacher_caches == ["/cache"]


def test_several_machines_and_slurm_print_the_same_runs() -> None:
    machines = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "NPROC": "2"}
    by_hand = dry_run("multi_node.sh", "vit_b32_manual", "steps=5", **machines)
    assert (
        by_hand
        == dry_run("slurm.sbatch", "vit_b32_manual", "steps=5")
        == dry_run("vit_b32_manual.sh", "steps=5", NPROC="1")
    )


@pytest.mark.parametrize(
    ("script", "args", "missing"),
    [
        *[(f"{recipe}.sh", [], name) for recipe in RECIPES for name in ("DATA", "IMAGENET", "NPROC")],
        ("one_gpu.sh", ["vit_b99"], "recipe"),
        ("multi_node.sh", ["vit_b32_manual"], "NNODES"),
        ("slurm.sbatch", ["vit_b32_manual"], "RUNS"),
    ],
)
def test_missing_settings_are_named(script: str, args: list[str], missing: str) -> None:
    given = {"DATA": "a.tar", "IMAGENET": "b", "NPROC": "1", "PATH": os.environ["PATH"], "DRY_RUN": "1"}
    given.pop(missing, None)
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *args],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"{script}: ")
        and missing in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_readme_commands_load() -> None:
    """Training commands of the README, brace ranges written out as bash does."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [
        line.partition("scripts/launch.sh ")[2] for line in lines if "scripts/launch.sh projects/" in line
    ]
    assert len(commands) >= 5
    for command in commands:
        words = [
            name
            for word in shlex.split(command, comments=True)
            for name in ([word] if "=" in word else braceexpand(word))
        ]
        if "--help" not in words:
            loaded(*words)
