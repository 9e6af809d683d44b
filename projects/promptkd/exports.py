"""What a teacher's run leaves behind, its prompts: written, read, and checked (`python -m` this module FOLDER PROBE).

The folder has `prompts.safetensors` and `promptkd_teacher.json`, which names the CLIP under the prompts. A student is
exported as every classifier is (vlmkd/export/classifier.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from projects.promptkd.config import ClipConfig
from projects.promptkd.prompts import PromptedCLIP, PromptedEncoder, PromptShape
from vlmkd import __version__
from vlmkd.class_names import fill
from vlmkd.errors import UserError
from vlmkd.export.folder import Probe, check_main, replacing, stored, write_tensors
from vlmkd.files import read_object, write_json
from vlmkd.models.clip import ClipModel, load_clip, weights_digest
from vlmkd.tensor_files import read_safetensors

TEACHER_JSON = "promptkd_teacher.json"
_PROMPTS = "prompts.safetensors"


def clip_digest(clip: ClipModel) -> str:
    return clip.digest or weights_digest(clip.module.state_dict())


def teacher_digest(base: str, prompts: Mapping[str, Tensor]) -> str:
    """Digest of a prompted teacher: of the CLIP under the prompts, and the prompts."""
    return hashlib.sha256(f"{base} {weights_digest(prompts)}".encode()).hexdigest()


@dataclass(frozen=True)
class TeacherFacts:
    clip: ClipConfig
    clip_digest: str
    shape: PromptShape
    template: str
    class_names: list[str]
    """Classes of the training labels."""
    digest: str


def write_teacher(folder: Path, prompts: Mapping[str, Tensor], facts: TeacherFacts) -> None:
    """Write a teacher's prompts (as `PromptedCLIP.prompts`); an older teacher there is replaced."""
    tensors = {name: stored(value) for name, value in prompts.items()}
    with replacing(folder, [TEACHER_JSON]) as partial:
        write_tensors(partial / _PROMPTS, tensors)
        write_json(partial / TEACHER_JSON, {**dataclasses.asdict(facts), "vlmkd": __version__})


def read_teacher(
    folder: Path, clip: ClipConfig | None = None
) -> tuple[PromptedCLIP, ClipModel, TeacherFacts]:
    """The prompted CLIP of a teacher folder, its CLIP and facts; `clip` says where the CLIP is now, when it has moved."""
    content = read_object(folder / TEACHER_JSON, "teacher export")
    content.pop("vlmkd")
    made = {"clip": ClipConfig(**content["clip"]), "shape": PromptShape(**content["shape"])}
    facts = TeacherFacts(**content | made)
    where = clip if clip is not None and clip.model else facts.clip
    base = load_clip(where.model, where.pretrained)
    if clip_digest(base) != facts.clip_digest:
        raise UserError(
            f"teacher {folder}: its prompts belong to other weights than those of {base.source}; name the CLIP that it "
            f"was trained on ({facts.clip.model} {facts.clip.pretrained}) in teacher.clip"
        )
    prompted = PromptedCLIP(base, facts.shape)
    prompted.set_prompts(read_safetensors(folder / _PROMPTS), str(folder / _PROMPTS))
    return prompted.eval(), base, facts


def probe(prompted: PromptedCLIP, clip: ClipModel, template: str, images: Tensor) -> Probe:
    """Pixels, and what a prompted CLIP makes of them and of a text in its template."""
    encoder = PromptedEncoder(prompted, clip, "teacher")
    outputs = {
        "image_embeds": encoder.encode_image(images),
        "text_embeds": encoder.encode_text([fill(template, "cat")]),
    }
    return Probe({"images": images}, outputs)


def reloaded_outputs(folder: Path, asked: Probe) -> dict[str, Tensor]:
    prompted, clip, facts = read_teacher(folder)
    return probe(prompted, clip, facts.template, asked.inputs["images"]).outputs


if __name__ == "__main__":
    sys.exit(check_main(reloaded_outputs, sys.argv[1:]))
