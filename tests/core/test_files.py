"""Text files that are read, and files that are written: any bytes, any state of the disk, one line."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmkd import files
from vlmkd.distributed import device_named
from vlmkd.errors import UserError, at_least, run_tool

CONTENTS = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(str.encode),
    st.text(alphabet='{}[]":,&*!|>-% \n01e.aux\\\ud83d'.replace("\ud83d", ""), max_size=40).map(str.encode),
    st.just(b"[" * 20_000),
)


def one_line(call: Callable[[], Any]) -> str:
    """The message of the UserError that `call` must raise."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(CONTENTS)
@settings(derandomize=True, max_examples=150, deadline=None)
def test_any_bytes_are_read_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    for read in (files.read_text, files.read_json, files.read_object, files.read_yaml):
        try:
            found = read(path, "--any")
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(f"--any {path} ")
        else:
            json.dumps(found, ensure_ascii=False).encode("utf-8")


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(TREES)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_what_yaml_and_json_write_is_read_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    assert files.parse_yaml(yaml.safe_dump(tree, allow_unicode=True), "x") == tree
    path = tmp_path_factory.getbasetemp() / "tree.json"
    files.write_json(path, tree)
    assert files.read_json(path, "x") == tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        ("2020-01-02", "2020-01-02"),
        ("a: =", {"a": "="}),
        ("'1e-4'", "1e-4"),
    ],
)
def test_yaml_numbers_and_strings(text: str, value: Any) -> None:
    found = files.parse_yaml(text, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &x [1]\nb: *x", "line 2: alias *x: write it out"),
        ("[" * 500, "nested too deeply"),
        ("a: 1\na: 2", "'a' comes twice"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("!!binary aGk=", "could not determine a constructor"),
        ("!!int x", "cannot be read"),
    ],
)
def test_yaml_of_other_things_is_refused(text: str, told: str) -> None:
    assert told in one_line(lambda: files.parse_yaml(text, "config x"))


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    assert "alias *a0" in one_line(lambda: files.parse_yaml(bomb, "x"))


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist; name one" in one_line(lambda: files.read_text(tmp_path / "no", "--f", "name one"))
    assert "is a folder" in one_line(lambda: files.read_text(tmp_path, "--f"))
    assert "is no path" in one_line(lambda: files.read_text("a\0b", "--f"))
    assert "cannot be read (File name too long)" in one_line(lambda: files.read_text("x" * 300, "--f"))
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    assert "is not UTF-8 text (byte 2)" in one_line(lambda: files.read_text(tmp_path / "bytes", "--f"))
    (tmp_path / "long").write_bytes(b"x" * (2 << 20))
    assert "more than 1 MiB" in one_line(lambda: files.read_text(tmp_path / "long", "--f", limit=1 << 20))
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbfok")
    assert files.read_text(tmp_path / "mark", "--f") == "ok"
    (tmp_path / "half.json").write_text('["\\ud83d"]')
    assert "is not valid JSON" in one_line(lambda: files.read_json(tmp_path / "half.json", "--f"))
    (tmp_path / "list.json").write_text("[]")
    assert "must hold a JSON object" in one_line(lambda: files.read_object(tmp_path / "list.json", "--f"))


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "table.md"
    files.write_text(target, "one")
    with pytest.raises(KeyError):
        with files.new_file(target, "--markdown") as partial:
            partial.write_text("two")
            raise KeyError
    assert target.read_text() == "one" and os.listdir(target.parent) == ["table.md"]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert "--json" in one_line(lambda path=path: files.write_text(path, "", "--json"))  # type: ignore[misc]
        assert "--json" in one_line(lambda path=path: files.check_writable(path, "--json"))  # type: ignore[misc]
    assert "it is a file" in one_line(lambda: files.new_folder(tmp_path / "file", "--out"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    files.check_writable(tmp_path / "good", "--json")
    assert not (tmp_path / "good").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fill() -> None:
        with files.new_file(tmp_path / "x", "--out"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"1")

    assert "(No space left on device)" in one_line(fill)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def stranger() -> Iterator[None]:
    """Without root's rights, which pass every permission."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_missing_permissions_are_one_line(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    secret, locked = tmp_path / "secret.json", tmp_path / "locked"
    secret.write_text("{}")
    secret.chmod(0)
    locked.mkdir(mode=0o555)
    request.getfixturevalue("stranger")
    assert "cannot be read (Permission denied)" in one_line(lambda: files.read_json(secret, "--keys"))
    for refused in (
        lambda: files.write_text(locked / "out.md", "", "--markdown"),
        lambda: files.check_writable(locked / "out.json", "--json"),
        lambda: files.new_folder(locked / "cache", "--out"),
        lambda: files.new_folder(locked, "--out"),
    ):
        assert "Permission denied" in one_line(refused)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (UserError("--x is 1\nbad"), "--x is 1\\nbad\n"),
        (PermissionError(13, "Permission denied", "/a/b.tar"), "/a/b.tar: Permission denied\n"),
    ],
)
def test_a_tool_ends_with_one_line_and_two(
    raised: Exception, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def tool(argv: list[str]) -> int:
        raise raised

    with pytest.raises(SystemExit) as ended:
        run_tool(tool)
    assert ended.value.code == 2 and capsys.readouterr().err == told


@pytest.mark.parametrize("name", ["tpu9", "meta", "cuda:99", "xla"])
def test_devices_that_are_not_there(name: str) -> None:
    assert f"--device {name}" in one_line(lambda: device_named(name))


def test_options_below_their_range_are_told_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=at_least(0))
    assert parser.parse_args(["--threads", "3"]).threads == 3
    for wrong in ("-1", "x", str(2**70), "1.5"):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([f"--threads={wrong}"])
        assert ended.value.code == 2 and "argument --threads" in capsys.readouterr().err
