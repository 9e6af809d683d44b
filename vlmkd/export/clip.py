"""Exported CLIPs: a folder that open_clip reads, proved in a fresh process to compute the same."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.export.folder import (
    Probe,
    check_main,
    probe_images,
    replacing,
    verify,
    write_provenance,
    write_tensors,
)
from vlmkd.files import read_object, write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import OPEN_CLIP_CONFIG, ClipModel, load_clip

MARKS = (OPEN_CLIP_CONFIG, "config.json")
"""Configs of folders that an export replaces: of open_clip and of transformers."""
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
_LONG = "two red circles, and a much longer line of words that some models have to cut"
PROBE_TEXTS = ["a photo of a cat", _LONG, ""]


def export_clip(folder: Path, clip: ClipModel, *, half: bool = False) -> None:
    """Write `clip` into `folder` by `replacing`, for open_clip's `local-dir:` (a PrunedCLIP for our load_clip only).

    `half` stores fp16.
    """
    with replacing(folder, MARKS) as partial:
        weights = partial / "open_clip_model.safetensors"
        write_tensors(weights, _write_config(partial, clip), half=half)
        write_provenance(weights, clip.source, clip.module.parameters(), {"half": half})


def _write_config(folder: Path, clip: ClipModel) -> dict[str, Tensor]:
    """Config and tokenizer; returns the weights."""
    config, state = copy.deepcopy(clip.config), clip.module.state_dict()
    config["text_cfg"].pop("hf_tokenizer_name", None)
    if write_tokenizer(folder, clip):
        config["text_cfg"]["hf_tokenizer_name"] = "."  # any name makes open_clip read this folder's files
    if not config.get("nonscalar_logit_scale"):
        state |= {name: state[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in state}
    spec = dataclasses.asdict(clip.image_spec)
    fill = spec.pop("fill")
    preprocess = spec | {"fill_color": fill[0] if len(set(fill)) == 1 else fill}
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": preprocess})
    return state


def write_tokenizer(folder: Path, clip: ClipModel) -> bool:
    """Write the model's own tokenizer files; False when it has open_clip's."""
    from open_clip.tokenizer import HFTokenizer

    inner = getattr(clip.tokenizer, "encode", clip.tokenizer)
    if (own := clip.tokenizer_folder) is not None:
        for name in _TOKENIZER_FILES:
            if (own / name).is_file():
                shutil.copyfile(own / name, folder / name)
    elif isinstance(inner, HFTokenizer):
        inner.save_pretrained(folder)
    return own is not None or isinstance(inner, HFTokenizer)


def verify_export(folder: Path, clip: ClipModel) -> None:
    """Compare embeddings, logit scale, token ids and statistics with those of `folder`, reloaded in a fresh process."""
    verify("vlmkd.export.clip", {folder: probe_of(clip)})


def probe_of(clip: ClipModel) -> Probe:
    module = copy.deepcopy(clip.module).cpu().float().eval()
    images, tokens = probe_images(clip.image_spec), clip.tokenizer(PROBE_TEXTS)
    facts = {"image_spec": dataclasses.asdict(clip.image_spec)}
    return Probe({"images": images, "tokens": tokens}, _outputs(module, images, tokens), facts)


@torch.no_grad()
def _outputs(module: Any, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    return {
        "tokens": tokens,
        "image_embeds": module.encode_image(images, normalize=True),
        "text_embeds": module.encode_text(tokens, normalize=True),
        "logit_scale": module.logit_scale.exp().reshape(1),
    }


def reloaded_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """What the model, read by open_clip (or load_clip, if pruned), makes of a probe's pixels and texts."""
    wanted = ImageSpec(**probe.facts["image_spec"])
    if read_object(folder / OPEN_CLIP_CONFIG, "model config")["model_cfg"].get("pruned"):
        clip = load_clip(f"local-dir:{folder}")
        if clip.image_spec != wanted:
            raise UserError(f"load_clip reads {clip.image_spec} instead of {wanted}")
        return _outputs(clip.module, probe.inputs["images"], clip.tokenizer(PROBE_TEXTS))
    import open_clip  # plain open_clip, which knows nothing of this package

    name = f"local-dir:{folder}"
    model = open_clip.create_model_from_pretrained(name, return_transform=False).eval()
    used = model.visual.preprocess_cfg
    for field in ("mean", "std", "interpolation", "resize_mode"):
        if list(used[field]) != list(right := getattr(wanted, field)):
            raise UserError(f"open_clip reads {field} {used[field]} instead of {right}")
    return _outputs(model, probe.inputs["images"], open_clip.get_tokenizer(name)(PROBE_TEXTS))


if __name__ == "__main__":
    sys.exit(check_main(reloaded_outputs, sys.argv[1:]))
