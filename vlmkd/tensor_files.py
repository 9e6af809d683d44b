"""Tensor files of unknown origin, read as data: nothing that a file carries is run, and what is wrong is one line.

safetensors, and what `torch.save` writes (its zip archives and the format before them) through torch's restricted reader.
"""

from __future__ import annotations

import pickle
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmkd.errors import UserError
from vlmkd.files import unreadable

_ZIP = b"PK\x03\x04"
# What damage can raise: a pickle is a program for a small machine, and a damaged one does anything to its stack.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, NameError,
    RuntimeError, SyntaxError, TypeError, ValueError, pickle.PickleError, struct.error, tarfile.TarError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# Element types of weights; rarer ones lack the conversions that readers need.
_TYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_SAVE_AGAIN = "get it as safetensors, or save its tensors alone from a program you trust"


def read_torch(
    path: str | Path, *, what: str = "weights file", plain: Iterable[Any] = (), inert: bool = False
) -> Any:
    """The content of a file of `torch.save` (or, by its ending, of safetensors): tensors on the CPU in plain containers.

    Args:
        what: the file's name in errors.
        plain: classes, or (stand-in, "module.name") pairs, that the file may make beside tensors; harmless ones only.
        inert: every other object of a zip archive is read as a dictionary that means nothing, instead of refused.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path, what=what)
    allowed = list(plain)
    with reading(path, what):
        members = zip_members(path, what=what)
        if sum(member.file_size for member in members or []) > path.stat().st_size:
            # a small file could fill the memory
            raise UserError(f"{what} {path} is compressed, which torch.save never does; {_SAVE_AGAIN}")
        if inert and members is not None:
            with torch.serialization.safe_globals(allowed):
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allowed += [(_Inert, name) for name in unknown]
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # torch's hints to its own developers
            content = torch.load(path, map_location="cpu", weights_only=True)
    _check(content, path, what)
    return content


def read_safetensors(path: str | Path, *, what: str = "weights file") -> dict[str, Tensor]:
    """The tensors of a safetensors file; errors as `read_torch`."""
    path = Path(path)
    with reading(path, what):
        state: dict[str, Tensor] = load_file(path)
    _check(state, path, what)
    return state


def zip_members(path: Path, *, what: str = "weights file") -> list[zipfile.ZipInfo] | None:
    """Of a file that begins like a zip archive, which is how torch tells its two formats apart; else None."""
    with reading(path, what), path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return None
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()


@contextmanager
def reading(path: Path, what: str = "weights file") -> Iterator[None]:
    """What a library's reader of an untrusted file raises becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, *_DAMAGE) as error:
        raise UserError(f"{what} {path} {_what_is_wrong(error)}") from None
    except OSError as error:
        raise unreadable(error, path, what, "check the file") from None


class _Inert:
    """Stands for any class or function of a file."""

    def __new__(cls, *_: Any) -> Any:
        # The one container that torch's restricted reader fills both with items and with attributes.
        return OrderedDict()


def _what_is_wrong(error: BaseException) -> str:
    told = str(error)
    if code := re.search(r"GLOBAL ([\w.]+)", told):
        return f"names {code[1]}, which is code and no data; it is not read: {_SAVE_AGAIN}"
    if "legacy .tar format" in told or "TorchScript" in told:
        return f"is an archive of old torch or a TorchScript program; {_SAVE_AGAIN}"
    return f"is damaged or of another kind ({_short(error)}); fetch it again"


def _short(error: BaseException) -> str:
    """The first sentence without control characters and torch's line numbers, else the class."""
    lines = "".join(c if c.isprintable() or c == "\n" else " " for c in str(error)).strip().splitlines()
    told = re.sub(r"^\[enforce fail at .*?\] \. ", "", lines[0]) if lines else type(error).__name__
    return told.split(". ")[0][:200]


def _check(content: Any, path: Path, what: str) -> None:
    """Refuse tensors without values, or larger than the file, and names no line can hold."""
    size, waiting, seen = path.stat().st_size, [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if wrong := _what_is_odd(value, size):
                raise UserError(f"{what} {path} {wrong}")
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                for name, item in value.items():
                    if isinstance(item, Tensor) and not str(name).isprintable():
                        raise UserError(f"{what} {path} is damaged (tensor name {name!r}); fetch it again")
                value = value.values()
            waiting.extend(value)


def _what_is_odd(tensor: Tensor, size: int) -> str:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return f"holds a tensor that is not dense; {_SAVE_AGAIN}"
    if tensor.device.type != "cpu":
        return f"holds a tensor without values; {_SAVE_AGAIN}"
    if tensor.dtype not in _TYPES:
        return f"holds {tensor.dtype} elements; {_SAVE_AGAIN}, as float32"
    if tensor.numel() * tensor.element_size() > size:
        return f"is damaged (it claims a tensor {list(tensor.shape)}, and has {size} bytes); fetch it again"
    return ""
