"""Damaged, lying and hostile weight files: every reader gives tensors or one line, and nothing is run."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from projects.dho import legacy as dho
from projects.dho import tip_adapter
from projects.promptkd import legacy as promptkd
from projects.vl2v_adip import convert_vl2v
from vlmkd.errors import UserError
from vlmkd.models.checkpoints import read_state_dict
from vlmkd.models.clip import load_clip
from vlmkd.tensor_files import read_safetensors, read_torch

READERS: dict[str, Callable[[Path], Any]] = {
    "core": read_state_dict,
    "dho": dho.read_checkpoint,
    "tip_adapter": tip_adapter.load,
    "promptkd": promptkd.read_checkpoint,
    "vl2v": convert_vl2v.read_checkpoint,
}


def contents() -> dict[str, dict[str, Any]]:
    """What each reader reads, small."""
    heads = {
        f"{head}.{leaf}": torch.zeros((3, 4) if leaf == "weight" else 3)
        for head in ("ce_head", "kd_head")
        for leaf in ("weight", "bias")
    }
    tower = {"class_embedding": 4, "positional_embedding": (5, 4), "conv1.weight": (4, 3, 2, 2)}
    backbone = {f"backbone.{name}": torch.zeros(shape) for name, shape in tower.items()}
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    return {
        "core": {
            "visual.proj": torch.randn(4, 3),
            "visual.conv1.weight": torch.randn(2, 3, 2, 2).half(),
            "logit_scale": torch.tensor(1.0),
        },
        "dho": {
            "model_state_dict": collections.OrderedDict(backbone | heads),
            "alpha": np.float64(0.5),
            "epoch": 1,
        },
        "tip_adapter": {
            "adapter_weight": torch.randn(4, 3),
            "cache_keys": torch.randn(3, 4),
            "cache_values": torch.randn(4, 2),
            "clip_weights": torch.randn(3, 2),
            "best_alpha": 1.0,
            "best_beta": np.float64(2.0),
        },
        "promptkd": {
            "state_dict": {"prompt_learner.ctx": torch.randn(2, 4).half(), "logit_scale": torch.tensor(1.0)},
            "scheduler": {"successor": optimizer},
        },
        "vl2v": {
            "args": argparse.Namespace(algorithm="DFC_STAGE1", trial_seed=0),
            "test_envs": [0],
            "model_dict": {"featurizer.network.w": torch.randn(3), "proj_lyr.weight": torch.randn(2, 3)},
        },
    }


def saved(content: Any, *, legacy: bool = False) -> bytes:
    """The bytes of torch.save."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def rezipped(data: bytes, change: Callable[[str, bytes], tuple[str, bytes] | None], **options: Any) -> bytes:
    """An archive with right check sums around changed members; None leaves one out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", **options) as new:
        for name in old.namelist():
            changed = change(name, old.read(name))
            if changed is not None:
                new.writestr(*changed)
    return stream.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """An archive of torch.save with this as its pickle."""
    data = saved({"a": torch.zeros(4)})
    return rezipped(data, lambda name, old: (name, pickled if name.endswith("data.pkl") else old))


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Flipped bits, other bytes, cuts and insertions."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(3):
            case 0:
                changed[at : at + 1] = bytes(
                    [changed[at] ^ 1 << rng.randrange(8)] if at < len(changed) else []
                )
            case 1:
                del changed[at : at + rng.randrange(9)]
            case _:
                changed[at:at] = rng.randbytes(rng.randrange(5))
    return bytes(changed)


def damaged(rng: random.Random, content: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, bytes]:
    """A file ending and the damaged bytes of such a file."""
    kind = rng.choice(("zip", "pickle in zip", "members", "legacy", "safetensors", "header", "noise"))
    if kind == "noise":
        return "pt", rng.choice((b"", b"\x80\x02", b"PK\x03\x04")) + rng.randbytes(rng.randrange(400))
    if kind in ("safetensors", "header"):
        data = safetensors_bytes(tensors)
        length = struct.unpack("<Q", data[:8])[0]
        if kind == "header":
            header = mutated(rng, data[8 : 8 + length])
            return "safetensors", struct.pack("<Q", len(header)) + header + data[8 + length :]
        return "safetensors", data[: rng.randrange(len(data))] if rng.random() < 0.5 else mutated(rng, data)
    data = saved(content, legacy=kind == "legacy")
    if kind == "pickle in zip":
        return "pt", rezipped(
            data, lambda name, old: (name, mutated(rng, old) if name.endswith("data.pkl") else old)
        )
    if kind == "members":
        return "pt", rezipped(
            data,
            lambda name, old: (
                rng.choice((None, (name, old[: len(old) // 2]), (f"{name}x", old)))
                if rng.random() < 0.3
                else (name, old)
            ),
        )
    return "pt", data[: rng.randrange(len(data))] if rng.random() < 0.4 else mutated(rng, data)


def line_of(reader: Callable[[Path], Any], path: Path) -> str:
    """The error line of a reader, checked for its form; empty where the file is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        try:
            read = reader(path)
        except UserError as error:
            line = str(error)
            assert line.isprintable() and str(path) in line and len(line) < 900, line
            return line
    if isinstance(read, Mapping):
        assert all(isinstance(tensor, Tensor) for tensor in read.values())
    return ""


