"""Every command line in the documents is taken by what it starts: options by parsers, fields and overrides by configs.

Nothing is run: a shell expands the lines (braces, variables, loops) with `python` and `bash` replaced by functions that
note their arguments.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.commands import ROOT, config_class, module_of, options_of
from vlmkd import config

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


def commands(document: Path) -> list[list[str]]:
    """The words of every command in the bash blocks of a document."""
    blocks = re.findall(
        r"^```(?:bash|sh|console)\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    found = []
    for block in blocks:
        done = subprocess.run(
            ["bash", "-c", NOTE + block], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0 and not done.stderr, f"{document.name}: {done.stderr}\n{block}"
        found += [part.split("\x1f")[:-1] for part in done.stdout.split("\x1e") if part]
    return found


def check(words: list[str]) -> None:
    """Hand the arguments of one command to what reads them."""
    program, *rest = words
    if program == "python" and rest[0] == "-m":
        options_of(importlib.import_module(rest[1]), rest[2:])
    elif program == "python":
        options_of(module_of(ROOT / rest[0]), rest[1:])
    elif rest[0] == "scripts/distill_folder.sh":
        options_of(module_of(ROOT / "scripts/distill_folder.py"), rest[1:])
    elif rest[0] == "scripts/launch.sh":
        script, arguments = ROOT / rest[1], rest[2:]
        cls = config_class(script)
        if cls is None:
            options_of(module_of(script), arguments)
        elif "--help" not in arguments:
            has_run_dir = hasattr(cls, "run_dir") and not any("run_dir=" in word for word in arguments)
            config.load(cls, [*arguments, *(["run_dir=runs/x"] if has_run_dir else [])])
    else:  # a script of its own, whose runs are checked where it is
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"


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
