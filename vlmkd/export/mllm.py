"""Exported multimodal models: what is not stock weights, and how to find those.

`mllm.json` names tower, decoder, template and image statistics; `model.safetensors` holds the tensors that were trained, so
that a projector on a frozen language model is a small file; the rest comes from where `mllm.json` says, and has the sha256
that it says.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd.chat_config import MllmConfig
from vlmkd.chat_ids import IMAGE_ID
from vlmkd.data.chat_outputs import Features
from vlmkd.errors import UserError
from vlmkd.export.folder import (
    Probe,
    check_main,
    probe_images,
    replacing,
    stored,
    verify,
    write_provenance,
    write_tensors,
)
from vlmkd.files import read_object, write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import load_backbone
from vlmkd.models.clip import drawn_from
from vlmkd.models.lora import add_lora, merge_lora
from vlmkd.models.mllm import Mllm, Projector, VisionTower, load_decoder
from vlmkd.tensor_files import read_safetensors
from vlmkd.zoo import fetch, sha256_of

CONFIG, WEIGHTS = "mllm.json", "model.safetensors"
_FORMAT = 1

Surgery = Callable[[nn.Module, Mapping[str, Any]], None]
"""Makes the decoder what a project's facts say, before weights are loaded."""


@dataclass
class ChatParts:
    """A multimodal model and what goes with it."""

    module: Mllm
    tokenizer: Any
    image_spec: ImageSpec
    config: MllmConfig
    """Without `init_from`."""
    facts: dict[str, Any]
    """What a project says of it, e.g. which layers are sparse."""
    base_digest: str
    """sha256 over the weights as they came from tower and decoder."""
    features: Features | None = None
    """What the tower gives for pictures, where that is stored."""
    rounded: bool = False
    """Stock weights, too, are what a run in bfloat16 made of them."""
    trained: set[str] = field(default_factory=set)
    """Names of the tensors that are no longer stock: those of an export, and what a run trains."""
    project: str = ""
    """Which one made it, and knows its `facts`."""
    template: str = "llava"
    """How the conversations were written that it learned from."""


def build_mllm(
    cfg: MllmConfig, *, seed: int = 0, surgery: Surgery | None = None, keep_lora: bool = False
) -> ChatParts:
    """The model of a config; new parts are drawn from `seed`. `keep_lora`: as of `load_mllm`."""
    if cfg.init_from:
        half = "bf16" if cfg.precision == "bf16" else ""
        return load_mllm(export_folder(cfg.init_from), surgery=surgery, precision=half, keep_lora=keep_lora)
    parts = _assemble(replace(cfg), seed)
    return parts if keep_lora else _merged(parts)


def build_tower(cfg: MllmConfig, seed: int = 0) -> VisionTower:
    """The tower that a config names by `tower`."""
    backbone = load_backbone(cfg.tower, image_size=cfg.image_size or None, seed=seed)
    spec = backbone.image_spec
    fill = tuple(int(255 * mean) for mean in spec.mean)
    backbone.image_spec = replace(spec, resize_mode=cfg.resize, fill=fill)  # type: ignore[arg-type]
    return VisionTower(
        backbone, layers=cfg.tower_layers, grid=cfg.grid, drop_first=cfg.drop_first, norm=cfg.tower_norm
    )


def _assemble(cfg: MllmConfig, seed: int) -> ChatParts:
    tower = build_tower(cfg, seed)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    decoder, tokenizer = load_decoder(cfg.decoder, dtype=dtype, layers=cfg.decoder_layers)
    digest = _digest([*tower.state_dict().values(), *decoder.state_dict().values()])
    with drawn_from(seed):
        projector = Projector(tower.dim, decoder.config.hidden_size).to(dtype)
        if cfg.lora_rank:
            add_lora(decoder.model, cfg.lora_rank)
    module = Mllm(tower.to(dtype), projector, decoder)
    return ChatParts(module, tokenizer, tower.image_spec, cfg, {}, digest)


def _merged(parts: ChatParts) -> ChatParts:
    names = {f"decoder.model.{name}" for name in merge_lora(parts.module.decoder.model)}  # type: ignore[arg-type]
    if not names:
        return parts
    trained = {name for name in parts.trained if ".lora_" not in name} | names
    return replace(parts, config=replace(parts.config, lora_rank=0), trained=trained)


