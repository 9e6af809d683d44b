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
import json, os, runpy, sys
import torch  # which they all load, and each part is a child of this process
for output, commands in json.load(sys.stdin):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, output
        continue
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for argv in commands:
        sys.argv = argv
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            print("exit", end.code)
        print("LOADED", *[name for name in %r if name in sys.modules])
    sys.stdout.flush()
    os._exit(0)
"""


def run_parts(parts: dict[Path, list[list[str]]]) -> None:
    """The commands of each part one after the other in a process of its own, which writes a file."""
    asked = json.dumps([(str(output), commands) for output, commands in parts.items()])
    done = subprocess.run(
        [sys.executable, "-c", CHILD % (HEAVY,)], input=asked, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """What the scripts of each project said to help, a dry run and a wrong field, and how many commands that were."""
    folder = tmp_path_factory.mktemp("startup")
    asked: dict[Path, list[list[str]]] = {}
    for script in SCRIPTS:
        command = [*command_of(script), f"run_dir={folder / script.stem}"]
        asked.setdefault(folder / script.parent.name, []).extend(
            [[str(script), "--help"], [*command, "--dry-run"], [*command, "no_such_field=1"]]
        )
    run_parts(asked)
    return {output.name: (output.read_text(), len(commands)) for output, commands in asked.items()}


@pytest.mark.parametrize("project", sorted({script.parent.name for script in SCRIPTS}))
def test_nothing_heavy_is_imported_before_a_run_starts(
    project: str, said: dict[str, tuple[str, int]]
) -> None:
    text, asked = said[project]
    loaded = [line for line in text.splitlines() if line.startswith("LOADED")]
    assert loaded == ["LOADED"] * asked, loaded
    assert text.count("exit 2") == text.count("unknown config field") == asked // 3


def test_a_finished_run_is_left_alone_without_them(tmp_path: Path) -> None:
    script = ROOT / "projects" / "tinyclip" / "train_distill.py"
    command = [*command_of(script), f"run_dir={tmp_path / 'run'}"]
    run_parts({tmp_path / "shown": [[*command, "--dry-run"]]})
    (tmp_path / "run").mkdir()
    shown = yaml.safe_load((tmp_path / "shown").read_text().rpartition("LOADED")[0])
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(shown))
    (tmp_path / "run" / "done.json").write_text("{}")
    run_parts({tmp_path / "said": [command]})
    text = (tmp_path / "said").read_text()
    assert "is complete" in text and text.splitlines()[-1] == "LOADED", text
