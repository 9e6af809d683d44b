"""The student: the model before surgery, or the hybrid of a run before, with the chosen layers as Mamba-2."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from projects.matvlm.config import HybridConfig, MatvlmConfig
from projects.matvlm.mixer import Mamba2Mixer
from projects.matvlm.surgery import chosen_layers, mixers_of, to_hybrid
from vlmkd.config import require
from vlmkd.errors import UserError
from vlmkd.export.mllm import ChatParts, build_mllm, reloaded
from vlmkd.train.task import frozen

HYBRID_FACTS = "hybrid"


def surgery(decoder: Any, facts: Mapping[str, Any]) -> None:
    """Make the layers Mamba-2 that an export says are."""
    if HYBRID_FACTS not in facts:
        return
    try:
        options = HybridConfig(**facts[HYBRID_FACTS])
    except TypeError as error:
        raise UserError(f"the export's hybrid layers are damaged ({error}); export the run again") from None
    to_hybrid(decoder, options)


def build_teacher(cfg: MatvlmConfig) -> ChatParts:
    """The frozen model before surgery: `teacher`, or what `student` names."""
    name = "teacher" if cfg.teacher.named else "student"
    parts = build_mllm(getattr(cfg, name), seed=cfg.seed, surgery=surgery)
    advice = "is a hybrid; set teacher.init_from to the model before surgery"
    require(not mixers_of(parts.module), f"{name}.init_from", advice)
    frozen(parts.module)
    return parts


def build_student(cfg: MatvlmConfig, teacher: ChatParts | None) -> ChatParts:
    """The hybrid of a run; `teacher` None: stored. From a hybrid it takes the mixers of the layers that are Mamba-2 in both."""
    parts = build_mllm(cfg.student, seed=cfg.seed, surgery=surgery, keep_lora=True)
    decoder: Any = parts.module.decoder
    original: Any = decoder if teacher is None else teacher.module.decoder
    ours, theirs = ((len(one.model.layers), one.config.hidden_size) for one in (decoder, original))
    if ours != theirs:
        raise UserError(
            f"config field teacher: has {theirs[0]} layers of width {theirs[1]}, the student {ours[0]} of {ours[1]}; the "
            "teacher is the student's model before surgery"
        )
    before = parts.facts.get(HYBRID_FACTS, {})
    require(
        before.get("bias", cfg.hybrid.bias) == cfg.hybrid.bias,
        "hybrid.bias",
        f"is {cfg.hybrid.bias}, and {before.get('bias')} in student.init_from; set it as there",
    )
    returned = restore_attention(decoder, original, chosen_layers(cfg.hybrid, ours[0]))
    to_hybrid(decoder, cfg.hybrid, torch.Generator().manual_seed(cfg.seed))
    facts = {**decoder.config.matvlm, "backend": "auto"}
    if not cfg.dropout:
        drop_nothing(decoder)
    if cfg.deepspeed.activation_checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    train_parts(parts.module.train(), cfg)
    # A projector that stays may have been drawn in this run.
    changed = {name for name, p in parts.module.named_parameters() if p.requires_grad}
    changed |= {name for name, _ in parts.module.named_parameters() if name.startswith("projector.")}
    changed |= {name for name in returned if teacher is not None and name in teacher.trained}
    parts.trained = (parts.trained | changed) & parts.module.state_dict().keys()
    parts.facts = parts.facts | {HYBRID_FACTS: facts}
    return parts


def restore_attention(decoder: Any, original: Any, mamba: Sequence[int]) -> list[str]:
    """Give the layers that are Mamba-2 and not to be, outside `mamba`, the `original`'s attention; its parameters' names."""
    names = []
    for index, layer in enumerate(decoder.model.layers):
        if index in mamba or not isinstance(layer.self_attn, Mamba2Mixer):
            continue
        if original is decoder:
            raise UserError(
                f"config field hybrid: layer {index} becomes attention again, which the teacher has; leave "
                "data.teacher_outputs empty, or replace the layers of student.init_from too"
            )
        layer.self_attn = copy.deepcopy(original.model.layers[index].self_attn)
        kinds = getattr(original.config, "layer_types", None)
        decoder.config.layer_types[index] = kinds[index] if kinds else "full_attention"
        prefix = f"decoder.model.layers.{index}.self_attn"
        names += [f"{prefix}.{name}" for name, _ in layer.self_attn.named_parameters()]
    return names


def drop_nothing(decoder: nn.Module) -> None:
    """Turn dropout off where training would turn it on."""
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def train_parts(module: nn.Module, cfg: MatvlmConfig) -> None:
    """Freeze all but mixers and projector (docs/papers/matvlm.md#from-attention-to-mamba-2)."""
    module.requires_grad_(False)
    for mixer in mixers_of(module).values():
        mixer.requires_grad_(True)
    module.get_submodule("projector").requires_grad_(cfg.train_projector)


if __name__ == "__main__":
    sys.exit(reloaded(surgery, sys.argv[1:]))
