"""The two TinyCLIP runs: distilling a student, and learning which of its units to keep."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.tinyclip.config import DistillConfig, LossConfig, MaskConfig, TinyCLIPConfig
from projects.tinyclip.fuse import fuse
from projects.tinyclip.masked import MaskedCLIP
from projects.tinyclip.masks import sparsity_target
from projects.tinyclip.objective import StudentEmbeds, objective
from vlmkd import distributed
from vlmkd.config import OptimConfig
from vlmkd.export.clip import export_clip, verify_export
from vlmkd.files import write_text
from vlmkd.losses.affinity import PairEmbeds
from vlmkd.models.clip import ClipModel
from vlmkd.models.towers import ClipPredictor, ClipTeacher
from vlmkd.train.selection import MovingAverage
from vlmkd.train.task import Batch, StepOutput, Task, combine
from vlmkd.train.timing import Stopwatch
from vlmkd.train.trainer import stream_seed

LEGACY_FIRST_SCALE = 1 / 0.07  # the released student's scale before its first optimiser step


class Student(nn.Module):
    """The CLIP that is trained, and what the losses train beside it: projectors, and ICL's own scale."""

    def __init__(self, encoder: nn.Module, embed_dim: int, teacher_dims: list[int], loss: LossConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_projectors = nn.ModuleList()
        self.text_projectors = nn.ModuleList()
        for dim in teacher_dims if loss.feature or loss.interactive else []:
            for projectors in (self.image_projectors, self.text_projectors):
                projectors.append(nn.Identity() if dim == embed_dim else nn.Linear(embed_dim, dim))
        self.interactive_log_scale = None
        if loss.interactive:  # one element, because DeepSpeed cannot broadcast parameters without dimensions
            self.interactive_log_scale = nn.Parameter(torch.full((1,), math.log(LEGACY_FIRST_SCALE)))

    def forward(
        self, images: Tensor, tokens: Tensor, **encoder_options: Any
    ) -> tuple[Any, list[tuple[Tensor, Tensor]], Tensor | float]:
        """The encoder's output, unit embeddings in each teacher's space [b, D'], and ICL's scale."""
        output = self.encoder(images, tokens, **encoder_options)
        projected = [
            (_project(image, output.image_embeds), _project(text, output.text_embeds))
            for image, text in zip(self.image_projectors, self.text_projectors, strict=True)
        ]
        log_scale = self.interactive_log_scale
        return output, projected, 1.0 if log_scale is None else log_scale.float().exp().reshape(())


def _project(projector: nn.Module, embeds: Tensor) -> Tensor:
    if isinstance(projector, nn.Identity):
        return embeds
    return F.normalize(projector(embeds.to(next(projector.parameters()).dtype)).float(), dim=-1)


class TinyCLIPTask(Task):
    """Teachers, student, gathering and the objective; how the student starts is its builder's matter."""

    def __init__(
        self,
        cfg: TinyCLIPConfig,
        student: Student,
        source: ClipModel,
        teachers: list[ClipTeacher],
        teacher_scales: list[float],
    ) -> None:
        """`source` describes the student (config, pixels, tokenizer); `teacher_scales` holds one scale per teacher."""
        self.cfg, self.core, self.source = cfg, student, source
        self.student = student
        self.teachers = list(teachers)
        self.watch = Stopwatch()
        pinned = cfg.logit_scale.mode == "fixed"
        self._teacher_scales = [cfg.logit_scale.value if pinned else scale for scale in teacher_scales]

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch: frozen teachers, student, gather, losses."""
        with self.watch.span("teacher"):
            teachers = self._teacher_embeds(batch)
        output, projected, interactive_scale = self._forward(batch, step)
        with self.watch.span("loss"):
            student = StudentEmbeds(
                output.image_embeds,
                output.text_embeds,
                self._student_scale(output.logit_scale, step),
                0.0 if output.logit_bias is None else output.logit_bias,
                *self._gathered(output.image_embeds, output.text_embeds),
                projected=projected,
                interactive_scale=interactive_scale,
            )
            offset = distributed.rank() * len(output.image_embeds)
            terms, weights, metrics = objective(student, teachers, self.cfg.loss, offset)
            own_terms, own_metrics = self._own_terms(output)
            combined = combine(terms | own_terms, weights | dict.fromkeys(own_terms, 1.0))
        scale = torch.as_tensor(student.logit_scale).detach()
        combined.metrics = metrics | {"logit_scale": scale} | own_metrics
        return combined

    def _forward(self, batch: Batch, step: int) -> Any:
        return self.student(batch["images"], batch["tokens"])

    def _own_terms(self, output: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms of weight 1 and metrics beside the objective's."""
        return {}, {}

    def _student_scale(self, learned: Tensor, step: int) -> Tensor | float:
        scale = self.cfg.logit_scale
        if scale.mode == "learned":
            return learned
        return LEGACY_FIRST_SCALE if scale.legacy_first_step and step == 0 else scale.value

    @torch.no_grad()
    def _teacher_embeds(self, batch: Batch) -> list[PairEmbeds]:
        """Unit embeddings of every teacher, loaded or stored, gathered over the ranks."""
        if "teacher_image_embeds" in batch:
            pairs = list(zip(batch["teacher_image_embeds"], batch["teacher_text_embeds"], strict=True))
        else:
            pairs = []
            nothing = [None] * len(self.teachers)  # where the student's views and tokens serve
            own = zip(batch.get("teacher_images", nothing), batch.get("teacher_tokens", nothing), strict=True)
            for teacher, (images, tokens) in zip(self.teachers, own, strict=True):
                output = teacher(
                    batch["images"] if images is None else images,
                    batch["tokens"] if tokens is None else tokens,
                    own_statistics=images is not None,
                )
                pairs.append((output.image_embeds, output.text_embeds))
        return [
            PairEmbeds(image, text, scale, *self._gathered(image, text))
            for (image, text), scale in zip(pairs, self._teacher_scales, strict=True)
        ]

    @staticmethod
    def _gathered(image: Tensor, text: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Rows of all ranks, both modalities in one collective; (None, None) for one rank."""
        if distributed.world_size() == 1:
            return None, None
        both = distributed.gather(torch.cat([image, text], dim=1))
        return both[:, : image.shape[1]], both[:, image.shape[1] :]

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """A learned scale stays in [1, 100], as CLIP's does."""
        if self.cfg.logit_scale.mode == "fixed":
            return []
        return [(self.core.encoder.logit_scale, 0.0, math.log(100.0))]

    def _encoder_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's part of the student's complete weights; a fixed scale is written exactly."""
        state = {
            name.removeprefix("encoder.").removeprefix("model."): value
            for name, value in weights.items()
            if name.startswith("encoder.")
        }
        if self.cfg.logit_scale.mode == "fixed":
            state["logit_scale"] = torch.full_like(state["logit_scale"], math.log(self.cfg.logit_scale.value))
        return state

    def predictor(self) -> ClipPredictor:
        return ClipPredictor("student", self.core.encoder, self.source.image_spec, self.source.tokenizer)

    def teacher_predictors(self) -> dict[str, ClipPredictor]:
        return {f"teacher {teacher.clip.source}": ClipPredictor.of(teacher.clip) for teacher in self.teachers}

    def parameter_counts(self) -> dict[str, int]:
        """Of the student's encoder and the teachers; the size of a student under masks is still open."""
        counts = {f"teacher {t.clip.source}": sum(p.numel() for p in t.parameters()) for t in self.teachers}
        if not isinstance(self.core.encoder, MaskedCLIP):
            counts["student"] = sum(getattr(p, "ds_numel", p.numel()) for p in self.core.encoder.parameters())
        return counts

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> ClipModel:
        """Write the student as an open_clip folder."""
        model = self.source.with_weights(self._encoder_weights(weights))
        export_clip(folder, model)
        return model

    def check_exports(self, written: dict[Path, ClipModel]) -> None:
        for folder, model in written.items():
            verify_export(folder, model)


class DistillTask(TinyCLIPTask):
    """Distil into a student of its final shape."""

    cfg: DistillConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.average = MovingAverage(self.cfg.ema_decay) if self.cfg.ema_decay else None


class MaskTask(TinyCLIPTask):
    """Distil a full-size student under learned masks; the export is the fused dense model."""

    cfg: MaskConfig

    @property
    def masked(self) -> MaskedCLIP:
        assert isinstance(self.core.encoder, MaskedCLIP)
        return self.core.encoder

    def _forward(self, batch: Batch, step: int) -> Any:
        masks, at = self.cfg.masks, batch["positions"]
        seed = stream_seed(self.cfg.seed, distributed.rank(), at["worker"], at["raw"], "masks")
        target = sparsity_target(
            step, masks.start_sparsity, masks.target_sparsity, masks.sparsity_warmup_steps
        )
        return self.student(batch["images"], batch["tokens"], seed=seed, target=target)

    def _own_terms(self, output: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"sparsity": output.penalty}, {
            "sparsity": output.joint_sparsity.detach(),
            "image_sparsity": output.image_sparsity.detach(),
            "text_sparsity": output.text_sparsity.detach(),
        }

    def param_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Student and projectors, masks, multipliers."""
        masks = self.cfg.masks
        return self.masked.param_groups(super().param_groups(optim), masks.lr, masks.multiplier_lr)

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """The learned scale, and the log alphas."""
        return super().bounds() + self.masked.bounds()

    def masters(self) -> list[nn.Parameter]:
        """Log alphas and multipliers: evaluation and export decide alike which units stay."""
        return [*self.masked.image_masks.parameters(), *self.masked.text_masks.parameters()]

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> ClipModel:
        """Write the dense student of the deterministic masks (PrunedCLIP), and the table of what each layer kept."""
        fused = fuse(
            self._encoder_weights(weights),
            self.masked.config,
            round_to=self.cfg.masks.round_to,
            legacy_projection_scale=self.cfg.masks.legacy_projection_scale,
        )
        model = replace(self.source, module=fused.model(), config=fused.config, source="fused", digest="")
        export_clip(folder, model)
        write_text(folder / "kept.md", fused.report() + "\n")
        return model
