"""Models in other code's layouts and back: LLaVA-MoD's, LLaVA's, MoE-LLaVA's, and transformers' Qwen2-MoE.

    python -m projects.llava_mod.convert SOURCE OUT --to LAYOUT [--decoder hf:FOLDER] [--tower NAME]

SOURCE is a run's export, or a folder whose config.json alone says what it is. `qwen2_moe` is the language model, its
projector a file beside it. `ours` stands on stock weights of tower and decoder. See docs/papers/llava_mod.md#checkpoints.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch

from projects.llava_mod.layouts import (
    HEAD,
    LAYOUTS,
    MOD,
    PROJECTOR,
    TOWER,
    UNUSED,
    State,
    Whole,
    allow,
    from_layout,
    plain_config,
    to_layout,
)
from projects.llava_mod.student import SPARSE_FACTS, surgery
from vlmkd.chat_config import MllmConfig
from vlmkd.errors import UserError, run_tool
from vlmkd.export.folder import replacing, write_tensors
from vlmkd.export.mllm import CONFIG, ChatParts, build_mllm, export_mllm
from vlmkd.files import read_object, write_json
from vlmkd.models.checkpoints import differences
from vlmkd.tensor_files import read_torch


def read_folder(folder: Path) -> tuple[Whole, Callable[[Path], object]]:
    """A model, and what writes its tokenizer's files into a folder."""
    if (folder / CONFIG).is_file():
        parts = build_mllm(MllmConfig(init_from=str(folder)), surgery=surgery)
        config, layers = plain_config(parts.module.decoder.config), parts.config.tower_layers
        _check_tower(parts)
        left = {UNUSED, HEAD} if config["tie_word_embeddings"] else {UNUSED}
        state = {name: value for name, value in parts.module.state_dict().items() if name not in left}
        whole = Whole(state, config, parts.facts.get(SPARSE_FACTS, {}), parts.config.tower, layers[0])
        return whole, parts.tokenizer.save_pretrained
    config = read_object(folder / "config.json", "model", "name an export, or a folder with config.json")
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    state: State = {}
    for file in [*files, *sorted(folder.glob("mm_projector.*"))]:
        state |= read_torch(file)
    names = "tokenizer|vocab|merges|special_|added_"
    words = [file for file in folder.iterdir() if re.match(names, file.name)]
    return from_layout(state, config), lambda out: [shutil.copy(file, out) for file in words]


def _check_tower(parts: ChatParts) -> None:
    """Refuse settings of the tower that no other layout can say."""
    cfg, tower = parts.config, copy(parts.module.tower)
    tower.grid = 0  # type: ignore[assignment]
    whole = tower(torch.zeros(1, 3, *parts.image_spec.size)).shape[1] == tower.tokens
    for fits, only in (
        (len(cfg.tower_layers) == 1, "one of tower_layers"),
        (whole, "grid=0 or the tower's own"),
        (not cfg.tower_norm, "tower_norm=false"),
        (not cfg.drop_first, "drop_first=false"),
        (cfg.resize == "longest", "resize=longest"),
    ):
        allow(fits, "ours", f"goes elsewhere with {only} only")


def write_folder(folder: Path, whole: Whole, layout: str, tokenizer: Callable[[Path], object]) -> None:
    """Weights, config.json and the tokenizer."""
    state, config = to_layout(whole, layout)
    beside = {n: v for n, v in state.items() if layout == "qwen2_moe" and n.startswith(MOD[0])}
    with replacing(folder, ["config.json"]) as partial:
        write_tensors(partial / "model.safetensors", {n: v for n, v in state.items() if n not in beside})
        if beside:
            write_tensors(partial / "mm_projector.safetensors", beside)
        write_json(partial / "config.json", config)
        tokenizer(partial)


def write_ours(folder: Path, whole: Whole, tower: str, decoder: str) -> None:
    """An export: the tensors that differ from the stock weights of `tower` and `decoder`."""
    cfg = MllmConfig(tower=tower or whole.tower, decoder=decoder, tower_layers=[whole.tower_layer])
    parts = build_mllm(cfg)
    module: Any = parts.module
    own, stock = plain_config(module.decoder.config), {n: v.clone() for n, v in module.state_dict().items()}
    other = [n for n in own if whole.decoder.get(n, own[n]) != own[n] and not n.endswith(("_id", "_cache"))]
    if other:
        said = ", ".join(f"{name} {own[name]} instead of {whole.decoder[name]}" for name in other)
        raise UserError(f"decoder {decoder} is of another architecture: {said}")
    parts.facts = {SPARSE_FACTS: whole.sparse} if whole.sparse else {}
    surgery(module.decoder, parts.facts)
    left = (UNUSED, *([HEAD] if own["tie_word_embeddings"] else []))
    if not any(name.startswith(TOWER) for name in whole.weights):
        left += tuple(name for name in stock if name.startswith(TOWER))
    wanted = {name: value for name, value in module.state_dict().items() if name not in left}
    if problems := differences(wanted, whole.weights):
        raise UserError(f"tower {cfg.tower} and decoder {decoder} do not fit the weights: {problems}")
    module.load_state_dict(whole.weights, strict=False)
    trained = {n for n, v in whole.weights.items() if n not in stock or not torch.equal(v.float(), stock[n])}
    parts.trained = trained | {name for name in stock if name.startswith(PROJECTOR)}
    export_mllm(folder, parts, module.state_dict())


def main(argv: list[str]) -> int:
    """Parse arguments and convert; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path)
    add("out", type=Path)
    add("--to", choices=["ours", *LAYOUTS], required=True)
    add("--decoder", default="", help="stock decoder of `ours`, as hf:FOLDER_OR_NAME")
    add("--tower", default="", help="stock tower of `ours`; else what config.json names")
    args = parser.parse_args(argv)
    if args.to == "ours" and not args.decoder:
        raise UserError("--to ours needs --decoder, e.g. --decoder hf:Qwen/Qwen2-0.5B")
    whole, tokenizer = read_folder(args.source)
    if args.to == "ours":
        write_ours(args.out, whole, args.tower, args.decoder)
    else:
        write_folder(args.out, whole, args.to, tokenizer)
    print(f"wrote {args.out}: {args.to}, {'sparse' if whole.sparse else 'dense'}")
    return 0


if __name__ == "__main__":
    run_tool(main)
