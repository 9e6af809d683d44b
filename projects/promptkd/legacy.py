"""The published checkpoints of PromptKD and PromptSRC: read without running their code.

Such a file is a torch.save'd dictionary with `state_dict`, `epoch`, `optimizer`, `scheduler` and `val_result`, whose
`scheduler` embeds live Python objects. Only tensors and plain containers are made from it here; every other class that
the file names becomes an empty dictionary, and then only `state_dict` is kept. Its keys:
docs/papers/promptkd.md#checkpoints.

Letters: J prompted blocks, n prompts a block, w width of a tower, T token positions, C classes of the file's training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from projects.promptkd.config import Setting
from projects.promptkd.prompts import PromptedCLIP, PromptShape
from projects.promptkd.student import PromptedStudent
from vlmkd.errors import UserError
from vlmkd.files import read_text
from vlmkd.models.clip import ClipModel
from vlmkd.tensor_files import read_torch

State = dict[str, Tensor]

_IGNORED = (
    "prompt_learner.ZS_image_encoder.",  # the frozen CLIP beside the prompted one
    "prompt_learner.token_prefix",  # embeddings of the training classes' prompts, made anew from class names
    "prompt_learner.token_suffix",
)
_PROJECTOR = "VPT_image_trans.conv1."
_FOLDERS = {
    "imagenet": ("imagenet",),
    "caltech101": ("caltech101",),
    "oxford_pets": ("oxfordpets",),
    "stanford_cars": ("stanfordcars", "standfordcars"),  # the second spelling is the reference README's
    "oxford_flowers": ("oxfordflowers",),
    "food101": ("food101",),
    "fgvc_aircraft": ("fgvcaircraft",),
    "sun397": ("sun397",),
    "dtd": ("describabletextures",),
    "eurosat": ("eurosat",),
    "ucf101": ("ucf101",),
}
"""Folder names of the published base-to-novel teachers, without case and punctuation, by data set."""
_CROSS_FOLDER = "imagenetxd"
"""That of the teacher of all of ImageNet's classes, from which the students of the other two settings learn."""


# -------------------------------------------------------------------------------------------------- reading a file


def read_checkpoint(path: Path) -> State:
    """The `state_dict` of a published file, floats as fp32, without the prefix that DataParallel puts before names.

    Raises:
        UserError: no such file, another format, a damaged file, or one without a state dict of tensors.
    """
    content = read_torch(path, what="checkpoint", inert=True)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"checkpoint {path} has no state_dict; name a file that the reference code wrote")
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"checkpoint {path}: {odd[0]} is no tensor that can be read here")
    wrapped = all(str(name).startswith("module.") for name in state)
    return {
        str(name).removeprefix("module.") if wrapped else str(name): value.float()
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }


def find_teacher(folder: Path, dataset: str, setting: Setting) -> Path:
    """The published teacher below `folder`, whose sub-folders have the reference's names in any case.

    Base-to-novel has a teacher for each data set, the other settings one of all of ImageNet's classes for all sets. The file may have any name: where there are several, the text file `checkpoint` beside them says which.

    Raises:
        UserError: no folder for this data set, no file in it, or several without a `checkpoint`.
    """
    across = setting != "base_to_novel"
    wanted = (_CROSS_FOLDER,) if across else _FOLDERS.get(dataset)
    if wanted is None:
        raise UserError(f"no published teacher is named after {dataset}; give its file instead of {folder}")
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
    """Whether a state dict is a prompted teacher's or a student's.

    Raises:
        UserError: neither.
    """
    if "prompt_learner.ctx" in state:
        return "teacher"
    if any(name.startswith(_PROJECTOR) for name in state):
        return "student"
    raise UserError(
        f"checkpoint {origin} has neither prompt_learner.ctx (a teacher) nor {_PROJECTOR}* (a student)"
    )


# ------------------------------------------------------------------------------------------------- into our modules


