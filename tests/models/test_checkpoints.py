"""Every layout of weights files gives the same model; files that carry code, or another model, are refused."""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmkd.errors import UserError
from vlmkd.models.checkpoints import identify, load_weights, read_state_dict
from vlmkd.models.clip import build_clip, load_clip
from vlmkd.models.convert import to_hf_state
from vlmkd.models.pruned_clip import PrunedCLIP

State = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2},
}
RESNET: dict[str, Any] = CONFIG | {
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None}
}


def original(config: dict[str, Any] = CONFIG) -> State:
    return build_clip(config, seed=3).state_dict()


def new_style(state: State, module: str, suffix: str = "") -> State:
    """The names that TinyCLIP's training code writes; with suffix, the copies beside them."""
    result = {}
    for name, tensor in state.items():
        tower = "image_encoder" if name.startswith("visual.") else "text_encoder"
        tower = "logit_scale" if name == "logit_scale" else tower
        result[f"{tower}{suffix}.{module}{name}" if suffix else f"_{tower}.{module}{name}"] = tensor
    return result


def scrambled(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "manual": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "new style, DDP": lambda state: {"state_dict": new_style(state, "module.")},
    "new style": lambda state: {"state_dict": new_style(state, "")},
    "copies disagree": lambda state: {
        "state_dict": new_style(scrambled(state), "", "_without_ddp") | new_style(state, "module.")
    },
    "copies alone": lambda state: {"state_dict": new_style(state, "", "_without_ddp")},
    "compiled": lambda state: {
        "model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}
    },
    "our encoder": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "custom text": lambda state: {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": tensor
        for name, tensor in state.items()
    },
    "transformers": to_hf_state,
    "training": lambda state: {
        "epoch": 3,
        "name": "run",
        "state_dict": collections.OrderedDict((f"module.{name}", tensor) for name, tensor in state.items()),
        "optimizer": [
            {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.98)}]}
        ],
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(
            lr=1e-4, betas=[0.9, 0.98], nested=argparse.Namespace(model="x"), flag=None
        ),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in original().items()}
    torch.save(LAYOUTS[layout](stored), tmp_path / "weights.pt")
    read = read_state_dict(tmp_path / "weights.pt")
    assert read.keys() == stored.keys()
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name
    module = build_clip(CONFIG)
    load_weights(module, read, "weights.pt")
    assert torch.equal(module.state_dict()["visual.proj"], stored["visual.proj"].float())


def test_resnet_with_its_buffers(tmp_path: Path) -> None:
    stored = original(RESNET)
    stored["visual.bn1.running_mean"] = torch.full_like(stored["visual.bn1.running_mean"], 0.5)
    stored["visual.bn1.num_batches_tracked"] = torch.tensor(7)
    torch.save(
        LAYOUTS["manual"]({k: v.half() if v.is_floating_point() else v for k, v in stored.items()}),
        tmp_path / "w.pt",
    )
    module = build_clip(RESNET)
    load_weights(module, read_state_dict(tmp_path / "w.pt"), "w.pt")
    assert module.visual.bn1.running_mean.eq(0.5).all() and int(module.visual.bn1.num_batches_tracked) == 7


@pytest.mark.parametrize("layout", ["plain", "transformers", "custom text"])
def test_safetensors(layout: str, tmp_path: Path) -> None:
    save_file({k: v.clone() for k, v in LAYOUTS[layout](original()).items()}, tmp_path / "w.safetensors")
    read = read_state_dict(tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, read[name]) for name, tensor in original().items())


