"""Every YAML that is shipped loads with its project's config class, and says how to run it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from vlmkd import config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "projects").glob("*/configs/*.yaml"))


def config_class(project: str, stage: str) -> type[Any]:
    """The config class that `projects/PROJECT/STAGE.py` gives to `vlmkd.run.main`."""
    path = ROOT / "projects" / project / f"{stage}.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "main" and node.args:
            module = importlib.import_module(f"projects.{project}.config")
            return getattr(module, ast.unparse(node.args[0]).rpartition(".")[2])
    raise AssertionError(f"{path} calls no main(ConfigClass, build)")


def header(path: Path) -> str:
    """The comment lines before the first field, without their `#`."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return "\n".join(lines)


def stage_of(path: Path) -> str:
    """The train script that the config's first comment runs."""
    project = path.parent.parent.name
    words = header(path).replace("\\\n", " ").split()
    named = [word for word in words if word.startswith(f"projects/{project}/train_") and word.endswith(".py")]
    assert named, f"{path.relative_to(ROOT)}: the first comment must hold the command that runs it"
    return Path(named[0]).stem


def stack_of(path: Path) -> list[str]:
    """The YAML files that the header's command stacks, ending with this one."""
    words = header(path).replace("\\\n", " ").split()
    named = [word for word in words if word.endswith(".yaml") and (ROOT / word).is_file()]
    own = str(path.relative_to(ROOT))
    return [str(ROOT / word) for word in named[: named.index(own) + 1]] if own in named else [str(path)]


@pytest.mark.skipif(not CONFIGS, reason="no config is shipped yet")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_config_loads(path: Path, tmp_path: Path) -> None:
    cls = config_class(path.parent.parent.name, stage_of(path))
    cfg = config.load(cls, [*stack_of(path), f"run_dir={tmp_path / 'run'}"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml(cfg))
    assert config.load(cls, [str(resolved)]) == cfg
