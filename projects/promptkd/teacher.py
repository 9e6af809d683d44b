"""The frozen teacher of stage 2, from whatever its user names, and its class vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.promptkd import legacy
from projects.promptkd.config import TRAINING_TEMPLATE, Setting, TeacherSource
from projects.promptkd.exports import TEACHER_JSON, clip_digest, read_teacher, teacher_digest
from projects.promptkd.precision import encode
from projects.promptkd.prompts import PromptedCLIP, PromptedEncoder, with_room
from vlmkd.data.labelled import LabelledSet
from vlmkd.errors import UserError
from vlmkd.evaluation.classify import ZeroShotClassifier
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.models.clip import ClipModel, load_clip
from vlmkd.models.towers import ClipPredictor, convert_images
from vlmkd.train.task import frozen
from vlmkd.zoo import weights_file

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


def load_teacher(source: TeacherSource, dataset: str, setting: Setting) -> Teacher:
    """The teacher that a config names; in a folder of published teachers that of `dataset` and `setting`."""
    named = source.clip
    if not source.prompts:
        clip = load_clip(named.model, named.pretrained)
        return Teacher(clip, None, TRAINING_TEMPLATE, clip_digest(clip), clip.source)
    path = weights_file(source.prompts)
    if (path / TEACHER_JSON).is_file():
        prompted, clip, facts = read_teacher(path, named)
        return Teacher(clip, prompted, facts.template, facts.digest, source.prompts)
    if path.is_dir():
        path = legacy.find_teacher(path, dataset, setting)
    if not named.model:
        raise UserError(
            f"teacher {path} is a published checkpoint; name the CLIP under it in teacher.clip, e.g. "
            "teacher.clip.model=ViT-L-14-quickgelu teacher.clip.pretrained=openai"
        )
    state = legacy.read_checkpoint(path)
    if legacy.kind_of(state, str(path)) != "teacher":
        raise UserError(f"{path} is a student, not a teacher; name a teacher's checkpoint in teacher.prompts")
    prompted, clip = legacy.load_teacher(state, load_clip(named.model, named.pretrained), str(path))
    digest = teacher_digest(clip_digest(clip), prompted.prompts())
    template = with_room(clip.tokenizer, TRAINING_TEMPLATE, prompted.shape.text_length)
    return Teacher(clip, prompted, template, digest, str(path))


class ImageTeacher(nn.Module):
    """The teacher's image tower alone, for images in the student's statistics or its own; an ImageEncoder."""

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