@pytest.mark.parametrize("name", READERS)
def test_damage_of_any_kind_is_one_line_or_no_damage_to_the_tensors(name: str, tmp_path: Path) -> None:
    rng, all_contents = random.Random(name), contents()
    lines = 0
    for number in range(300):
        ending, data = damaged(rng, all_contents[name], all_contents["core"])
        path = tmp_path / f"{number}.{ending}"
        path.write_bytes(data)
        lines += bool(line_of(READERS[name], path))
        path.unlink()
    assert lines > 200


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def _nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def _tensor(storage: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of {"a": tensor} with these claims about storage `0` of an archive."""
    pickled = io.BytesIO()

    class Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
        def persistent_id(self, obj: Any) -> Any:
            if obj is claims:
                return ("storage", torch.FloatStorage, "0", "cpu", storage)
            return None

    claims = object()
    arguments = (claims, offset, size, stride, False, collections.OrderedDict())
    Pickler(pickled, protocol=2).dump({"a": Call(torch._utils._rebuild_tensor_v2, *arguments)})
    return pickled.getvalue()


def hostile(trap: Path) -> dict[str, tuple[bytes, str]]:
    """Files that want to do something, and what their line must say."""
    touch = f"touch {trap}"
    wide = np.lib.stride_tricks.as_strided  # any function of a package
    old = io.BytesIO()
    with tarfile.open(fileobj=old, mode="w") as tar:
        for member in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(member), io.BytesIO())
    zeros = saved({"a": torch.zeros(1 << 18)})
    return {
        "os.system": (saved({"a": Call(os.system, touch)}), "system"),
        "os.system, old format": (saved({"a": Call(os.system, touch)}, legacy=True), "system"),
        "eval": (saved({"a": Call(eval, f"open({str(trap)!r}, 'w')")}), "eval"),
        "open": (saved({"a": Call(open, str(trap), "w")}, legacy=True), "open"),
        "torch's own loaders": (saved({"a": Call(torch.hub.load, "x/y", "z")}), "torch.hub.load"),
        "a package": (saved({"a": Call(wide, 1)}), "as_strided"),
        "terminal codes": (
            with_pickle(b"\x80\x02c\x1b[31mos\nsystem\x07\n."),
            "is damaged or of another kind",
        ),
        "deep lists": (with_pickle(_nested(100_000)), "holds|expected|has no"),
        "deep lists, bare": (_nested(100_000), "is damaged or of another kind"),
        "protocol 5": (
            pickle.dumps({"a": Call(os.system, touch)}, protocol=5),
            "is damaged or of another kind",
        ),
        "memory": (saved({"a": Call(bytearray, 1 << 62)}), "damaged"),
        "stride 0": (with_pickle(_tensor(4, 0, (1 << 40,), (0,))), "claims a tensor|damaged"),
        "beyond the storage": (with_pickle(_tensor(4, 0, (1 << 20,), (1,))), "damaged"),
        "negative offset": (with_pickle(_tensor(4, -4, (4,), (1,))), "damaged"),
        "a storage that is not there": (with_pickle(_tensor(1 << 40, 0, (4,), (1,))), "damaged"),
        "no values": (saved({"a": torch.zeros(3, device="meta")}), "without values"),
        "sparse": (saved({"a": torch.eye(3).to_sparse()}), "not dense"),
        "complex": (saved({"a": torch.ones(3, dtype=torch.complex64)}), "complex64 elements"),
        "a name of two lines": (saved({"a\n\x1b[1mb": torch.zeros(3)}), "tensor name"),
        "a zip bomb": (
            rezipped(zeros, lambda name, old: (name, old), compression=zipfile.ZIP_DEFLATED),
            "is compressed",
        ),
        "tar of old torch": (old.getvalue(), "archive of old torch|is damaged"),
        "TorchScript": (
            rezipped(zeros, lambda name, old: (name.replace("data.pkl", "constants.pkl"), old)),
            "TorchScript|damaged",
        ),
    }


@pytest.mark.parametrize("reader", READERS)
def test_hostile_files_run_nothing_and_say_what_they_wanted(reader: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for name, (data, _) in hostile(trap).items():
        path = tmp_path / "weights.pt"
        path.write_bytes(data)
        line = line_of(READERS[reader], path)
        assert line, name
        assert not trap.exists(), name


def test_the_line_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for name, (data, expected) in hostile(tmp_path / "trap").items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=expected):
            pytest.fail(f"{name} was read: {read_state_dict(path)}")


HEADERS = {
    "longer than the file": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    "a deep header": struct.pack("<Q", 20_000) + b"[" * 20_000,
    "offsets behind the end": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 50]}},
    "a shape of more than its bytes": {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}},
    "overflow": {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}},
    "negative": {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
    "a rare element type": {"a": {"dtype": "F4", "shape": [8, 4], "data_offsets": [0, 16]}},
    "a name of two lines": {"a\nb": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers_that_lie(name: str, tmp_path: Path) -> None:
    header = HEADERS[name]
    path = tmp_path / "x.safetensors"
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text + bytes(16)
    path.write_bytes(header)
    assert line_of(read_safetensors, path)
    assert line_of(read_torch, path) == line_of(read_safetensors, path)


def test_paths_that_are_no_readable_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pt", tmp_path / "none.safetensors"):
        for reader in READERS.values():
            assert line_of(reader, path)


def test_files_that_open_clip_reads_itself(tmp_path: Path) -> None:
    tower = {"width": 16, "layers": 1}
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 8, **tower},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "heads": 2, **tower},
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    path = tmp_path / "x.npz"
    for data in (b"", random.Random(0).randbytes(3000), b"PK\x03\x04 torn", pickle.dumps(Call(os.getpid))):
        path.write_bytes(data)
        line = line_of(lambda file: load_clip(str(tmp_path / "model.json"), str(file)), path)
        assert "is damaged" in line and "allow_pickle" not in line
    np.savez(path, other=np.zeros(3))
    assert line_of(lambda file: load_clip(str(tmp_path / "model.json"), str(file)), path)


def test_plain_classes_are_made_only_where_they_are_named(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=0.1), "a": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="argparse.Namespace"):
        read_torch(tmp_path / "w.pt")
    assert read_torch(tmp_path / "w.pt", plain=[argparse.Namespace])["args"].lr == 0.1
    with pytest.raises(UserError, match="argparse.Namespace"):  # the permission ended with the call
        read_torch(tmp_path / "w.pt")
    assert read_torch(tmp_path / "w.pt", inert=True)["args"] == {}
