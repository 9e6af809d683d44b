"""Files in the layout of the reference's checkpoints (docs/papers/promptkd.md), made of our modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from projects.promptkd.prompts import PromptedCLIP
from projects.promptkd.student import PromptedStudent
from vlmkd.models.prompted import PromptedImageTower

State = dict[str, Tensor]


def teacher_state(prompted: PromptedCLIP, tokens: Tensor) -> State:
    """The state dict of a teacher in the reference's names and types; `tokens` [C,T] are its training prompts.

    The frozen copy `ZS_image_encoder` is written as the unprompted tower, as the reference has it.
    """
    text = prompted.text
    assert text.start == 1, "the reference puts its prompts behind a start token"
    with torch.no_grad():
        embedded = text.token_embedding(tokens).half()
    state = {
        "prompt_learner.ctx": text.prompts[0].detach().half(),
        "prompt_learner.token_prefix": embedded[:, :1],
        "prompt_learner.token_suffix": embedded[:, 1 + text.length :],
    }
    tower = _half(prompted.image.tower.state_dict())
    state |= {f"prompt_learner.ZS_image_encoder.{name}": value for name, value in tower.items()}
    state |= _image_state(prompted.image)
    own = {
        name: value
        for name, value in text.state_dict().items()
        if name not in ("prompts", "token_embedding.weight")
    }
    state |= {f"text_encoder.{name}": value for name, value in _half(own).items()}
    for block in range(1, text.depth):
        state[f"text_encoder.transformer.resblocks.{block}.VPT_shallow"] = (
            text.prompts[block].detach().float()
        )
    return state | {"logit_scale": prompted.logit_scale.reshape(()).clone()}


def student_state(student: PromptedStudent) -> State:
    """The state dict of a student in the reference's names and types; linear layers become 1 x 1 convolutions."""
    state = _image_state(student.image)
    for name, value in student.projector.state_dict().items():
        value = value[:, :, None, None] if value.ndim == 2 else value
        state["VPT_image_trans.conv1." + name.removeprefix("layers.")] = value.detach().clone()
    return state | {"logit_scale": student.logit_scale.reshape(()).clone()}


def write_checkpoint(path: Path, state: State, epoch: int) -> None:
    """A file with the entries that the reference's loader asks for, without optimiser and scheduler.

    The reference loads it under a torch whose `torch.load` takes whole dictionaries of tensors.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": state, "epoch": epoch, "optimizer": None, "scheduler": None, "val_result": None}
    torch.save(content, path)


def _image_state(image: PromptedImageTower) -> State:
    state = {f"image_encoder.{name}": value for name, value in _half(image.tower.state_dict()).items()}
    if image.prompts is not None:
        state["image_encoder.VPT"] = image.prompts[0].detach().float()
        for block in range(1, image.depth):
            state[f"image_encoder.transformer.resblocks.{block}.VPT_shallow"] = (
                image.prompts[block].detach().float()
            )
    return state


def _half(state: Mapping[str, Tensor]) -> State:
    """Weights as the reference stores them: norms and position tables fp32, convolutions and matrices fp16."""
    exact = ("ln_", "positional_embedding", "class_embedding")
    return {
        name: (value if any(part in name for part in exact) else value.half()).detach().clone()
        for name, value in state.items()
    }
