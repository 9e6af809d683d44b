"""Exported CLIPs: a folder that open_clip or transformers reads, proved in a fresh process to compute the same."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.export.folder import (
    PROVENANCE,
    Probe,
    check_main,
    compare,
    probe_images,
    replacing,
    stored,
    verify,
    write_provenance,
    write_tensors,
)
from vlmkd.files import read_object, write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import normalise_names
from vlmkd.models.clip import OPEN_CLIP_CONFIG, ClipModel, load_clip
from vlmkd.models.convert import to_hf_config, to_hf_processor, to_hf_state

Layout = Literal["open_clip", "hf"]

_WEIGHTS = {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors"}
_CONFIG = {"open_clip": OPEN_CLIP_CONFIG, "hf": "config.json"}
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
_LONG = "two red circles, and a much longer line of words that some models have to cut"
_PROBE_TEXTS = ["a photo of a cat", _LONG, ""]


def export_clip(folder: Path, clip: ClipModel, *, layout: Layout = "open_clip", half: bool = False) -> None:
    """Write `clip` into `folder` by `replacing`.

    Layout `open_clip` is what open_clip's `local-dir:` reads (of a PrunedCLIP, our load_clip only), `hf` what transformers'
    CLIPModel reads. `half` stores fp16.
    """
    with replacing(folder, list(_CONFIG.values())) as partial:
        weights = partial / _WEIGHTS[layout]
        state = _write_open_clip(partial, clip) if layout == "open_clip" else _write_hf(partial, clip, half)
        write_tensors(weights, state, half=half)
        write_provenance(weights, clip.source, clip.module.parameters(), {"half": half})


def _write_open_clip(folder: Path, clip: ClipModel) -> dict[str, Tensor]:
    """Config and tokenizer; returns the weights."""
    config, state = copy.deepcopy(clip.config), clip.module.state_dict()
    config["text_cfg"].pop("hf_tokenizer_name", None)
    if _write_tokenizer(folder, clip):
        config["text_cfg"]["hf_tokenizer_name"] = "."  # any name makes open_clip read this folder's files
    if not config.get("nonscalar_logit_scale"):
        state |= {name: state[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in state}
    spec = dataclasses.asdict(clip.image_spec)
    fill = spec.pop("fill")
    preprocess = spec | {"fill_color": fill[0] if len(set(fill)) == 1 else fill}
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": preprocess})
    return state


def _write_hf(folder: Path, clip: ClipModel, half: bool) -> dict[str, Tensor]:
    """Configs and tokenizer; returns the weights under transformers' names."""
    if clip.config.get("pruned"):
        raise UserError("export: transformers' CLIPModel has no ragged layers; use the open_clip layout")
    config = to_hf_config(clip.config) | {"dtype": "float16" if half else "float32"}
    state = normalise_names(clip.module.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(())
    write_json(folder / "preprocessor_config.json", to_hf_processor(clip.image_spec))
    write_json(folder / _CONFIG["hf"], config)
    if not _write_tokenizer(folder, clip):
        _write_clip_tokenizer(folder, clip.config["text_cfg"].get("context_length", 77))
    return to_hf_state(state)


def _write_tokenizer(folder: Path, clip: ClipModel) -> bool:
    """Write the model's own tokenizer files; False when it has open_clip's."""
    from open_clip.tokenizer import HFTokenizer

    if clip.tokenizer_folder is not None:
        for name in _TOKENIZER_FILES:
            if (clip.tokenizer_folder / name).is_file():
                shutil.copyfile(clip.tokenizer_folder / name, folder / name)
        return True
    inner = getattr(clip.tokenizer, "encode", clip.tokenizer)
    if isinstance(inner, HFTokenizer):
        inner.save_pretrained(folder)
    return isinstance(inner, HFTokenizer)


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


def verify_export(folder: Path, clip: ClipModel) -> None:
    """Compare embeddings, logit scale, token ids and statistics with those of `folder`, reloaded in a fresh process."""
    if read_object(folder / PROVENANCE, "provenance")["half"]:
        clip = clip.with_weights({k: stored(v, half=True) for k, v in clip.module.state_dict().items()})
    verify("vlmkd.export.clip", {folder: probe_of(clip)})


def probe_of(clip: ClipModel) -> Probe:
    module = copy.deepcopy(clip.module).cpu().float().eval()
    images, tokens = probe_images(clip.image_spec), clip.tokenizer(_PROBE_TEXTS)
    facts = {"image_spec": dataclasses.asdict(clip.image_spec)}
    return Probe({"images": images, "tokens": tokens}, _outputs(module, images, tokens), facts)


@torch.no_grad()
def _outputs(module: Any, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Of an open_clip model or PrunedCLIP, or of transformers' CLIPModel."""
    if hasattr(module, "encode_image"):
        embeds = module.encode_image(images, normalize=True), module.encode_text(tokens, normalize=True)
    else:
        output = module(input_ids=tokens, pixel_values=images)
        embeds = output.image_embeds, output.text_embeds
    named = {"image_embeds": embeds[0], "text_embeds": embeds[1]}
    return {"tokens": tokens, **named, "logit_scale": module.logit_scale.exp().reshape(1)}


def reloaded_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """What the model, read by the library that it is for, makes of a probe's pixels and texts."""
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return _transformers_outputs(folder, probe)
    wanted = probe.facts["image_spec"]
    if read_object(folder / OPEN_CLIP_CONFIG, "model config")["model_cfg"].get("pruned"):
        clip = load_clip(f"local-dir:{folder}")
        if dataclasses.asdict(clip.image_spec) != wanted:
            raise UserError(f"load_clip reads {clip.image_spec} instead of {ImageSpec(**wanted)}")
        return _outputs(clip.module, probe.inputs["images"], clip.tokenizer(_PROBE_TEXTS))
    import open_clip  # plain open_clip, which knows nothing of this package

    name = f"local-dir:{folder}"
    model = open_clip.create_model_from_pretrained(name, return_transform=False).eval()
    used = model.visual.preprocess_cfg
    for field in ("mean", "std", "interpolation", "resize_mode"):
        if list(used[field]) != list(wanted[field]):
            raise UserError(f"open_clip reads {field} {used[field]} instead of {wanted[field]}")
    return _outputs(model, probe.inputs["images"], open_clip.get_tokenizer(name)(_PROBE_TEXTS))


def _transformers_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """Outputs through the folder's tokenizer, after those on the probe's token ids were compared.

    Ids are not: transformers pads with the end-of-text id, behind the pooled position.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    images, tokens = probe.inputs["images"], probe.inputs["tokens"]
    texts = [" ".join(text.split()) for text in _PROBE_TEXTS]
    own = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=tokens.shape[1], return_tensors="pt"
    ).input_ids
    if difference := compare(_outputs(model, images, tokens), probe.outputs):
        raise UserError(f"of the same token ids {difference}")
    return _outputs(model, images, own) | {"tokens": tokens}


if __name__ == "__main__":
    sys.exit(check_main(reloaded_outputs, sys.argv[1:]))
