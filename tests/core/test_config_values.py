"""Every field of every config class, with values that hypothesis invents: a run of that config, or one line."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmkd import config
from vlmkd.config import Range
from vlmkd.errors import UserError

ROOT = Path(__file__).parents[2]
BASES: dict[str, dict[str, Any]] = {
    "tinyclip.DistillConfig": {"run_dir": "r", "student": {"model": "m"}, "teachers": [{"model": "t"}]},
    "tinyclip.MaskConfig": {"run_dir": "r", "student": {"model": "m"}, "teachers": [{"model": "t"}]},
    "promptkd.TeacherConfig": {"run_dir": "r", "clip": {"model": "m"}},
    "promptkd.StudentConfig": {"run_dir": "r", "student": {"model": "m"}, "teacher": {"prompts": "p"}},
    "promptkd.BankConfig": {"out": "o", "data": {"set": "emoji"}, "teacher": {"prompts": "p"}},
    "dho.DhoConfig": {
        "run_dir": "r", "data": {"set": "emoji"}, "split": {"shots": 4}, "teacher": {"model": "t"},
        "student": {"backbone": "b"}, "evaluation": {"every_steps": 10},
    },
    "dho.TipAdapterConfig": {
        "run_dir": "r", "data": {"set": "emoji"}, "split": {"shots": 4}, "teacher": {"model": "t"},
    },
    "vl2v_adip.AlignConfig": {
        "run_dir": "r", "data": {"set": "emoji-domains"}, "fold": {"test_domain": "photo"},
        "teacher": {"model": "t"}, "student": {"backbone": "b"},
    },
    "vl2v_adip.DistillConfig": {
        "run_dir": "r", "data": {"set": "emoji-domains"}, "fold": {"test_domain": "photo"},
        "teacher": {"model": "t"}, "student": {"backbone": "b"}, "evaluation": {"every_steps": 10},
    },
    "llava_mod.LlavaModConfig": {
        "run_dir": "r", "data": {"chats": ["c"]}, "student": {"init_from": "s"}, "teacher": {"init_from": "t"},
    },
    "matvlm.MatvlmConfig": {"run_dir": "r", "data": {"chats": ["c"]}, "student": {"init_from": "s"}},
    "calico.CalicoConfig": {
        "run_dir": "r", "data": {"info": "i"}, "model": {"lidar": {"encoder": "pillars"}},
    },
}  # fmt: skip
"""The least that each config class needs."""


def class_of(name: str) -> type[Any]:
    """The class that a key of BASES names."""
    project, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"projects.{project}.config"), cls)


def leaves(cls: type[Any], prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any, type[Any]]]:
    """(path, type, class) of every field below `cls`; the elements of a list of sections are those of its first."""
    found: list[tuple[tuple[Any, ...], Any, type[Any]]] = []
    plain = typing.get_type_hints(cls)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        nested = config._dataclass_of(plain[name])
        if nested is None:
            found.append(((*prefix, name), hint, cls))
        elif nested is plain[name]:
            found += leaves(nested, (*prefix, name))
        else:
            found += leaves(nested, (*prefix, name, 0))
    return found


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of the YAML type that `hint` asks for, sensible and not."""
    number = st.one_of(
        st.sampled_from(
            [0, 1, -1, 2, 8, 0.5, 1.0, -0.5, 2**31, 2**63, 2**70, 1e300, float("nan"), float("inf")]
        ),
        st.integers(),
        st.floats(),
    )
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return st.booleans()
    if hint in (int, float):
        return number
    if hint is str:
        return st.one_of(
            st.text(max_size=20), st.sampled_from(["???", "${x}", "1e-4", "yes", "a=b", "\0", "'"])
        )
    if origin is typing.Literal:
        return st.sampled_from([*arguments, "other"])
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(
            st.text(max_size=5), st.one_of(st.booleans(), st.integers(), st.text(max_size=5))
        )
    return values_of(arguments[0])  # Annotated


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def with_value(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of `tree` with `value` at `path`; 0 in it is a list of one element."""
    name, *rest = path
    if not rest:
        return {**tree, name: value}
    if rest[0] == 0:
        return {**tree, name: [with_value((tree.get(name) or [{}])[0], tuple(rest[1:]), value)]}
    return {**tree, name: with_value(tree.get(name, {}), tuple(rest), value)}


def test_every_number_has_a_range() -> None:
    for name in BASES:
        for path, hint, _ in leaves(class_of(name)):
            bare = hint.__origin__ if hasattr(hint, "__metadata__") else hint
            if (
                bare in (int, float)
                or typing.get_origin(bare) is list
                and typing.get_args(bare)[0] in (int, float)
            ):
                ranges = [limits for limits in getattr(hint, "__metadata__", ()) if isinstance(limits, Range)]
                assert ranges, f"{name}: {'.'.join(map(str, path))} is any number; give its type a Range"


def test_the_defaults_are_in_their_ranges() -> None:
    for name, base in BASES.items():
        for _, _, cls in leaves(class_of(name)):
            config.fitted(cls, dataclasses.asdict(cls()), "") if cls is not class_of(name) else None
        assert base  # the whole class is loaded below


def test_every_config_of_a_program_is_tested_here() -> None:
    known = {base for name in BASES for base in class_of(name).__mro__}
    for file in (ROOT / "projects").glob("*/config.py"):
        module = importlib.import_module(f"projects.{file.parent.name}.config")
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                program = issubclass(cls, config.RunConfig) or {"run_dir", "out"} & set(cls.__annotations__)
                assert cls in known or not program, f"{file}: {cls.__name__}"


@given(st.floats(), st.floats(0, 5), st.floats(0, 5), st.booleans(), st.booleans())
@settings(derandomize=True, max_examples=200)
def test_a_range_holds_what_its_words_say(
    value: float, low: float, span: float, above: bool, below: bool
) -> None:
    high = low + span
    inside = (value > low if above else value >= low) and (value < high if below else value <= high)
    assert (Range(low, high, above, below).refusal(value) == "") == inside
    assert (Range(low, high, above, below).refusal([value, value]) == "") == inside
    assert Range(low, high, above, below, length=3).refusal([value, value])


@pytest.mark.parametrize("name", BASES)
def test_any_value_makes_a_config_that_loads_back_equal_or_one_line(name: str, tmp_path_factory: Any) -> None:
    cls, folder = class_of(name), tmp_path_factory.mktemp("values")
    fields = leaves(cls)
    written, again = folder / "values.yaml", folder / "again.yaml"
    accepted, said = 0, ""

    @given(st.data())
    @settings(
        derandomize=True, max_examples=25, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    def check(data: st.DataObject) -> None:
        nonlocal accepted, said
        tree = BASES[name]
        for path, hint, _ in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2)):
            right = data.draw(st.integers(0, 4)) > 0
            tree = with_value(tree, path, data.draw(values_of(hint) if right else ANYTHING))
        written.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        try:
            cfg = config.load(cls, [str(written)])
        except UserError as error:
            said = str(error)
            assert "\n" not in said
            return
        again.write_text(config.to_yaml(cfg), encoding="utf-8")
        assert config.load(cls, [str(again)]) == cfg
        accepted += 1

    assert config.load(cls, _dotted(BASES[name]))
    check()
    assert accepted, said


def _dotted(tree: dict[str, Any]) -> list[str]:
    """`tree` as overrides."""
    return [
        f"{name}={yaml.safe_dump(value, default_flow_style=True).strip()}" for name, value in tree.items()
    ]


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(derandomize=True, max_examples=25, deadline=None)
def test_any_bytes_as_a_config_file_are_one_line(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load(class_of("dho.DhoConfig"), [str(path)])
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
@settings(derandomize=True, max_examples=40, deadline=None)
def test_any_override_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(class_of("promptkd.BankConfig"), [text])
    assert "\n" not in str(caught.value)
