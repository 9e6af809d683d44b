"""Every command line in the documents is taken by what it starts: options by parsers, fields and overrides by configs.

Nothing is run: a shell expands the lines (braces, variables, loops) with `python` and `bash` replaced by functions that
note their arguments.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlmkd import config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "projects/*/README.md")
    for path in ROOT.glob(pattern)
    if re.search(r"^```(?:bash|sh|console)$", path.read_text(encoding="utf-8"), flags=re.M)
)
NOTE = r"""
note() { printf '%s\x1f' "$@"; printf '\x1e'; }
for name in python bash sbatch; do eval "$name() { note $name \"\$@\"; }"; done
"""


class Parsed(Exception):
    """The parser took the arguments."""


def commands(document: Path) -> list[list[str]]:
    """The words of every command in the bash blocks of a document."""
    blocks = re.findall(
        r"^```(?:bash|sh|console)\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    found = []
    for block in blocks:
        done = subprocess.run(
            ["bash", "-c", NOTE + block], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0 and not done.stderr, f"{document.name}: {done.stderr}\n{block}"
        found += [part.split("\x1f")[:-1] for part in done.stdout.split("\x1e") if part]
    return found


def check(words: list[str]) -> None:
    """Hand the arguments of one command to what reads them."""
    program, *rest = words
    if program == "python" and rest[0] == "-m":
        parse(importlib.import_module(rest[1]), rest[2:])
    elif program == "python":
        parse(module_of(ROOT / rest[0]), rest[1:])
    elif rest[0] == "scripts/distill_folder.sh":
        parse(module_of(ROOT / "scripts/distill_folder.py"), rest[1:])
    elif rest[0] == "scripts/launch.sh":
        script, arguments = ROOT / rest[1], rest[2:]
        cls = config_class(script)
        if cls is None:
            parse(module_of(script), arguments)
        elif "--help" not in arguments:
            has_run_dir = config.has_field(cls, "run_dir") and not any(
                "run_dir=" in word for word in arguments
            )
            config.load(cls, [*arguments, *(["run_dir=runs/x"] if has_run_dir else [])])
    else:  # a script of its own, whose runs are checked where it is
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"


def config_class(script: Path) -> type[Any] | None:
    """The config class that a script reads its arguments into."""
    source = script.read_text(encoding="utf-8")
    found = re.search(r"\bmain\((?:config\.)?(\w+Config),|config\.load\((\w+Config),", source)
    if found is None:
        return None
    return getattr(importlib.import_module(f"projects.{script.parent.name}.config"), found[1] or found[2])


def module_of(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"_command_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def parse(module: ModuleType, arguments: list[str]) -> None:
    """Call the module's `main` up to where its parser has taken the arguments."""

    def stopping(name: str) -> Callable[..., None]:
        whole = getattr(argparse.ArgumentParser, name)

        def stop(*given: Any, **named: Any) -> None:
            try:
                whole(*given, **named)
            except SystemExit as ended:
                assert not ended.code, f"{module.__name__} does not take {' '.join(arguments)}"
            raise Parsed

        return stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(name))
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        with pytest.raises(Parsed):
            module.main(arguments) if inspect.signature(module.main).parameters else module.main()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands(document)
    assert found
    for words in found:
        check(words)


def test_what_nothing_takes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in (
        ["python", "data_tools/make_split.py", "--set", "dtd", "--roots", "x", "--seed", "1"],
        [
            "bash",
            "scripts/launch.sh",
            "projects/dho/train_student.py",
            "projects/dho/configs/emoji/base.yaml",
            "lr=1",
        ],
        ["bash", "projects/dho/scripts/none.sh"],
    ):
        with pytest.raises((AssertionError, config.UserError)):
            check(words)
