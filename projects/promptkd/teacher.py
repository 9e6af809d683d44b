"""The teacher of stage 2, from whatever its user names, and its class vectors; what a run of stage 1 leaves behind.

That is a folder of `prompts.safetensors` and `promptkd_teacher.json`, which names the CLIP under the prompts; this module,
run with FOLDER and PROBE, checks it. A student is exported as every classifier is (vlmkd/export/classifier.py).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.promptkd import legacy
from projects.promptkd.config import TRAINING_TEMPLATE, ClipConfig, Setting, TeacherSource
from projects.promptkd.precision import encode
from projects.promptkd.prompts import PromptedCLIP, PromptedEncoder, PromptShape, with_room
from vlmkd import __version__
from vlmkd.class_names import fill
from vlmkd.data.labelled import LabelledSet
from vlmkd.errors import UserError
from vlmkd.evaluation.classify import ZeroShotClassifier
from vlmkd.export.folder import Probe, check_main, probe_images, replacing, write_tensors
from vlmkd.files import read_object, write_json
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.models.clip import ClipModel, load_clip, weights_digest
from vlmkd.models.towers import ClipPredictor, convert_images
from vlmkd.tensor_files import read_safetensors
from vlmkd.train.task import frozen
from vlmkd.zoo import weights_file

TEACHER_JSON = "promptkd_teacher.json"
_PROMPTS = "prompts.safetensors"
TEXT_BATCH = 64
"""Class prompts of one forward pass, the same wherever class vectors are made, so that they are equal to the bit."""


@dataclass
class Teacher:
    """A CLIP with its learned prompts, or without any."""

    clip: ClipModel
    prompted: PromptedCLIP | None
    template: str
    """The prompt that the learned vectors belong to."""
    digest: str
    source: str

    @property
    def module(self) -> nn.Module:
        return self.clip.module if self.prompted is None else self.prompted

    def encoder(self) -> ClipPredictor | PromptedEncoder:
        if self.prompted is None:
            return ClipPredictor.of(self.clip, self.source)
        return PromptedEncoder(self.prompted, self.clip, self.source)

    def class_vectors(self, dataset: LabelledSet) -> ClassVectors:
        """Unit vectors [C,D] of all classes: by the trained prompts, or a plain CLIP's over the set's templates."""
        encoder, names = self.encoder(), dataset.class_names
        templates = dataset.templates if self.prompted is None else [self.template]
        return encode_classes(encoder, names, templates, teacher_digest=self.digest, batch_size=TEXT_BATCH)

    def classifier(self, dataset: LabelledSet) -> ZeroShotClassifier:
        """The teacher as an ImageClassifier of the classes of `dataset`."""
        return ZeroShotClassifier(self.encoder(), self.class_vectors(dataset))

    def probe(self, images: Tensor) -> Probe:
        """Pixels, and what the teacher makes of them and of a text in its template."""
        encoder = self.encoder()
        text = encoder.encode_text([fill(self.template, "cat")])
        return Probe({"images": images}, {"image_embeds": encoder.encode_image(images), "text_embeds": text})


def load_teacher(source: TeacherSource, dataset: str, setting: Setting) -> Teacher:
    """The teacher that a config names; in a folder of published teachers that of `dataset` and `setting`."""
    named = source.clip
    if not source.prompts:
        clip = load_clip(named.model, named.pretrained)
        return Teacher(clip, None, TRAINING_TEMPLATE, _clip_digest(clip), clip.source)
    path = weights_file(source.prompts)
    if (path / TEACHER_JSON).is_file():
        return read_export(path, named)
    if path.is_dir():
        path = legacy.find_teacher(path, dataset, setting)
    if not named.model:
        raise UserError(
            f"teacher {path} is a published checkpoint; name its CLIP, e.g. teacher.clip.model=ViT-L-14-quickgelu "
            "teacher.clip.pretrained=openai"
        )
    state = legacy.read_checkpoint(path)
    if legacy.kind_of(state, str(path)) != "teacher":
        raise UserError(f"{path} is a student; name a teacher's checkpoint in teacher.prompts")
    prompted, clip = legacy.load_teacher(state, load_clip(named.model, named.pretrained), str(path))
    digest = _digest(_clip_digest(clip), prompted.prompts())
    template = with_room(clip.tokenizer, TRAINING_TEMPLATE, prompted.shape.text_length)
    return Teacher(clip, prompted, template, digest, str(path))


def export_teacher(folder: Path, teacher: Teacher, clip: ClipConfig, class_names: list[str]) -> Probe:
    """Write a teacher's prompts, where its CLIP is, and the classes of its labels; returns a probe of it."""
    assert teacher.prompted is not None
    prompts, base = teacher.prompted.prompts(), _clip_digest(teacher.clip)
    facts = {
        "clip": asdict(clip),
        "clip_digest": base,
        "shape": asdict(teacher.prompted.shape),
        "template": teacher.template,
        "class_names": class_names,
        "digest": _digest(base, prompts),
        "vlmkd": __version__,
    }
    with replacing(folder, [TEACHER_JSON]) as partial:
        write_tensors(partial / _PROMPTS, prompts)
        write_json(partial / TEACHER_JSON, facts)
    return teacher.probe(probe_images(teacher.clip.image_spec))


def read_export(folder: Path, clip: ClipConfig) -> Teacher:
    """The teacher in a folder of `export_teacher`; `clip` says where its CLIP is now, when it has moved."""
    facts = read_object(folder / TEACHER_JSON, "teacher export")
    named = clip if clip.model else ClipConfig(**facts["clip"])
    base = load_clip(named.model, named.pretrained)
    if _clip_digest(base) != facts["clip_digest"]:
        raise UserError(
            f"teacher {folder}: its prompts belong to other weights than those of {base.source}; name the CLIP that it "
            f"was trained on ({' '.join(facts['clip'].values())}) in teacher.clip"
        )
    prompted = PromptedCLIP(base, PromptShape(**facts["shape"]))
    prompted.set_prompts(read_safetensors(folder / _PROMPTS), str(folder / _PROMPTS))
    return Teacher(base, prompted.eval(), facts["template"], facts["digest"], str(folder))


def _clip_digest(clip: ClipModel) -> str:
    return clip.digest or weights_digest(clip.module.state_dict())


def _digest(base: str, prompts: Mapping[str, Tensor]) -> str:
    """Of the CLIP under the prompts, and the prompts."""
    return hashlib.sha256(f"{base} {weights_digest(prompts)}".encode()).hexdigest()


class ImageTeacher(nn.Module):
    """The teacher's image tower, for images in the student's statistics or its own."""

    def __init__(self, teacher: Teacher, student_spec: ImageSpec, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.name, self.image_spec = f"teacher {teacher.source}", teacher.clip.image_spec
        plain: Any = teacher.clip.module
        self.tower = frozen(plain.visual if teacher.prompted is None else teacher.prompted.image)
        self._student_spec, self._dtype = student_spec, dtype

    def train(self, mode: bool = True) -> ImageTeacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, own_statistics: bool = False) -> Tensor:
        """images [B,3,H,W] -> unit vectors [B,D], fp32."""
        if not own_statistics:
            images = convert_images(images, self._student_spec, self.image_spec)
        return F.normalize(encode(self.tower, images, self._dtype).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        return self(images.to(next(self.parameters()).device), own_statistics=True)


def _reloaded(folder: Path, probe: Probe) -> dict[str, Tensor]:
    return read_export(folder, ClipConfig()).probe(probe.inputs["images"]).outputs


if __name__ == "__main__":
    sys.exit(check_main(_reloaded, sys.argv[1:]))
