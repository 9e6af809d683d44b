"""Who may import whom, and that the core imports without optional packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = (
    "deepspeed",
    "mamba_ssm",
    "causal_conv1d",
    "flash_attn",
    "spconv",
    "pyarrow",
    "wandb",
    "trackio",
    "lmms_eval",
)

# Imports every module whose name is given, with the optional packages made impossible to import.
BLOCKED = """
import importlib, sys
from importlib.abc import MetaPathFinder

blocked = set(sys.argv[1].split(","))

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Block())
for name in sys.argv[2:]:
    importlib.import_module(name)
print("imported", len(sys.argv) - 2)
"""


def modules(package: str) -> list[str]:
    """Dotted names of all modules of `package`."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]


def imported_names(path: Path) -> set[str]:
    """Dotted names that the file imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_the_core_imports_without_optional_packages() -> None:
    names = modules("vlmkd")
    assert "vlmkd" in names and "vlmkd.train.task" in names
    command = [sys.executable, "-c", BLOCKED, ",".join(OPTIONAL), *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["imported", str(len(names))]


def test_import_vlmkd_is_light() -> None:
    command = [sys.executable, "-c", "import sys, vlmkd; print('torch' in sys.modules)"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == [
        "False"
    ]


def test_import_contracts() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "vlmkd/losses").glob("*.py")), ids=lambda path: path.name)
def test_losses_import_torch_and_einops_only(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "einops"}
    for name in imported_names(path):
        assert name.startswith("vlmkd.losses.") or name.partition(".")[0] in allowed, (
            f"{path.name} imports {name}"
        )
        assert not name.startswith("torch.distributed"), f"{path.name} imports {name}"


def test_what_is_imported_is_required() -> None:
    """Every outside package that the code imports by statement stands in requirements.txt itself."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[<>=;\s]", line)[0].lower() for line in lines if line and not line.startswith("#")}
    other_names = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "open_clip": "open_clip_torch",
        "skimage": "scikit-image",
    }
    known = set(sys.stdlib_module_names) | {"vlmkd", "projects", "data_tools", "scripts"}
    for package in ("vlmkd", "projects", "data_tools", "scripts"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for top in {name.partition(".")[0] for name in imported_names(path)} - known:
                distribution = other_names.get(top, top).lower()
                found = {distribution, distribution.replace("_", "-")} & required
                assert found, f"{path.relative_to(ROOT)} imports {top}, which requirements.txt does not name"


@pytest.mark.parametrize("package", ["vlmkd", "projects"])
def test_nothing_is_evaluated_unpickled_or_trusted(package: str) -> None:
    """No eval, exec or trust_remote_code, and torch.load only with weights_only=True."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{where}: {called}"
            assert "trust_remote_code" not in keywords, where
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", (
                    f"{where}: torch.load without weights_only=True"
                )
