"""The student: dense or sparse, and which of its parameters a stage trains."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from projects.llava_mod.config import SPARSE, LlavaModConfig
from projects.llava_mod.experts import moe_layers, sparse_layers, upcycle
from vlmkd import distributed
from vlmkd.config import require
from vlmkd.export.mllm import ChatParts, build_mllm, reloaded

SPARSE_FACTS = "sparse"


def surgery(decoder: nn.Module, facts: Mapping[str, Any]) -> None:
    """Make the layers sparse that an export says are."""
    if SPARSE_FACTS in facts:
        upcycle(decoder, **facts[SPARSE_FACTS])


def build_student(cfg: LlavaModConfig) -> ChatParts:
    """The student of a run, up-cycled where the config says so; the export before may be sparse already."""
    dense = cfg.moe.mode == "none"  # experts are copies of whole weights
    parts = build_mllm(cfg.student, seed=cfg.seed, surgery=surgery, keep_lora=dense)
    decoder: Any = parts.module.decoder
    sparse = bool(sparse_layers(decoder))
    if cfg.stage == "prefer" and cfg.moe.mode != "none":
        require(sparse, "student.init_from", "is a dense export, but moe.mode says sparse; set moe.mode=none")
    elif cfg.moe.mode != "none":
        told = "is a sparse export already; set moe.mode=none to go on from it"
        require(not sparse, "student.init_from", told)
        layers = moe_layers(cfg.moe.mode, len(decoder.model.layers), cfg.moe.layers)
        facts = {"layers": layers, "experts": cfg.moe.experts, "top_k": cfg.moe.top_k}
        with torch.random.fork_rng(devices=[]):  # the routers depend on the run's seed alone
            torch.manual_seed(cfg.seed)
            upcycle(decoder, **facts)
        parts.facts = parts.facts | {SPARSE_FACTS: facts}
        # No longer stock, trained or not.
        made = tuple(f"decoder.model.layers.{layer}.mlp." for layer in layers)
        parts.trained = parts.trained | {n for n, _ in parts.module.named_parameters() if n.startswith(made)}
    else:
        fits = not sparse or cfg.stage in ("sft", *SPARSE)
        require(fits, "student.init_from", f"is a sparse export; stage {cfg.stage} trains dense students")
    for layer in sparse_layers(decoder):
        layer.second, layer.capacity = cfg.parity.second_expert, cfg.parity.capacity
    train_parts(parts.module.train(), cfg)
    if cfg.deepspeed.activation_checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    trained = {name for name, p in parts.module.named_parameters() if p.requires_grad}
    parts.trained = parts.trained | trained
    if cfg.moe.backend == "deepspeed":
        spread(decoder, cfg.moe.expert_parallel)
    return parts


def spread(decoder: nn.Module, ranks: int) -> None:
    """Share the experts of all sparse layers among so many ranks."""
    layers, field = sparse_layers(decoder), "moe.expert_parallel"
    require(bool(layers), "moe.backend", "is deepspeed, but the student is dense; set moe.mode")
    count, world = len(layers[0].gate.weight), distributed.world_size()
    require(count % ranks == 0, field, f"is {ranks}, which does not divide the {count} experts of a layer")
    require(world % ranks == 0, field, f"is {ranks}, which does not divide the {world} ranks of the run")
    for layer in layers:
        layer.spread(ranks)


def train_parts(module: nn.Module, cfg: LlavaModConfig) -> None:
    """Freeze what the stage does not train (docs/papers/llava_mod.md, trainable parameters)."""
    lora = any(".lora_" in name for name, _ in module.named_parameters())
    for name, parameter in module.named_parameters():
        fixed = lora and name.startswith("decoder.") and ".lora_" not in name
        parameter.requires_grad_(is_trained(name, cfg) and not fixed)


def is_trained(name: str, cfg: LlavaModConfig) -> bool:
    """Whether a parameter of this name trains: the tower never, the projector always; low-rank updates as the decoder."""
    part = name.partition(".")[0]
    if part == "projector":
        return True
    early = cfg.train == "stage" and cfg.stage in ("words", "adapt")
    if part == "tower" or cfg.train == "projector" or early:
        return False
    return cfg.train == "all" or cfg.stage in ("sft", "d2d") or ".mlp." in name


if __name__ == "__main__":
    sys.exit(reloaded(surgery, sys.argv[1:]))
