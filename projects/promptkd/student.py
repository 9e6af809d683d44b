"""PromptKD's student: a frozen CLIP image tower with visual prompts, and a projector into the teacher's space.

Letters: B images, d width of the student's features, D width of the teacher's embeddings.
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
from vlmkd.models.backbones import prompted_config
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.classifier import ClassifierConfig
from vlmkd.models.clip import ClipModel
from vlmkd.models.heads import Projector, TextClassifier
from vlmkd.models.prompted import PromptedImageTower
from vlmkd.models.towers import evaluating

PROJECTOR_LAYERS = 2
"""Linear, BatchNorm, ReLU, Linear (paper Table 6: 2 are better than 1 and 3)."""


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
        projector_layers: int = PROJECTOR_LAYERS,
        seed: int = 0,
    ) -> None:
        """The image tower of `clip` under new prompts and a new projector, both drawn from `seed`.

        Raises:
            UserError: a tower that prompts do not fit.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        tower: Any = clip.module.visual
        self.image = PromptedImageTower(tower, depth, length, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = Projector(self.image.tower.proj.shape[1], embed_dim, layers=projector_layers)
        scale: Any = clip.module.logit_scale
        self.register_buffer(
            "logit_scale", scale.detach().float().reshape(1).clone()
        )  # the logarithm, frozen
        self.autocast_dtype: torch.dtype | None = None

    @property
    def scale(self) -> Tensor:
        """Factor [1] of the cosines, fp32: the student CLIP's own."""
        return self.logit_scale.float().exp()

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in the student's statistics -> unit vectors [B,D], fp32.

        In training the batch statistics of the projector are those of all ranks together, so that the number of ranks
        changes neither the loss nor the running statistics.
        """
        features = encode(self.image, images, self.autocast_dtype)
        with autocast(images.device, None):
            if self.projector.training:
                first, own = distributed.row_offset(len(features)), len(features)
                projected = self.projector(distributed.gather(features))[first : first + own]
            else:
                projected = self.projector(features)
            return F.normalize(projected.float(), dim=-1)


class StudentClassifier:
    """A student with class vectors as the ImageClassifier that evaluators call."""

    def __init__(
        self, name: str, student: PromptedStudent, vectors: ClassVectors, image_spec: ImageSpec
    ) -> None:
        self.name, self.image_spec, self.class_names = name, image_spec, vectors.class_names
        self.student, self.vectors = student, vectors

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """[B,3,H,W] -> logits [B,C], fp32: scaled cosines with the teacher's class vectors."""
        device = next(self.student.parameters()).device
        with evaluating(self.student):
            embeds = self.student(images.to(device))
        return cosine_logits(embeds, self.vectors.vectors.to(device), float(self.student.scale))


def as_classifier(
    student: PromptedStudent, state: Mapping[str, Tensor], clip: ClipModel, vectors: ClassVectors
) -> tuple[ClassifierConfig, dict[str, Tensor]]:
    """Config and weights of the core's Classifier that answers as `student` with the weights `state` does.

    `clip` is the CLIP that the student was made from. Its image tower with the prompts is the backbone, the class vectors
    with the frozen scale are the head.
    """
    head = TextClassifier(vectors.vectors, float(state["logit_scale"].double().exp()))
    config = ClassifierConfig(
        backbone=prompted_config(clip.config, student.image),
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
