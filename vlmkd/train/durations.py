"""Optimiser steps of `5000`, `20ep` (epochs), `1e6ex` (examples), `10%` of the run, `max(500, 12ep)` and `min(100, 20%)`."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any, TypeVar

from vlmkd.config import DURATION, RunConfig, require

C = TypeVar("C", bound=RunConfig)


def in_steps(cfg: C, steps_per_epoch: int) -> C:
    """`cfg` with every `Duration` and `Length` in steps; with `steps_per_epoch` 0 (not known) epochs are refused.

    Examples that fill no batch are dropped, shares rounded; what is longer than nothing has a step at least.
    """
    units = {"ex": 1 / cfg.batch_size, "ep": float(steps_per_epoch)}
    whole = _steps_of(cfg.steps, "steps", units)
    require(whole > 0, "steps", f"is {cfg.steps}, which is no step")
    return typing.cast(C, _resolved(dataclasses.replace(cfg, steps=whole), "", units | {"%": whole / 100}))


def _resolved(cfg: Any, prefix: str, units: dict[str, float]) -> Any:
    changed: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, name)
        if dataclasses.is_dataclass(value):
            changed[name] = _resolved(value, f"{prefix}{name}.", units)
        elif typing.get_origin(hint) is Annotated and typing.get_args(hint)[0] == int | str:
            changed[name] = _steps_of(value, prefix + name, units)
    return dataclasses.replace(cfg, **changed)


def _steps_of(value: int | str, path: str, units: dict[str, float]) -> int:
    """`units`: steps of an example, an epoch and a hundredth of the run."""
    if isinstance(value, int):
        return value
    found = DURATION.fullmatch(value)
    assert found is not None, "the type of the field was checked"
    if found["bound"]:
        given = (int(text) if text.isdecimal() else text for text in (found["a"], found["b"]))
        parts = [_steps_of(one, path, units) for one in given]
        return max(parts) if found["bound"] == "max" else min(parts)
    number, unit = float(found["number"]), found["unit"]
    told = f"is {value}, a share of itself; give steps, epochs (ep) or examples (ex)"
    require(unit in units, path, told)
    told = f"is {value}, but the whole batches of these data are not known, or none; give steps, examples (1e6ex), a smaller"
    more = "batch_size, or for shards data.samples_per_epoch (of chats: run index_shards.py)"
    require(units[unit] > 0, path, f"{told} {more}")
    steps = number * units[unit]
    return max(int(number > 0), int(steps + 1e-6) if unit == "ex" else round(steps))