def test_legacy_torch_format(tmp_path: Path) -> None:
    torch.save(original(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(tmp_path / "w.pt")["visual.proj"], original()["visual.proj"])


def test_custom_text_model_reads_plain_names_and_back() -> None:
    custom = build_clip(CONFIG | {"custom_text": True})
    load_weights(custom, original(), "plain")
    assert torch.equal(custom.text.text_projection, original()["text_projection"])
    plain = build_clip(CONFIG)
    load_weights(plain, custom.state_dict(), "custom")
    assert torch.equal(plain.text_projection, custom.text.text_projection)


# ------------------------------------------------------------------------------------------------------- archives


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(2, 3)
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def test_torchscript_is_read_only_when_it_is_openais(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "archive.pt"
    module = Traced().half()
    torch.jit.save(torch.jit.trace(module.float(), torch.zeros(1, 2)), path)
    with pytest.raises(UserError, match="TorchScript program and none of OpenAI's"):
        read_state_dict(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    url = f"https://example.invalid/clip/models/{digest}/x.pt"
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "x", {"openai": {"url": url}})
    read = read_state_dict(path)
    assert read.keys() == {"visual.weight", "visual.bias"}
    assert torch.equal(read["visual.weight"], module.visual.weight)


# -------------------------------------------------------------------------------------------------------- refusals


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("how", ["zip", "legacy", "protocol 2", "protocol 5", "inside args"])
def test_a_pickle_with_code_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "weights.pt"
    content: dict[str, Any] = {"state_dict": original(), "extra": Malicious(ran)}
    if how == "inside args":
        content["args"] = argparse.Namespace(hook=content.pop("extra"))
    if how.startswith("protocol"):
        content["state_dict"] = {}
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    wanted = "is damaged or of another kind" if how == "protocol 5" else f"{os.system.__module__}.system"
    assert str(path) in str(caught.value) and wanted in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or of another kind"),
        (b"not a checkpoint at all", "is damaged or of another kind"),
        (b"PK\x03\x04 torn", "is damaged or of another kind"),
    ],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_state_dict(tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_truncated_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file({"a": torch.zeros(1000)}, path) if name.endswith("safetensors") else torch.save(
        original(), path
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="is damaged"):
        read_state_dict(path)


def test_no_file_a_folder_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_state_dict(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="is a folder; name it local-dir:PATH"):
        read_state_dict(tmp_path)
    torch.save({"epoch": 1, "args": argparse.Namespace()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_state_dict(tmp_path / "w.pt")


def test_another_architecture_is_described() -> None:
    state = original()
    state["visual.extra"] = torch.zeros(2, 5)
    wider = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"layers": 3}, "embed_dim": 16}
    with pytest.raises(UserError) as caught:
        load_weights(build_clip(wider), state, "weights.pt")
    message = str(caught.value)
    assert "weights weights.pt are of another architecture: 12 missing: transformer.resblocks.2." in message
    assert "1 unexpected: visual.extra [2, 5]" in message
    assert (
        "2 resized: text_projection [64, 32] instead of [64, 16], visual.proj [64, 32] instead of [64, 16]"
        in message
    )
    assert "vision 2 layers x 64, patch 16, text 2 layers x 64, embedding 32" in message


def test_ragged_weights_for_a_plain_config_are_pointed_out() -> None:
    state = original()
    for name in ("c_fc.weight", "c_fc.bias"):
        key = f"visual.transformer.resblocks.1.mlp.{name}"
        state[key] = state[key][:100]
    key = "visual.transformer.resblocks.1.mlp.c_proj.weight"
    state[key] = state[key][:, :100]
    with pytest.raises(UserError, match="pruned CLIP with ragged layers"):
        load_weights(build_clip(CONFIG), state, "w.pt")
    config = identify(state)
    assert config["pruned"] and config["vision_cfg"]["mlp"] == [256, 100]
    module = build_clip(config)
    assert isinstance(module, PrunedCLIP)
    load_weights(module, new_style(state, "module."), "w.pt")
    assert torch.equal(module.state_dict()["visual.proj"], state["visual.proj"])


# -------------------------------------------------------------------------------------------------------- identify


def test_identify_reads_the_config_from_the_shapes() -> None:
    assert identify({f"module.{name}": tensor for name, tensor in original().items()}) == CONFIG


def test_identify_other_head_width_and_mlp_ratio() -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 64,
            "layers": 2,
            "head_width": 32,
            "mlp_ratio": 3.0,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
    }
    assert identify(original(config), head_width=32) == config


def test_a_half_precision_training_checkpoint_through_load_clip(tmp_path: Path) -> None:
    import json

    (tmp_path / "m.json").write_text(json.dumps(CONFIG))
    halves = {name: tensor.half() for name, tensor in original().items()}
    torch.save(LAYOUTS["training"](halves), tmp_path / "w.pt")
    loaded = load_clip(str(tmp_path / "m.json"), str(tmp_path / "w.pt"))
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, 8))
    reference = build_clip(CONFIG).eval()
    reference.load_state_dict({name: tensor.float() for name, tensor in halves.items()})
    with torch.no_grad():
        for mine, other in zip(loaded.module(images, tokens), reference(images, tokens), strict=True):
            assert torch.equal(mine, other)
