"""A CLIP as a folder that transformers' CLIPModel reads (`export.py --layout hf`), and its check in a fresh process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.export.clip import MARKS, PROBE_TEXTS, probe_of, write_tokenizer
from vlmkd.export.folder import Probe, check_main, compare, replacing, verify, write_provenance, write_tensors
from vlmkd.files import write_json
from vlmkd.models.checkpoints import normalise_names
from vlmkd.models.clip import ClipModel
from vlmkd.models.convert import to_hf_config, to_hf_processor, to_hf_state


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
