"""From a TinyCLIP config to a job: models, inheritance, loader, evaluators."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from projects.tinyclip.config import DistillConfig, InheritConfig, MaskConfig, TinyCLIPConfig
from projects.tinyclip.encoder import CLIPEncoder
from projects.tinyclip.fuse import reenter
from projects.tinyclip.inherit import Inheritance, inherit
from projects.tinyclip.masked import MaskedCLIP, config_from_clip
from projects.tinyclip.task import DistillTask, MaskTask, Student
from vlmkd import distributed
from vlmkd.config import require
from vlmkd.data.loader import build_loader
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.datasets.evaluation_sets import retrieval_set, zero_shot_set
from vlmkd.evaluation.base import Evaluator
from vlmkd.evaluation.classify import Classification
from vlmkd.evaluation.retrieval import Retrieval
from vlmkd.models.clip import ClipModel, load_clip, load_weights
from vlmkd.models.pruned_clip import PrunedCLIP
from vlmkd.models.towers import ClipTeacher
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple
from vlmkd.train.trainer import Job

log = logging.getLogger("vlmkd.tinyclip")


def distill_job(cfg: DistillConfig) -> Job:
    """The `distill` run."""
    source = load_clip(cfg.student.model, cfg.student.pretrained, seed=cfg.seed)
    inherited = inherited_weights(cfg.inherit, source.config)
    if inherited.towers:
        log.info("inherited:\n%s", inherited.describe())
        load_weights(source.module, {**source.module.state_dict(), **inherited.state}, "inherited weights")
    scale = cfg.logit_scale
    encoder = CLIPEncoder(
        source.module,
        fixed_scale=scale.value if scale.mode == "fixed" else None,
        activation_checkpointing=cfg.deepspeed.activation_checkpointing,
    )
    return _job(cfg, DistillTask, encoder, source)


def mask_job(cfg: MaskConfig) -> Job:
    """The `mask` run: a full-size model under masks, or an earlier stage's export padded back to full size."""
    source = load_clip(cfg.student.model, cfg.student.pretrained, seed=cfg.seed)
    masks = cfg.masks
    if isinstance(source.module, PrunedCLIP):
        full = config_from_clip(load_clip(masks.full_model).module) if masks.full_model else None
        encoder = reenter(
            source.module, full, freeze_pruned=masks.freeze_pruned, joint=masks.joint, sides=masks.sides
        )
    else:
        for name in ("full_model", "freeze_pruned"):
            told = "has no effect on a student that was never pruned"
            require(not getattr(masks, name), f"masks.{name}", told)
        encoder = MaskedCLIP.from_clip(source.module, joint=masks.joint, sides=masks.sides)
    if cfg.deepspeed.activation_checkpointing:
        encoder.set_grad_checkpointing()
    if cfg.logit_scale.mode == "fixed":
        encoder.logit_scale.data.fill_(math.log(cfg.logit_scale.value))
        encoder.logit_scale.requires_grad_(False)
    return _job(cfg, MaskTask, encoder, source)


def inherited_weights(cfg: InheritConfig, student_config: dict[str, Any]) -> Inheritance:
    """Weights cut out of the sources of `cfg`."""
    result = Inheritance()
    for tower, source, layers, units in (
        ("image", cfg.image_from, cfg.image_layers, cfg.image_units),
        ("text", cfg.text_from, cfg.text_layers, cfg.text_units),
    ):
        if not source.model:
            continue
        loaded = load_clip(source.model, source.pretrained)
        part = inherit(
            loaded.module.state_dict(),
            loaded.config,
            student_config,
            layer_select=layers if cfg.layers == "list" else cfg.layers,
            width_select=units if cfg.width == "list" else cfg.width,
            tower=tower,  # type: ignore[arg-type]
            positions=cfg.positional,
            allow_activation_change=cfg.allow_activation_change,
        )
        result = result.merge(part)
    return result


def _job(cfg: TinyCLIPConfig, task_class: type[Any], encoder: Any, source: ClipModel) -> Job:
    clips = [load_clip(teacher.model, teacher.pretrained) for teacher in cfg.teachers]
    teachers = [] if cfg.cached else [ClipTeacher(clip, source.image_spec) for clip in clips]
    if cfg.cached:  # the models only tell whether the caches are theirs
        infos = [TeacherOutputs(folder).info for folder in cfg.data.sources[0].teacher_caches]
        dims, scales = [info.dim for info in infos], [info.logit_scale for info in infos]
    else:
        dims = [int(clip.config["embed_dim"]) for clip in clips]
        scales = [float(clip.module.logit_scale.detach().double().exp()) for clip in clips]  # type: ignore[operator, union-attr]
    world_size = distributed.world_size()
    loader = build_loader(
        cfg.data,
        seed=cfg.seed,
        rank=distributed.rank(),
        world_size=world_size,
        micro_batch_size=batch_triple(cfg, world_size)[0],
        image_spec=source.image_spec,
        tokenizer=source.tokenizer,
        teacher_views=[
            (teacher.clip.image_spec, None if _same_tokens(teacher.clip, source) else teacher.clip.tokenizer)
            for teacher in teachers
        ],
        teacher_digests=[clip.digest for clip in clips] or None if cfg.cached else None,
    )
    cfg = in_steps(cfg, loader.samples_per_epoch // cfg.batch_size)
    with torch.random.fork_rng(devices=[]):  # new projectors depend on the run's seed alone
        torch.manual_seed(cfg.seed)
        student = Student(encoder, source.config["embed_dim"], dims, cfg.loss)
    return Job(cfg, task_class(cfg, student, source, teachers, scales), loader, evaluators(cfg))


def _same_tokens(one: ClipModel, other: ClipModel) -> bool:
    """By a probe of ordinary and odd texts."""
    probe = ["a photo of a cat", "", "Ünïcode & <html> 12:30", "very long " * 100]
    return torch.equal(one.tokenizer(probe), other.tokenizer(probe))


def evaluators(cfg: TinyCLIPConfig) -> list[Evaluator]:
    """Zero-shot sets, then retrieval sets."""
    sets = [
        zero_shot_set(one.data, class_names=one.class_names, templates=one.templates, name=one.name)
        for one in cfg.evaluation.zero_shot
    ]
    retrieval = [
        retrieval_set(one.data, captions=one.captions, name=one.name) for one in cfg.evaluation.retrieval
    ]
    return [*map(Classification.of, sets), *map(Retrieval, retrieval)]
