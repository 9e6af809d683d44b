"""The published checkpoints of PromptKD and PromptSRC: read without running their code.

Their `scheduler` embeds live Python objects. Only tensors and plain containers are made from such a file, every other
class becomes an empty dictionary, and only `state_dict` is kept: docs/papers/promptkd.md#checkpoints.

Letters: J prompted blocks, n prompts a block, w width of a tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from projects.promptkd.config import Setting
from projects.promptkd.prompts import PromptedCLIP, PromptShape
from projects.promptkd.student import PromptedStudent
from vlmkd.errors import UserError
from vlmkd.files import read_text
from vlmkd.models.checkpoints import differences
from vlmkd.models.clip import ClipModel
from vlmkd.tensor_files import read_torch

State = dict[str, Tensor]

_IGNORED = (
    "prompt_learner.ZS_image_encoder.",  # the frozen CLIP beside the prompted one
    "prompt_learner.token_prefix",  # embeddings of the training classes' prompts, made anew from class names
    "prompt_learner.token_suffix",
)
_PROJECTOR = "VPT_image_trans.conv1."
_SETS = ("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft",
         "sun397", "dtd", "eurosat", "ucf101")  # fmt: skip
"""Sets with a published base-to-novel teacher, in a folder of this name without case and punctuation, but for:"""
_FOLDERS = {
    "dtd": ("describabletextures",),
    "stanford_cars": ("stanfordcars", "standfordcars"),  # the second spelling is the reference README's
}
_CROSS_FOLDER = "imagenetxd"
"""That of the teacher of all of ImageNet's classes, which the other two settings use."""


