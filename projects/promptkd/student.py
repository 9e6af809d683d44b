"""PromptKD's student: a frozen CLIP image tower with visual prompts, and a projector into the teacher's space.

Letters: B images, C classes, D width of the teacher's embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.promptkd.objective import cosine_logits
from projects.promptkd.precision import autocast, encode
from vlmkd import distributed
from vlmkd.image_spec import ImageSpec
from vlmkd.models.backbones import image_tower_config
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.classifier import ClassifierConfig, ClassifierPredictor
from vlmkd.models.clip import ClipModel
from vlmkd.models.heads import Projector, TextClassifier
from vlmkd.models.prompted import PromptedImageTower


class PromptedStudent(nn.Module):
    """images -> unit vectors in the teacher's embedding space; it has no text tower."""

    logit_scale: Tensor

    def __init__(
        self,
        clip: ClipModel,
        embed_dim: int,
        *,
        depth: int,
        length: int,
        projector_layers: int = 2,
        seed: int = 0,
    ) -> None:
        """The image tower of `clip` under new prompts and a new projector, both drawn from `seed`."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        model: Any = clip.module
        self.image = PromptedImageTower(model.visual, depth, length, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = Projector(self.image.tower.proj.shape[1], embed_dim, layers=projector_layers)
        # The logarithm, frozen.
        self.register_buffer("logit_scale", model.logit_scale.detach().float().reshape(1).clone())
        self.autocast_dtype: torch.dtype | None = None

    @property
    def scale(self) -> Tensor:
        """Factor [1] of the cosines, fp32: the student CLIP's own."""
        return self.logit_scale.float().exp()

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in the student's statistics -> unit vectors [B,D], fp32.

        In training the projector's batch statistics are those of all ranks together, so that their number changes nothing.
        """
        features = encode(self.image, images, self.autocast_dtype)
        with autocast(images.device, None):
            if self.projector.training:
                first, own = distributed.rank() * len(features), len(features)
                projected = self.projector(distributed.gather(features))[first : first + own]
            else:
                projected = self.projector(features)
            return F.normalize(projected.float(), dim=-1)


class StudentLogits(nn.Module):
    """A student with class vectors: images [B,3,H,W] -> logits [B,C], fp32."""

    vectors: Tensor

    def __init__(self, student: PromptedStudent, vectors: ClassVectors) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("vectors", vectors.vectors)

    def forward(self, images: Tensor) -> Tensor:
        """Scaled cosines."""
        return cosine_logits(self.student(images), self.vectors.to(images.device), self.student.scale)


def student_classifier(
    name: str, student: PromptedStudent, vectors: ClassVectors, image_spec: ImageSpec
) -> ClassifierPredictor:
    """A student with class vectors as the ImageClassifier that evaluators call."""
    return ClassifierPredictor(name, StudentLogits(student, vectors), image_spec, vectors.class_names)


def as_classifier(
    student: PromptedStudent, state: Mapping[str, Tensor], clip: ClipModel, vectors: ClassVectors
) -> tuple[ClassifierConfig, dict[str, Tensor]]:
    """Config and weights of the core's Classifier that answers as `student`, made of `clip`, does with `state`."""
    head = TextClassifier(vectors.vectors, float(state["logit_scale"].double().exp()))
    prompts = {"kind": "prompted_clip", "depth": student.image.depth, "length": student.image.length}
    config = ClassifierConfig(
        backbone=image_tower_config(clip.config) | prompts,
        head=head.config,
        projector=student.projector.config,
        class_names=vectors.class_names,
        image_spec=clip.image_spec,
        source=clip.source,
        templates=vectors.templates,
    )
    weights = {
        name.replace("image.", "backbone.", 1) if name.startswith("image.") else name: value
        for name, value in state.items()
        if name != "logit_scale"
    }
    return config, weights | {"head.vectors": head.vectors}