def _digest(tensors: Iterable[Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().float().contiguous().numpy().tobytes())
    return state.hexdigest()


def tower_digest(tower: Any) -> str:
    """sha256 over a `VisionTower`'s weights and what it makes of an image."""
    return hashlib.sha256(f"{tower.taken()} {_digest(tower.state_dict().values())}".encode()).hexdigest()


def load_mllm(
    folder: Path, *, surgery: Surgery | None = None, precision: str = "", keep_lora: bool = False
) -> ChatParts:
    """What `export_mllm` wrote, unless its stock weights are others here, or a project is needed to load it.

    Low-rank updates go into the weights, unless they are kept to be trained on.
    """
    content = read_object(folder / CONFIG, "multimodal model", "name the `export` folder of a run")
    if content.get("format") != _FORMAT:
        raise UserError(f"{folder / CONFIG} is of format {content.get('format')}, this code reads {_FORMAT}")
    try:
        cfg = MllmConfig(**content["model"] | ({"precision": precision} if precision else {}))
        facts, digest = dict(content["facts"]), str(content["base_sha256"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({error}); export the run again") from None
    parts = _assemble(replace(cfg, precision="fp32"), 0)
    if parts.base_digest != digest:
        raise UserError(
            f"{folder} was made with other weights of {cfg.tower} and {cfg.decoder} than this machine has (sha256 "
            f"{parts.base_digest[:12]}..., not {digest[:12]}...); install the same versions"
        )
    rounded = bool(content.get("rounded", False))
    if rounded:
        parts.module.bfloat16().float()
    if surgery is not None:
        surgery(parts.module.decoder, facts)
    elif facts:
        told = "which a plain model has not; load it with its project's command"
        raise UserError(f"{folder} has {', '.join(facts)}, {told}")
    weights = read_safetensors(folder / WEIGHTS)
    if unknown := weights.keys() - parts.module.state_dict().keys():
        told = f"has tensors of another model (first: {min(unknown)}); export the run again"
        raise UserError(f"{folder / WEIGHTS} {told}")
    parts.module.load_state_dict(weights, strict=False)
    parts = replace(
        parts, config=cfg, facts=facts, rounded=rounded, trained=set(weights), project=str(content.get("project", "")),
        template=str(content.get("template", parts.template)),
    )  # fmt: skip
    if not keep_lora:
        parts = _merged(parts)
    if precision == "bf16":
        parts.module.to(torch.bfloat16)
    return parts


def export_folder(model: str) -> Path:
    """The export that a name means: `zoo:NAME`, a run, or its `export` folder."""
    if model.startswith("zoo:"):
        return fetch(model)
    folder = Path(model).expanduser()
    return folder / "export" if (folder / "export" / CONFIG).is_file() else folder


def export_digest(model: str) -> str:
    """sha256 that says which model an export is, without loading it; where its stock parts lie does not matter."""
    folder = export_folder(model)
    content = read_object(folder / CONFIG, "multimodal model", "name the `export` folder of a run")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; export the run again")
    places = ("tower", "decoder", "precision")
    made_of = {name: one for name, one in dict(content.get("model", {})).items() if name not in places}
    facts = [made_of, content.get("facts"), content.get("base_sha256"), content.get("rounded", False)]
    text = f"{json.dumps(facts, sort_keys=True)} {sha256_of(folder / WEIGHTS)}"
    return hashlib.sha256(text.encode()).hexdigest()


def export_mllm(
    folder: Path, parts: ChatParts, weights: Mapping[str, Tensor], *, half: bool = False
) -> Probe:
    """Write the tensors of `weights` that are no longer stock, with `half` in fp16; returns a probe of the whole."""
    training, dtype = parts.module.training, next(parts.module.parameters()).dtype
    parts.rounded |= dtype == torch.bfloat16
    kept = {name: stored(value, half=half) for name, value in weights.items() if name in parts.trained}
    with replacing(folder, [CONFIG]) as partial:
        write_tensors(partial / WEIGHTS, kept, half=half)
        facts = {
            "format": _FORMAT,
            "model": asdict(parts.config),
            "facts": parts.facts,
            "project": parts.project,
            "template": parts.template,
            "base_sha256": parts.base_digest,
            "rounded": parts.rounded,
        }
        write_json(partial / CONFIG, facts)
        write_provenance(partial / WEIGHTS, parts.config.decoder, kept.values(), {})
    whole = {n: kept.get(n, value) for n, value in weights.items() if n in parts.module.state_dict()}
    inputs = probe_inputs(parts)
    before = {name: value.clone() for name, value in parts.module.state_dict().items()}
    try:
        parts.module.float().eval().load_state_dict({name: value.float() for name, value in whole.items()})
        outputs = _outputs(parts.module, inputs)
    finally:
        parts.module.to(dtype).load_state_dict(before)
        parts.module.train(training)
    return Probe(inputs, outputs)


def probe_inputs(parts: ChatParts) -> dict[str, Tensor]:
    places: Any = parts.module.tower.tokens
    row = torch.tensor([3, 4, *[IMAGE_ID] * places, *range(5, 11)])
    ids = torch.stack([row, torch.arange(5, 5 + len(row))])
    images = probe_images(parts.image_spec, 1)
    rows = torch.zeros(1, dtype=torch.long)
    return {"input_ids": ids, "segments": torch.ones_like(ids), "images": images, "image_rows": rows}


@torch.no_grad()
def _outputs(module: Mllm, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": module.head(module(inputs))[:, -4:]}


def check_mllms(written: Mapping[Path, Probe], module: str = "vlmkd.export.mllm") -> None:
    """Reload the folders in a fresh process, by `module`, and compare."""
    verify(module, written)


def reloaded(surgery: Surgery | None, argv: Sequence[str]) -> int:
    return check_main(
        lambda folder, probe: _outputs(load_mllm(folder, surgery=surgery).module.eval(), probe.inputs), argv
    )


if __name__ == "__main__":
    sys.exit(reloaded(None, sys.argv[1:]))
