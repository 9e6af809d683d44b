"""Every requirement is used: imported, named where its files are looked up, or kept for a reason that its line gives."""

from __future__ import annotations

import ast
import re
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_requirement_is_imported_or_says_why_not() -> None:
    """A comment `# NAME: reason` stands above what only others import."""
    imported, named = set(), set()
    for folder in ("vlmkd", "projects", "data_tools", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").partition(".")[0])
                elif (
                    isinstance(node, ast.Constant) and "emoji" in path.parts
                ):  # packages of drawings, read as files
                    named.add(str(node.value))
    provided = packages_distributions()
    used = {_plain(name) for module in imported for name in provided.get(module, [])}
    used |= {_plain(text) for text in named}
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    reasons = {_plain(name) for name in re.findall(r"^# ([\w-]+): ", text, flags=re.M)}
    required = {_plain(name) for name in re.findall(r"^([\w-]+)", text, flags=re.M)}
    assert {"torch", "httpx", "setuptools"} <= required
    assert required - used <= reasons <= required


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
