"""An exported model's folder: written whole or not at all, described, and checked in a fresh process.

The module of a format (clip.py, classifier.py, a project's own) makes a Probe of its model, and, as
`python -m MODULE FOLDER PROBE ...`, compares what a reloaded folder makes of it (`check_main`).
"""

from __future__ import annotations

import contextlib
import errno
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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlmkd import __version__
from vlmkd.errors import UserError
from vlmkd.files import write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.zoo import REPOSITORY, sha256_of

PROVENANCE = "provenance.json"
_SEED = 20231001
_TOLERANCE = 1e-4
"""fp32 on another kernel differs by less than 1e-5."""


@contextlib.contextmanager
def replacing(folder: Path, marks: Sequence[str]) -> Iterator[Path]:
    """A folder to write into, which replaces `folder` when the block ends without an error.

    An older one must hold one of the files `marks`, or nothing.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but the export is a folder; move the file away")
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
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(f"cannot write {folder}: {error.strerror}; free space or choose another") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def stored(tensor: Tensor, *, half: bool = False) -> Tensor:
    """A tensor as a file has it: on the CPU, of its own memory, fp32; with `half` fp16, but for single numbers."""
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float16 if half and tensor.numel() > 1 else torch.float32)
    return tensor.detach().cpu().contiguous().clone()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] = {}, *, half: bool = False
) -> None:
    """As `stored`, into a safetensors file with `facts` as its metadata."""
    held = {name: stored(tensor, half=half) for name, tensor in tensors.items()}
    try:
        save_file(held, path, {"format": "pt", **facts})
    except SafetensorError as error:  # its form of every failure of the disk
        raise UserError(f"cannot write {path}: {error}; free space or choose another") from None


def write_provenance(
    weights: Path, source: str, parameters: Iterable[Tensor], facts: Mapping[str, Any]
) -> None:
    """Write provenance.json beside `weights`: where the model comes from, and `facts`."""
    content = {
        "file": weights.name,
        "sha256": sha256_of(weights),
        "source": source,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "vlmkd": __version__,
        "torch": str(torch.__version__),
        "git_commit": git("rev-parse", "HEAD"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    write_json(weights.with_name(PROVENANCE), content | dict(facts))


def git(*args: str) -> str:
    """What a git command says in the source tree; empty without one."""
    if not (REPOSITORY / ".git").exists() or not shutil.which("git"):  # not that of a folder around it
        return ""
    command = ["git", "-C", str(REPOSITORY), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass
class Probe:
    """Inputs of a model and what it makes of them, in fp32 on the CPU."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        outputs = {name: stored(value) for name, value in self.outputs.items()}
        torch.save(vars(self) | {"outputs": outputs}, path)

    @classmethod
    def load(cls, path: Path) -> Probe:
        return cls(**torch.load(path, weights_only=True))


def probe_images(spec: ImageSpec, count: int = 2) -> Tensor:
    """Random pixels [count, 3, h, w], always the same."""
    return torch.randn(count, 3, *spec.size, generator=torch.Generator().manual_seed(_SEED))


def verify(module: str, probes: Mapping[Path, Probe]) -> None:
    """Run `python -m MODULE FOLDER PROBE ...` on the CPU, without the network; a UserError has its last line.

    One process for all, because its seconds are those of its imports.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", module]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (folder, probe) in enumerate(probes.items()):
            file = Path(scratch) / f"probe_{number}.pt"
            probe.save(file)
            command += [str(folder.absolute()), str(file)]
        child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        told = child.stderr.strip() or child.stdout.strip() or f"exit code {child.returncode}"
        what = f"export {' or '.join(map(str, probes))} does not reproduce the model"
        raise UserError(f"{what}: {told.splitlines()[-1]}; keep the checkpoint and report this")


def check_main(outputs: Callable[[Path, Probe], Mapping[str, Tensor]], argv: Sequence[str]) -> int:
    """Print the first folder whose `outputs` are not its probe's, and return 1."""
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


def compare(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = _TOLERANCE
) -> str:
    """What differs between outputs, relative to each one's largest number above 1; else empty."""
    if found.keys() != expected.keys():
        return f"outputs {sorted(found)} instead of {sorted(expected)}"
    for name, value in found.items():
        wanted = expected[name].double()
        if value.shape != wanted.shape:
            return f"{name} is {list(value.shape)} instead of {list(wanted.shape)}"
        difference = (value.double() - wanted).abs().max().item()
        limit = tolerance * max(1.0, wanted.abs().max().item())
        if not difference <= limit:  # also true for NaN
            return f"{name} differs by {difference:.2e}, more than {limit:.0e}"
    return ""
