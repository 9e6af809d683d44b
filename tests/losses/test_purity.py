"""Losses are functions of tensors: no collectives, no other vlmkd module, no module with parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmkd.losses

FILES = sorted(Path(vlmkd.losses.__file__).parent.rglob("*.py"))


def violations(source: str) -> Iterator[str]:
    """Every import or attribute in `source` that a loss may not use."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [module] + [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Name):
            names = [node.id]
        for name in names:
            outside = name.startswith("vlmkd") and not name.startswith("vlmkd.losses")
            outside = outside and name != "vlmkd"
            if outside or name.startswith(
                (".", "torch.distributed", "torch.nn.Parameter", "nn.Parameter", "nn.Module")
            ):
                yield name
            if name in ("Parameter", "torch.nn.parameter", "torch.nn.Module"):
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_losses_are_pure(path: Path) -> None:
    assert list(violations(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "def f():\n    import torch\n    torch.distributed.barrier()",
        "from vlmkd.distributed import gather",
        "from vlmkd import errors",
        "import vlmkd.config",
        "from ..distributed import gather",
        "from torch import nn\nclass L(nn.Module): pass",
        "import torch\nx = torch.nn.Parameter(torch.zeros(1))",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert list(violations(source))


def test_files_were_found() -> None:
    assert {"affinity.py", "contrastive.py", "logits.py"} <= {path.name for path in FILES}