def read_checkpoint(path: Path) -> State:
    """The `state_dict` of a published file, floats as fp32, without DataParallel's prefix."""
    content = read_torch(path, what="checkpoint", inert=True)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"checkpoint {path} has no state_dict; name a file that the reference code wrote")
    if odd := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"checkpoint {path}: {odd[0]} is no tensor that can be read here")
    prefix = "module." if all(str(name).startswith("module.") for name in state) else ""
    return {
        str(name).removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def find_teacher(folder: Path, dataset: str, setting: Setting) -> Path:
    """The published teacher below `folder`, with the reference's sub-folders in any case.

    Base-to-novel has a teacher for each data set, the other settings one of all of ImageNet's classes. The file may have
    any name: where there are several, the text file `checkpoint` beside them says which.
    """
    across = setting != "base_to_novel"
    wanted = (_CROSS_FOLDER,) if across else _FOLDERS.get(dataset, (dataset.replace("_", ""),))
    if not across and dataset not in _SETS:
        raise UserError(f"no published teacher is named after {dataset}; give a file instead of {folder}")
    places = [
        place
        for place in sorted(folder.iterdir())
        if place.is_dir() and re.sub(r"[^a-z0-9]", "", place.name.lower()) in wanted
    ]
    files = [file for place in places for file in sorted(place.rglob("*.pth.tar*"))]
    if len(files) > 1:
        pointers = [pointer for place in places for pointer in place.rglob("checkpoint")]
        named = [pointer.parent / read_text(pointer, "checkpoint pointer").strip() for pointer in pointers]
        files = [file for file in files if file in named] or files
    if len(files) != 1:
        found = ", ".join(str(file) for file in files) or "nothing"
        whose = f"all of ImageNet's classes (for {setting})" if across else dataset
        raise UserError(f"teacher of {whose} below {folder}: found {found}; name one checkpoint file")
    return files[0]


def kind_of(state: Mapping[str, Tensor], origin: str) -> Literal["teacher", "student"]:
    """Whether a state dict is a prompted teacher's or a student's; raises UserError where it is neither."""
    if "prompt_learner.ctx" in state:
        return "teacher"
    if any(name.startswith(_PROJECTOR) for name in state):
        return "student"
    raise UserError(
        f"checkpoint {origin} has neither prompt_learner.ctx (a teacher) nor {_PROJECTOR}* (a student)"
    )


def load_teacher(state: State, clip: ClipModel, origin: str) -> tuple[PromptedCLIP, ClipModel]:
    """The prompted CLIP of a teacher's state dict, and the CLIP it stands on.

    Backbone weights are the file's, which drifted a little from the published CLIP's; the token table, which the file
    lacks, is that of `clip`. Depth and number of prompts are read from the file.
    """
    _refuse_unknown(state, ("image_encoder.", "text_encoder.", *_IGNORED), origin)
    image, text = _split(state, "image_encoder."), _split(state, "text_encoder.")
    prompts = {
        "image": _take_prompts(image, image.pop("VPT", None), f"{origin}: image_encoder.VPT"),
        "text": _take_prompts(text, state.get("prompt_learner.ctx"), f"{origin}: prompt_learner.ctx"),
    }
    given = {name: value for name, value in prompts.items() if value is not None}
    if "text" not in given:
        raise UserError(f"{origin}: prompt_learner.ctx is missing, and with it the text prompts")
    (image_depth, image_length), (text_depth, text_length) = map(_shape, prompts.values())
    backbone = {f"visual.{name}": value for name, value in image.items()}
    backbone |= text | {"logit_scale": _required(state, "logit_scale", origin)}
    table = {
        name.removeprefix("text."): value
        for name, value in clip.module.state_dict().items()
        if name.endswith("token_embedding.weight")
    }
    stands_on = replace(clip, source=origin).with_weights(backbone | table)
    shape = PromptShape(
        image_depth=image_depth, image_length=image_length, text_depth=text_depth, text_length=text_length
    )
    prompted = PromptedCLIP(stands_on, shape)
    prompted.set_prompts(given, origin)
    return prompted, stands_on


def load_student(state: State, clip: ClipModel, origin: str) -> PromptedStudent:
    """The student of a state dict on the architecture of `clip`, with the file's image weights."""
    _refuse_unknown(state, ("image_encoder.", _PROJECTOR), origin)
    image = _split(state, "image_encoder.")
    prompts = _take_prompts(image, image.pop("VPT", None), f"{origin}: image_encoder.VPT")
    projector = {
        f"layers.{name}": value.flatten(1) if value.ndim == 4 else value
        for name, value in _split(state, _PROJECTOR).items()
    }
    model: Any = clip.module
    _refuse_differences(model.visual.state_dict(), image, f"{origin}: image_encoder")
    weights = model.state_dict() | {f"visual.{name}": value for name, value in image.items()}
    weights["logit_scale"] = _required(state, "logit_scale", origin)
    last = _required(projector, "layers.3.weight", f"{origin}: {_PROJECTOR}*")
    depth, length = _shape(prompts)
    base = replace(clip, source=origin).with_weights(weights)
    student = PromptedStudent(base, last.shape[0], depth=depth, length=length)
    _refuse_differences(student.projector.state_dict(), projector, f"{origin}: {_PROJECTOR}*")
    student.projector.load_state_dict(projector)
    if prompts is not None and student.image.prompts is not None:
        student.image.prompts.data.copy_(prompts)
    return student.eval()


def _split(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _required(state: Mapping[str, Tensor], name: str, origin: str) -> Tensor:
    if name not in state:
        raise UserError(f"{origin}: {name} is missing")
    return state[name]


def _refuse_unknown(state: State, known: tuple[str, ...], origin: str) -> None:
    known_names = ("prompt_learner.ctx", "logit_scale")
    if unknown := [name for name in state if not name.startswith(known) and name not in known_names]:
        raise UserError(
            f"{origin}: {len(unknown)} unknown tensors, first {unknown[0]}; it is no PromptKD checkpoint"
        )


def _refuse_differences(wanted: State, given: State, origin: str) -> None:
    if problems := differences(wanted, given):
        raise UserError(f"{origin} is of another architecture: {problems}; name the CLIP that it was made of")


def _shape(prompts: Tensor | None) -> tuple[int, int]:
    return (0, 0) if prompts is None else (prompts.shape[0], prompts.shape[1])


def _take_prompts(tower: State, first: Tensor | None, where: str) -> Tensor | None:
    """Prompts [J,n,w] of a tower, taken out of it: `first` of block 0, `VPT_shallow` of the blocks 1 to J - 1."""
    pattern = re.compile(r"transformer\.resblocks\.(\d+)\.VPT_shallow")
    found = {int(match[1]): tower.pop(name) for name in list(tower) if (match := pattern.fullmatch(name))}
    if first is not None:
        found[0] = first
    for block in range(len(found)):
        if block not in found:
            raise UserError(f"{where} of block {block} is missing, but deeper blocks have prompts")
        if found[block].shape != found[0].shape:
            shapes = f"{list(found[0].shape)}, but block {block} has prompts {list(found[block].shape)}"
            raise UserError(f"{where} is {shapes}")
    return torch.stack([found[block] for block in sorted(found)]) if found else None