def load_teacher(state: State, clip: ClipModel, origin: str) -> tuple[PromptedCLIP, ClipModel]:
    """The prompted CLIP of a teacher's state dict, and the CLIP it stands on.

    Backbone weights are the file's, which drifted a little from the published CLIP's; the token table, which the file
    lacks, is that of `clip`. Depth and number of prompts are read from the file.

    Raises:
        UserError: missing prompts, names that nothing here knows, another architecture.
    """
    image, text = _split(state, "image_encoder."), _split(state, "text_encoder.")
    rest = [
        name
        for name in state
        if not name.startswith(("image_encoder.", "text_encoder.", *_IGNORED))
        and name not in ("prompt_learner.ctx", "logit_scale")
    ]
    _refuse_unknown(rest, origin)
    image_prompts = _take_prompts(image, image.pop("VPT", None), f"{origin}: image_encoder.VPT")
    text_prompts = _take_prompts(text, state.get("prompt_learner.ctx"), f"{origin}: prompt_learner.ctx")
    if text_prompts is None:
        raise UserError(f"{origin}: prompt_learner.ctx is missing, and with it the text prompts")
    shape = PromptShape(
        image_depth=0 if image_prompts is None else len(image_prompts),
        image_length=0 if image_prompts is None else image_prompts.shape[1],
        text_depth=len(text_prompts),
        text_length=text_prompts.shape[1],
    )
    backbone = {f"visual.{name}": value for name, value in image.items()}
    backbone |= text | {"logit_scale": _required(state, "logit_scale", origin)}
    own: dict[str, Tensor] = clip.module.state_dict()
    for name in ("token_embedding.weight", "text.token_embedding.weight"):
        if name in own:
            backbone["token_embedding.weight"] = own[name]
    stands_on = replace(clip, source=origin).with_weights(backbone)
    prompted = PromptedCLIP(stands_on, shape)
    given = {} if image_prompts is None else {"image": image_prompts}
    prompted.set_prompts(given | {"text": text_prompts}, origin)
    return prompted, stands_on


def load_student(state: State, clip: ClipModel, origin: str) -> PromptedStudent:
    """The student of a state dict on the architecture of `clip`, whose image weights are replaced by the file's.

    Raises:
        UserError: missing prompts, names that nothing here knows, another architecture or projector.
    """
    image = _split(state, "image_encoder.")
    rest = [
        name
        for name in state
        if not name.startswith(("image_encoder.", _PROJECTOR)) and name not in ("logit_scale",)
    ]
    _refuse_unknown(rest, origin)
    prompts = _take_prompts(image, image.pop("VPT", None), f"{origin}: image_encoder.VPT")
    projector = {f"layers.{name}": value for name, value in _split(state, _PROJECTOR).items()}
    projector = {name: value.flatten(1) if value.ndim == 4 else value for name, value in projector.items()}
    weights = dict(clip.module.state_dict()) | {f"visual.{name}": value for name, value in image.items()}
    weights["logit_scale"] = _required(state, "logit_scale", origin)
    missing = [name for name in clip.module.visual.state_dict() if name not in image]  # type: ignore[union-attr]
    if missing:
        raise UserError(f"{origin}: {len(missing)} tensors are missing, first image_encoder.{missing[0]}")
    last = _required(projector, "layers.3.weight", f"{origin}: {_PROJECTOR}*")
    student = PromptedStudent(
        replace(clip, source=origin).with_weights(weights),
        last.shape[0],
        depth=0 if prompts is None else len(prompts),
        length=0 if prompts is None else prompts.shape[1],
    )
    wanted = {name: list(value.shape) for name, value in student.projector.state_dict().items()}
    given = {name: list(value.shape) for name, value in projector.items()}
    if wanted != given:
        differing = sorted(
            name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)
        )
        raise UserError(
            f"{origin}: projector tensor {_PROJECTOR}{differing[0].removeprefix('layers.')} is missing, unknown or of "
            f"another size than this CLIP's ({given.get(differing[0])} instead of {wanted.get(differing[0])})"
        )
    student.projector.load_state_dict(projector)
    if prompts is not None and student.image.prompts is not None:
        with torch.no_grad():
            student.image.prompts.copy_(prompts)
    return student.eval()


def _split(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _required(state: Mapping[str, Tensor], name: str, origin: str) -> Tensor:
    if name not in state:
        raise UserError(f"{origin}: {name} is missing")
    return state[name]


def _refuse_unknown(names: Sequence[str], origin: str) -> None:
    if names:
        raise UserError(
            f"{origin}: {len(names)} unknown tensors, first {names[0]}; it is no PromptKD checkpoint"
        )


def _take_prompts(tower: State, first: Tensor | None, where: str) -> Tensor | None:
    """Prompts [J,n,w] of a tower, taken out of it: `first` of block 0, `VPT_shallow` of the blocks 1 to J - 1."""
    pattern = re.compile(r"transformer\.resblocks\.(\d+)\.VPT_shallow")
    deeper = {int(match[1]): tower.pop(name) for name in list(tower) if (match := pattern.fullmatch(name))}
    if first is None:
        if deeper:
            raise UserError(f"{where} is missing, but deeper blocks have prompts")
        return None
    for block in range(1, max(deeper, default=0) + 1):
        if block not in deeper:
            raise UserError(f"{where}: the prompts of block {block} are missing, but deeper blocks have some")
        if deeper[block].shape != first.shape:
            raise UserError(
                f"{where} is {list(first.shape)}, but block {block} has prompts {list(deeper[block].shape)}"
            )
    return torch.stack([first, *(deeper[block] for block in sorted(deeper))])
