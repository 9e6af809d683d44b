"""Text files that a user gave, read, and files of our own, written: what fails is a UserError of one line."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vlmkd.errors import UserError

_LIMIT = 1 << 30  # bytes; the largest captions file in use has a tenth of it
_YAML_LIMIT = 1 << 22
_DEPTH = 64  # of nested YAML lists and mappings


def read_text(path: str | Path, what: str, hint: str = "", *, limit: int = _LIMIT) -> str:
    """The UTF-8 text of a file, without a byte-order mark; `what` names its option or field, `hint` ends the line.

    Raises:
        UserError: no such file, a folder, unreadable, larger than `limit` bytes, or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise unreadable(error, path, what, hint) from None
    if len(data) > limit:
        raise UserError(f"{what} {path} has more than {limit >> 20} MiB; is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8, or name the right file"
        ) from None


def unreadable(error: OSError | ValueError, path: str | Path, what: str, hint: str = "") -> UserError:
    """The line for a file whose opening or reading raised `error`."""
    end = f"; {hint}" if hint else ""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{what} {path} does not exist{end}")
    if isinstance(error, IsADirectoryError) or os.path.isdir(path):
        return UserError(f"{what} {path} is a folder; name a file{end}")
    if isinstance(error, OSError):
        return UserError(f"{what} {path} cannot be read ({error.strerror or one_line(error)}){end}")
    return UserError(f"{what} {str(path)!r} is no path{end}")  # a null character in it


def read_json(path: str | Path, what: str, hint: str = "") -> Any:
    """The content of a JSON file; arguments and errors as `read_text`, and for what is no JSON."""
    text, end = read_text(path, what, hint), f"; {hint}" if hint else ""
    try:
        content = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair would fail only where the string is written
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{what} {path} is not usable: its JSON is nested too deeply{end}") from None
    except ValueError as error:
        raise UserError(f"{what} {path} is not valid JSON: {one_line(error)}{end}") from None
    return content


def read_object(path: str | Path, what: str, hint: str = "") -> dict[str, Any]:
    """As `read_json`, for a file that must hold a JSON object."""
    content = read_json(path, what, hint)
    if not isinstance(content, dict):
        end = f"; {hint}" if hint else ""
        raise UserError(f"{what} {path} must hold a JSON object; it holds a {type(content).__name__}{end}")
    return content


def read_yaml(path: str | Path, what: str, hint: str = "") -> Any:
    """The content of a YAML file as plain data; arguments and errors as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, what, hint, limit=_YAML_LIMIT), f"{what} {path}")


def parse_yaml(text: str, what: str) -> Any:
    """`text` as plain data: null, booleans, numbers, strings, lists and mappings.

    Aliases (`*name`) are refused, because a few lines of them unfold to gigabytes; so is deep nesting.

    Raises:
        UserError: no YAML, or YAML of other things; names `what`.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{what} is not valid YAML: {line}{told}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML: {one_line(error)}") from None
    except (ValueError, KeyError) as error:  # `!!int x`, `!!bool x`, a number of ten thousand digits
        raise UserError(f"{what} holds a value that cannot be read: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def new_file(path: str | Path, what: str = "file") -> Iterator[Path]:
    """A temporary path beside `path` for the body to write, which then takes its place; gone when the body fails.

    The body only writes, because an OSError in it is taken for one of writing.

    Raises:
        UserError: the folder cannot be made or written, the disk is full, or `path` is a folder; names `what`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _touch(path, partial)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{what} {path} cannot be written ({error.strerror or error}); free space or name another"
        ) from None
    finally:
        _remove(partial)


def check_writable(path: str | Path, what: str) -> None:
    """Refuse a file that `new_file` could not write, before the work whose result it is to hold."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _touch(path, partial)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be written ({error.strerror}); name another") from None
    finally:
        _remove(partial)


def new_folder(path: str | Path, what: str) -> Path:
    """`path` as a folder that can be written, made when it is not there.

    Raises:
        UserError: it cannot be made or written, or is a file; names `what`.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"{what} {path} cannot be made a folder ({reason}); name another") from None
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{what} {path} cannot be written (Permission denied); name another")
    return path


def write_text(path: str | Path, text: str, what: str = "file") -> None:
    """Write `text` by `new_file`."""
    with new_file(path, what) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, what: str = "file") -> None:
    """Write `content` as JSON by `new_file`."""
    write_text(path, json.dumps(content, indent=1) + "\n", what)


def _touch(path: Path, partial: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(21, "it is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()


def _remove(partial: Path) -> None:
    try:
        partial.unlink(missing_ok=True)
    except OSError:
        pass  # what kept it from being written has been told


class _PlainLoader(yaml.SafeLoader):
    """Plain data only; `1e-4` is a number (YAML 1.2) and a date is a string."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As SafeLoader's, without aliases and to a depth."""
        event = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, f"alias *{event.anchor}: write it out", mark)
        if self._depth == _DEPTH:
            raise yaml.MarkedYAMLError(None, None, "nested too deeply", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's, without keys that come twice."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            mark: Any = node.start_mark
            raise yaml.MarkedYAMLError(None, None, f"{twice!r} comes twice", mark)
        return super().construct_mapping(node, deep)


_PREFIX = "tag:yaml.org,2002:"
_PlainLoader.yaml_constructors = {
    _PREFIX + name: yaml.SafeLoader.yaml_constructors[_PREFIX + name]
    for name in ("null", "bool", "int", "float", "str", "seq", "map")
} | {None: yaml.SafeLoader.yaml_constructors[None]}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (_PREFIX + "timestamp", _PREFIX + "value")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    _PREFIX + "float", re.compile(r"[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
