"""An exported model's folder, whatever is in it: written whole or not at all, described, and checked in a fresh process.

A format (clip.py, classifier.py, a project's own) says what a Probe of its model is, and what a reloaded folder makes
of that Probe's inputs. Its module run as `python -m MODULE FOLDER PROBE ...` is the checking process (`check_main`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmkd import __version__
from vlmkd.errors import UserError
from vlmkd.files import write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.tensor_files import read_safetensors
from vlmkd.zoo import sha256_of

PROVENANCE = "provenance.json"
_REPOSITORY = Path(__file__).resolve().parents[2]
_SEED = 20231001
_TOLERANCE = 1e-4
"""Largest difference of an output's number, relative to the largest one where that is above 1; fp32 on another kernel
differs by less than 1e-5."""


# ---------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(folder: Path, marks: Sequence[str]) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends without an error.

    An older folder there is replaced if it holds one of the files `marks`.

    Raises:
        UserError: a foreign folder in the way, or no space.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the export is a folder there: move the file away")
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).is_file() for name in marks):
        raise UserError(f"{folder} exists and is no model export; choose another folder")
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(
                f"cannot write the export {folder}: {error.strerror}; free space or choose another folder"
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def stored(tensor: Tensor, *, half: bool = False) -> Tensor:
    """A tensor as a file has it: on the CPU, whole, of its own memory; floats as fp32, or fp16 where `half`."""
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float16 if half else torch.float32)
    return tensor.detach().cpu().contiguous().clone()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with `facts` as its metadata.

    Raises:
        UserError: the disk refuses.
    """
    try:
        save_file(dict(tensors), path, {"format": "pt", **(facts or {})})
    except SafetensorError as error:  # its form of every failure of the disk
        raise UserError(f"cannot write {path}: {error}; free space or choose another folder") from None


def write_provenance(
    weights: Path, source: str, parameters: Iterable[Tensor], facts: Mapping[str, Any]
) -> None:
    """Write provenance.json beside `weights`: their sha256, source and size of the model, versions, commit, command, `facts`."""
    content = {
        "file": weights.name,
        "sha256": sha256_of(weights),
        "source": source,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "vlmkd": __version__,
        "torch": str(torch.__version__),
        "git_commit": _git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    write_json(weights.with_name(PROVENANCE), content | dict(facts))


def _git_commit() -> str:
    """Commit of the repository that this code is in; empty outside one, or without git."""
    if not (_REPOSITORY / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(_REPOSITORY), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# --------------------------------------------------------------------------------------------------------- checking


@dataclass
class Probe:
    """Inputs of a model and what it makes of them, in fp32 on the CPU."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain data that a reload must know."""

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {f"inputs.{name}": value for name, value in self.inputs.items()}
        tensors |= {f"outputs.{name}": stored(value) for name, value in self.outputs.items()}
        write_tensors(path, tensors, {"facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read it back."""
        parts: dict[str, dict[str, Tensor]] = {"inputs": {}, "outputs": {}}
        for name, value in read_safetensors(path).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        with safe_open(path, "pt") as stream:
            return cls(**parts, facts=json.loads(stream.metadata()["facts"]))


def probe_images(spec: ImageSpec, count: int = 2) -> Tensor:
    """Random pixels [count, 3, h, w] of a model's size, always the same."""
    return torch.randn(count, 3, *spec.size, generator=torch.Generator().manual_seed(_SEED))


def verify(module: str, probes: Mapping[Path, Probe]) -> None:
    """Run `python -m MODULE FOLDER PROBE ...` in a fresh process on the CPU, without the network.

    One process for all the exports of a run, because most of its seconds are those of its imports.

    Raises:
        UserError: a reloaded model differs or cannot be loaded; quotes the process' last line.
    """
    env = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    threads = str(torch.get_num_threads())
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_REPOSITORY), env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", module]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (folder, probe) in enumerate(probes.items()):
            file = Path(scratch) / f"probe_{number}.safetensors"
            probe.save(file)
            command += [str(folder.absolute()), str(file)]
        child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        lines = (child.stderr.strip() or child.stdout.strip() or f"exit code {child.returncode}").splitlines()
        raise UserError(
            f"export {' or '.join(map(str, probes))} does not reproduce the model: {lines[-1]}; keep the run's checkpoint "
            "and report this"
        )


def check_main(outputs: Callable[[Path, Probe], Mapping[str, Tensor]], argv: Sequence[str]) -> int:
    """The checking process: `outputs` of every folder and its probe's inputs; tells the first that differ and returns 1."""
    folders = [Path(folder) for folder in argv[::2]]
    for folder, file in zip(folders, argv[1::2], strict=True):
        try:
            probe = Probe.load(Path(file))
            difference = compare(outputs(folder, probe), probe.outputs)
        except UserError as error:
            difference = str(error)
        if difference:
            print(f"{folder.name}: {difference}" if len(folders) > 1 else difference, file=sys.stderr)
            return 1
    return 0


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What differs between two models' outputs; empty when nothing does."""
    if found.keys() != expected.keys():
        return f"outputs {sorted(found)} instead of {sorted(expected)}"
    for name, value in found.items():
        if value.shape != expected[name].shape:
            return f"{name} is {list(value.shape)} instead of {list(expected[name].shape)}"
        difference = (value.double() - expected[name].double()).abs().max().item()
        limit = _TOLERANCE * max(1.0, expected[name].double().abs().max().item())
        if not difference <= limit:  # also true for NaN
            return f"{name} differs by {difference:.2e}, more than {limit:.0e}"
    return ""
