"""What prints and leaves (help, dry run, a wrong field, a finished run) does not load the libraries of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.test_configs import CONFIGS, commands_of

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "projects").glob("*/train_*.py"))
HEAVY = ("open_clip", "timm", "torchvision", "transformers", "deepspeed", "webdataset")
CHILD = """
import json, runpy, sys
for argv in json.load(sys.stdin):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        print("exit", end.code)
    print("LOADED", *[name for name in %r if name in sys.modules])
"""


def command_of(script: Path) -> list[str]:
    """The script with the configs that one of their headers gives to it, or that scripts/run.sh does."""
    if script.parent.name == "vl2v_adip":
        parts = ("base", "emoji/base", f"stages/{script.stem.removeprefix('train_')}")
        files = [str(script.parent / "configs" / f"{part}.yaml") for part in parts]
        return [str(script), *files, "fold.test_domain=apple", "student.backbone=torchvision:resnet50"]
    for path in CONFIGS:
        for name, *words in commands_of(path):
            if ROOT / name == script:
                return [str(script), *(str(ROOT / word) for word in words if word.endswith(".yaml"))]
    raise AssertionError(f"no config says how to run {script}")


@pytest.mark.parametrize("project", sorted({script.parent.name for script in SCRIPTS}))
def test_nothing_heavy_is_imported_before_a_run_starts(project: str, tmp_path: Path) -> None:
    asked = []
    for script in (script for script in SCRIPTS if script.parent.name == project):
        command = [*command_of(script), f"run_dir={tmp_path / script.stem}"]
        asked += [[str(script), "--help"], [*command, "--dry-run"], [*command, "no_such_field=1"]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD % (HEAVY,)], input=json.dumps(asked), capture_output=True, text=True,
        env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert loaded == ["LOADED"] * len(asked), loaded
    assert done.stdout.count("exit 2") == done.stderr.count("unknown config field") == len(asked) // 3


def test_a_finished_run_is_left_alone_without_them(tmp_path: Path) -> None:
    script = ROOT / "projects" / "tinyclip" / "train_distill.py"
    command = [*command_of(script), f"run_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, *command, "--dry-run"], capture_output=True, text=True, env=environment, check=True
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(shown.stdout)))
    (tmp_path / "done.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", CHILD % (HEAVY,)], input=json.dumps([command]), capture_output=True, text=True,
        env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert "is complete" in done.stdout and done.stdout.splitlines()[-1] == "LOADED", (
        done.stdout + done.stderr
    )
