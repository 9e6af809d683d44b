"""The table of the published sets, `sets.yaml`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

from vlmkd.files import read_yaml

Facts = TypeVar("Facts")


def facts(section: str, kind: type[Facts]) -> dict[str, Facts]:
    """The sets of one section as dataclasses of `kind`; lists of the file are tuples."""
    return {key: kind(**described) for key, described in _table()[section].items()}


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return _frozen(read_yaml(Path(__file__).with_name("sets.yaml"), "data sets"))


def _frozen(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _frozen(value) for key, value in content.items()}
    return tuple(map(_frozen, content)) if isinstance(content, list) else content
