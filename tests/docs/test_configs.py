"""Every YAML that is shipped loads with its project's config class, as its first comment's command would load it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from braceexpand import braceexpand
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tests.docs.commands import ROOT, config_class
from vlmkd import config
from vlmkd.errors import UserError

CONFIGS = sorted((ROOT / "projects").glob("*/configs/**/*.yaml"))


def commands_of(path: Path) -> list[list[str]]:
    """Arguments of every `bash scripts/launch.sh ...` in the comments before the first field."""
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# "))
    text = "\n".join(comments).replace("\\\n", " ")
    commands = re.findall(r"^bash scripts/launch\.sh (.*)$", text, flags=re.M)
    return [[word for part in shlex.split(command) for word in braceexpand(part)] for command in commands]


RUNS = [path for path in CONFIGS if any(str(path.relative_to(ROOT)) in words for words in commands_of(path))]
PARTS = [path for path in CONFIGS if path not in RUNS]


def name_of(path: Path) -> str:
    """Test id of a config."""
    return str(path.relative_to(ROOT / "projects"))


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_run_loads_as_its_command_says_and_loads_back_equal(path: Path, tmp_path: Path) -> None:
    for script, *arguments in commands_of(path):
        if str(path.relative_to(ROOT)) not in arguments:
            continue
        cls = config_class(ROOT / script)
        stack = [
            str(ROOT / word) if word.endswith(".yaml") else word for word in arguments if "..." not in word
        ]
        cfg = config.load(cls, [*stack, f"run_dir={tmp_path / 'run'}"])
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(config.to_yaml(cfg))
        assert config.load(cls, [str(resolved)]) == cfg


@pytest.mark.parametrize("path", PARTS, ids=name_of)
def test_a_part_of_runs_has_known_fields_of_the_right_types(path: Path) -> None:
    """A file that only stands in a stack, or gets values from a shell script, is not complete by itself."""
    project = ROOT / "projects" / path.relative_to(ROOT / "projects").parts[0]
    refusals = []
    for script in sorted(project.glob("train_*.py")):
        try:
            OmegaConf.merge(OmegaConf.structured(config_class(script)), OmegaConf.load(path))
        except OmegaConfBaseException as error:
            refusals.append(f"{script.name}: {error}")
    assert len(refusals) < len(list(project.glob("train_*.py"))), "\n".join(refusals)


@pytest.mark.parametrize(
    "script",
    sorted((ROOT / "projects").glob("*/train_*.py")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
@pytest.mark.parametrize("name", ["zero_shot", "retrieval"])
def test_labelled_runs_refuse_the_sets_of_image_text_runs(script: Path, name: str) -> None:
    cls = config_class(script)
    reads = cls.__module__ == "projects.tinyclip.config"
    assert (name in config.plain(cls).get("evaluation", {})) == reads
    if not reads:
        with pytest.raises(UserError, match="unknown config field evaluation.*; .*fields here"):
            config.load(cls, ["run_dir=r", f"evaluation.{name}=[{{data: x}}]"])


def test_runs_name_files_that_exist() -> None:
    for path in CONFIGS:
        for arguments in commands_of(path):
            for word in arguments:
                if word.startswith("projects/"):
                    assert (ROOT / word).is_file(), f"{path.relative_to(ROOT)}: {word} does not exist"
