"""How tests take a command as far as its config or its options, in this process; and what launch scripts print."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from vlmkd import config
from vlmkd.datasets import labelled_sets
from vlmkd.errors import UserError
from vlmkd.models.backbones import load_backbone
from vlmkd.train.lookup import check_names

ROOT = Path(__file__).parents[2]
_DROPPED = (
    "SLURM_",
    "NPROC",
    "NNODES",
    "NODE_RANK",
    "MASTER_",
    "HOSTFILE",
    "LAUNCH",
    "RUNS",
    "SEEDS",
    "SHOTS",
)


def printed(script: str, *args: str, **env: str) -> list[tuple[str, ...]]:
    """The distinct commands that a launch script prints with DRY_RUN=1: module and arguments."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED)}
    done = subprocess.run(
        ["bash", str(ROOT / "projects" / script), *args],
        cwd=ROOT, env={**kept, "DRY_RUN": "1", **env}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, f"{script} {args} {env}: {done.stderr}"
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    commands = [tuple(words[words.index("-m") + 1 :]) for words in lines]
    assert commands, f"{script} prints no command"
    return list(dict.fromkeys(commands))


@cache
def config_class(script: Path) -> type[Any] | None:
    """The config class that a script of a project reads its arguments into; None: it reads options instead."""
    source = script.read_text(encoding="utf-8")
    if "ArgumentParser" in source:
        return None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            called, first = ast.unparse(node.func), ast.unparse(node.args[0])
            if called.rpartition(".")[2] in ("main", "load") and first.rpartition(".")[2].endswith("Config"):
                module = importlib.import_module(f"projects.{script.parent.name}.config")
                return getattr(module, first.rpartition(".")[2])
    return None


@cache
def module_of(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"_command_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Parsed(Exception):
    """Carries the options out of a tool's main."""


def options_of(module: ModuleType, words: list[str]) -> dict[str, Any]:
    """What a tool's own parser makes of the words; the tool goes no further. An AssertionError: it takes them not."""

    def stopping(name: str) -> Any:
        whole = getattr(argparse.ArgumentParser, name)

        def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            try:
                parsed = vars(whole(self, args, namespace))
            except SystemExit as ended:
                assert not ended.code, f"{module.__name__} does not take {shlex.join(words)}"
                parsed = {}  # --help
            raise _Parsed(parsed)

        return mock.patch.object(argparse.ArgumentParser, name, stop)

    given = [words] if inspect.signature(module.main).parameters else []
    with (
        stopping("parse_args"),
        stopping("parse_intermixed_args"),
        mock.patch.object(sys, "argv", [module.__name__, *words]),
    ):
        try:
            module.main(*given)
        except _Parsed as parsed:
            (options,) = parsed.args
            return dict(options)
    raise AssertionError(f"{module.__name__} parses no options")


def looked_up(module: str, *words: str) -> Any:
    """The config of a launch script's command, or the options of a tool's, with every name in it looked up."""
    script = ROOT / (module.replace(".", "/") + ".py")
    cls = config_class(script)
    if cls is None:
        options = options_of(importlib.import_module(module), list(words))
        for name in [*_listed(options.get("set")), *_listed(options.get("data"))]:
            labelled_sets.require_known(name)
        check_names({key: value for key, value in options.items() if key not in ("set", "data") and value})
        return options
    cfg = config.load(cls, [word if "=" in word else str(ROOT / word) for word in words])
    check_names(asdict(cfg))
    _check_architectures(asdict(cfg))
    return cfg


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _check_architectures(node: Any) -> None:
    """Open_clip, timm and torchvision know the names of models and the tags of weights."""
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            _check_architectures(child)
    if isinstance(node, dict) and node.get("model") and "pretrained" in node:
        _check_clip(node["model"], node["pretrained"])
    if isinstance(node, dict) and node.get("backbone"):
        _check_backbone(node["backbone"])


@cache
def _check_clip(model: str, tag: str) -> None:
    import open_clip

    if model.startswith(("zoo:", "local-dir:", "hf:")) or model.endswith(".json"):
        return
    if model not in open_clip.list_models():
        raise UserError(f"model {model} is no open_clip architecture")
    is_file = bool(Path(tag).suffix) or "/" in tag
    if tag and not is_file and tag not in open_clip.list_pretrained_tags_by_model(model):
        raise UserError(f"pretrained {tag} is no tag of {model}")


@cache
def _check_backbone(name: str) -> None:
    kind, _, rest = name.partition(":")
    if kind == "clip":
        _check_clip(*rest.partition("@")[::2] if "@" in rest else (rest, ""))
        return
    with torch.device("meta"):  # without memory and without a draw
        load_backbone(name, False)
