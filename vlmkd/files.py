"""A user's text files, read, and our own, written: what fails is a UserError that `what` begins and `hint` ends."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from vlmkd.errors import UserError

_LIMIT = 1 << 30  # bytes; the largest captions file in use has a tenth of it
_YAML_LIMIT = 1 << 22
_DEPTH = 64  # of nested YAML lists and mappings


def cache_root() -> Path:
    """Folder for what is built or fetched once."""
    return Path(os.environ.get("VLMKD_CACHE") or "~/.cache/vlmkd").expanduser()


def read_text(path: str | Path, what: str, hint: str = "", *, limit: int = _LIMIT) -> str:
    """UTF-8 of at most `limit` bytes, without a byte-order mark."""
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
        told = f"is not UTF-8 text (byte {error.start}); save it as UTF-8, or name the right file"
        raise UserError(f"{what} {path} {told}") from None


def unreadable(error: OSError | ValueError, path: str | Path, what: str, hint: str = "") -> UserError:
    """For a file whose opening or reading raised `error`."""
    told = f"{what} {path}"
    if isinstance(error, FileNotFoundError):
        told += " does not exist"
    elif isinstance(error, IsADirectoryError) or os.path.isdir(path):
        told += " is a folder; name a file"
    elif isinstance(error, OSError):
        told += f" cannot be read ({error.strerror or one_line(error)})"
    else:  # a null character in it
        told += " is no path"
    return UserError(_with(told, hint))


def read_json(path: str | Path, what: str, hint: str = "") -> Any:
    """The content of a JSON file."""
    text = read_text(path, what, hint)
    try:
        content = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair would fail only where the string is written
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(_with(f"{what} {path} is not valid JSON: {one_line(error)}", hint)) from None
    return content


def read_object(path: str | Path, what: str, hint: str = "") -> dict[str, Any]:
    """As `read_json`, for a file that must hold a JSON object."""
    content = read_json(path, what, hint)
    if not isinstance(content, dict):
        told = f"{what} {path} must hold a JSON object; it holds a {type(content).__name__}"
        raise UserError(_with(told, hint))
    return content


def read_yaml(path: str | Path, what: str, hint: str = "") -> Any:
    """See `parse_yaml`."""
    return parse_yaml(read_text(path, what, hint, limit=_YAML_LIMIT), f"{what} {path}")


def parse_yaml(text: str, what: str) -> Any:
    """`text` as plain data. Aliases (`*name`) are refused, because a few lines of them unfold to gigabytes."""
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
    """What an exception says, in at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def new_file(path: str | Path, what: str = "file") -> Iterator[Path]:
    """A temporary path for the body to write, which then takes the place of `path`, or goes when the body fails.

    The body only writes: an OSError in it is taken for one of writing.
    """
    with _partial(Path(path), what) as partial:
        yield partial
        os.replace(partial, path)


def check_writable(path: str | Path, what: str) -> None:
    """Refuse a file that `new_file` could not write, before the work for it."""
    with _partial(Path(path), what):
        pass


@contextmanager
def _partial(path: Path, what: str) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
    except OSError as error:
        told = f"cannot be written ({error.strerror or error}); free space or name another"
        raise UserError(f"{what} {path} {told}") from None
    finally:
        with suppress(OSError):  # what kept it from being written has been told
            partial.unlink(missing_ok=True)


def new_folder(path: str | Path, what: str) -> Path:
    """`path`, as a folder that can be written."""
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
    """By `new_file`."""
    with new_file(path, what) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, what: str = "file") -> None:
    """Write `content` as JSON by `new_file`."""
    write_text(path, json.dumps(content, indent=1) + "\n", what)


def _with(told: str, hint: str) -> str:
    return f"{told}; {hint}" if hint else told


class _PlainLoader(yaml.SafeLoader):
    """Plain data only; `1e-4` is a number (YAML 1.2) and a date is a string."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
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
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                mark: Any = node.start_mark
                raise yaml.MarkedYAMLError(None, None, f"{name!r} comes twice", mark)
        return super().construct_mapping(node, deep)


_TAG = "tag:yaml.org,2002:"
_PLAIN = (None, *(_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")))
_PlainLoader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _PLAIN}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (_TAG + "timestamp", _TAG + "value")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
