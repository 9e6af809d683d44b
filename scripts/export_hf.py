"""A CLIP as a folder that transformers' CLIPModel reads (`export.py --layout hf`), and its check in a fresh process."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.export.clip import MARKS, PROBE_TEXTS, probe_of, write_tokenizer
from vlmkd.export.folder import Probe, check_main, compare, replacing, verify, write_provenance, write_tensors
from vlmkd.files import write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import normalise_names
from vlmkd.models.clip import ClipModel
from vlmkd.models.convert import ARGMAX_EOS, CLIP_VOCABULARY, SIZES, to_hf_state
from vlmkd.models.pruned_clip import Config

_SAID_OTHERWISE = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "head_width", "mlp_ratio",
    "norm_kwargs", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id",
}  # fmt: skip
"""Fields that CLIPModel has in another form, or that do not change what is computed."""


def export_hf(folder: Path, clip: ClipModel, *, half: bool = False) -> None:
    """Write `clip` into `folder` by `replacing`; `half` stores fp16."""
    with replacing(folder, MARKS) as partial:
        weights = partial / "model.safetensors"
        write_tensors(weights, _write_configs(partial, clip, half), half=half)
        write_provenance(weights, clip.source, clip.module.parameters(), {"half": half})


def _write_configs(folder: Path, clip: ClipModel, half: bool) -> dict[str, Tensor]:
    """Configs and tokenizer; returns the weights under transformers' names."""
    if clip.config.get("pruned"):
        raise UserError("export: transformers' CLIPModel has no ragged layers; use the open_clip layout")
    config = to_hf_config(clip.config) | {"dtype": "float16" if half else "float32"}
    state = normalise_names(clip.module.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(())
    write_json(folder / "preprocessor_config.json", to_hf_processor(clip.image_spec))
    write_json(folder / "config.json", config)
    if not write_tokenizer(folder, clip):
        _write_clip_tokenizer(folder, clip.config["text_cfg"].get("context_length", 77))
    return to_hf_state(state)


def _write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """CLIP's own vocabulary in the files of transformers' CLIPTokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in tokenizer.encoder.items()}
    write_json(folder / "vocab.json", vocabulary)
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    start, end = names.values()
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings | special)


def to_hf_config(config: Mapping[str, Any]) -> Config:
    """The config.json of a CLIPModel that computes what open_clip's `config` computes."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    _refuse_foreign_parts(config)
    defaults: Any = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    towers: list[Config] = []
    for section, sizes in SIZES.items():
        given, default = config[section], defaults[section]
        tower: Config = {theirs: given.get(ours, getattr(default, ours)) for ours, theirs in sizes.items()}
        towers += [tower]
        tower |= {
            "model_type": f"clip_{section.removesuffix('_cfg')}_model",
            "intermediate_size": int(tower["hidden_size"] * given.get("mlp_ratio", 4.0)),
            "layer_norm_eps": (given.get("norm_kwargs") or {}).get("eps", 1e-5),
            "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
            "projection_dim": config["embed_dim"],
        }
    image, text = towers
    image["num_attention_heads"] = image["hidden_size"] // config["vision_cfg"].get("head_width", 64)
    given, vocabulary = config["text_cfg"], text["vocab_size"]
    eos = vocabulary - 1 if vocabulary == CLIP_VOCABULARY else ARGMAX_EOS
    if given.get("pool_type") == "eos":
        eos = given.get("eos_id", ARGMAX_EOS)
    ids = {"bos": max(vocabulary - 2, 0), "eos": eos, "pad": given.get("pad_id", 0)}
    text |= {f"{name}_token_id": number for name, number in ids.items()}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "vision_config": image,
        "text_config": text,
    }


def _refuse_foreign_parts(config: Mapping[str, Any]) -> None:
    """Refuse what differs from open_clip's defaults in a field that CLIPModel has no place for."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    told, image = "model config: transformers' CLIPModel", config["vision_cfg"]
    if isinstance(image.get("layers"), (list, tuple)):
        raise UserError(f"{told} has no ResNet tower; export to open_clip")
    if not isinstance(image.get("image_size", 224), int):
        raise UserError(f"{told} needs a square image_size; export to open_clip")
    kinds: Any = {"": None, "vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    defaults: Config = {"block_type": "default"}
    for section, kind in kinds.items():
        given = config[section] if section else config
        defaults |= {item.name: item.default for item in dataclasses.fields(kind)} if kind else {}
        known = _SAID_OTHERWISE | SIZES.get(section, {}).keys()
        for field, value in given.items():
            allowed = (False, None, defaults.get(field))
            if field not in known and value not in allowed and (field, value) != ("pool_type", "eos"):
                name = f"{section}.{field}".lstrip(".")
                raise UserError(f"{told} cannot have {name}={value!r}; export to open_clip")


def to_hf_processor(spec: ImageSpec) -> Config:
    """The preprocessor_config.json of a CLIPImageProcessor."""
    height, width = spec.size
    if spec.resize_mode == "longest":
        raise UserError("image spec: transformers cannot pad (resize_mode longest); export to open_clip")
    squash = spec.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        "resample": Image.Resampling[spec.interpolation.upper()].value,
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def verify_hf(folder: Path, clip: ClipModel) -> None:
    """As `vlmkd.export.clip.verify_export`; statistics and token ids are not compared."""
    verify("scripts.export_hf", {folder: probe_of(clip)})


def reloaded_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """Outputs through the folder's tokenizer, after those on the probe's token ids were compared.

    Ids are not: transformers pads with the end-of-text id, behind the pooled position.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    images, tokens = probe.inputs["images"], probe.inputs["tokens"]
    texts = [" ".join(text.split()) for text in PROBE_TEXTS]
    own = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=tokens.shape[1], return_tensors="pt"
    ).input_ids
    if difference := compare(_outputs(model, images, tokens), probe.outputs):
        raise UserError(f"of the same token ids {difference}")
    return _outputs(model, images, own) | {"tokens": tokens}


@torch.no_grad()
def _outputs(model: Any, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    output = model(input_ids=tokens, pixel_values=images)
    embeds = {"image_embeds": output.image_embeds, "text_embeds": output.text_embeds}
    return {"tokens": tokens, **embeds, "logit_scale": model.logit_scale.exp().reshape(1)}


if __name__ == "__main__":
    sys.exit(check_main(reloaded_outputs, sys.argv[1:]))
