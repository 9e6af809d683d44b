"""From a VL2V-ADiP config to a job: fold, teacher, student, loader, evaluators."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.vl2v_adip.config import CONTINUES, FROZEN_BACKBONE, LINEAR_HEAD, WITHOUT_TEACHER, Vl2vConfig
from projects.vl2v_adip.evaluation import DomainAccuracy
from projects.vl2v_adip.folds import Fold, choose, earlier_stage, facts_of
from projects.vl2v_adip.miro import MiroStudent, Pretrained
from projects.vl2v_adip.objective import needs_images
from projects.vl2v_adip.student import Student
from projects.vl2v_adip.task import Vl2vTask
from vlmkd import distributed
from vlmkd.config import require
from vlmkd.data.labelled import LabelledSet
from vlmkd.data.loader import Loader, build_labelled_loader
from vlmkd.data.sources import Stream
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.datasets.labelled_sets import configured_set
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Evaluator
from vlmkd.evaluation.classify import Classification
from vlmkd.export.classifier import WEIGHTS
from vlmkd.models.backbones import Backbone, freeze_batch_norm, load_backbone, with_spec
from vlmkd.models.checkpoints import differences
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.models.classifier import ClassifierConfig
from vlmkd.models.clip import ClipModel, load_clip
from vlmkd.models.heads import LinearHead, Projector, TextClassifier
from vlmkd.models.towers import ClipPredictor, ClipTeacher
from vlmkd.tensor_files import read_safetensors
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple
from vlmkd.train.trainer import Job

log = logging.getLogger("vlmkd.vl2v_adip")

VECTORS = "head.vectors"
"""Name of the class vectors in a student's weights."""
_SAME_VECTORS = 0.999
"""Cosine above which two class vectors are of one encoder and prompt, in whatever precision each was computed."""
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Teacher(NamedTuple):
    """Class vectors, and the loaded model where the run asks it for image embeddings."""

    vectors: ClassVectors
    clip: ClipModel | None


def job(cfg: Vl2vConfig) -> Job:
    """The run of any stage or baseline."""
    dataset = configured_set(cfg.data)
    fold = choose(dataset, cfg.fold)
    pool = sum(len(fold.splits[domain].inside) for domain in fold.sources)
    cfg = in_steps(cfg, math.ceil(pool / cfg.batch_size))
    backbone = student_backbone(cfg)
    teacher = None if cfg.method in WITHOUT_TEACHER else load_teacher(cfg, dataset)
    vectors = None if teacher is None else teacher.vectors
    facts = facts_of(cfg, vectors.teacher_digest if vectors else "", vectors.templates if vectors else [])
    with torch.random.fork_rng(devices=[]):  # new layers depend on the run's seed alone
        torch.manual_seed(cfg.seed)
        student, exported = build_student(cfg, backbone, teacher, dataset)
    if cfg.method in CONTINUES:
        folder = earlier_stage(cfg, facts)
        fill(student, read_safetensors(folder / WEIGHTS), f"config field init_from: {folder}")
        log.info("started from %s", folder)
    clip = None if teacher is None else teacher.clip
    judged = clip is not None or (teacher is not None and cfg.teacher.model and cfg.evaluation.teacher)
    frozen: nn.Module | None = Pretrained(backbone.module) if cfg.method == "miro" else None
    if clip is not None:
        frozen = ClipTeacher(clip, backbone.image_spec)
    task = Vl2vTask(
        cfg,
        student,
        exported,
        facts,
        validation=[f"{fold.name(domain)}_out" for domain in fold.sources],
        teacher=frozen,
        vectors=vectors,
        judged=(lambda: clip or load_model(cfg)) if judged else None,
    )
    target = target_of(cfg, fold)
    watched = target[:1] if cfg.watch_target else []
    loader = _loader(cfg, fold, backbone, teacher)
    return Job(cfg, task, loader, [*validation_of(fold), *watched], target[len(watched) :])


def load_teacher(cfg: Vl2vConfig, dataset: LabelledSet) -> Teacher:
    """Class vectors, and the model itself where its image embeddings are not stored."""
    clip = load_model(cfg) if cfg.teacher.model else None
    if cfg.teacher.class_vectors:
        vectors = ClassVectors.load(Path(cfg.teacher.class_vectors), expect_class_names=dataset.class_names)
    else:
        assert clip is not None
        templates = cfg.teacher.templates or dataset.templates
        vectors = encode_classes(
            ClipPredictor.of(clip), dataset.class_names, templates, teacher_digest=clip.digest
        )
    stored = TeacherOutputs(cfg.data.teacher_outputs, cfg.data.teacher_view).info if cfg.stored else None
    of_images = stored or clip
    if of_images is not None and vectors.teacher_digest != of_images.digest:
        raise UserError(
            f"class vectors are of {vectors.teacher}, the image embeddings of {of_images.source}: other weights; make "
            "both with one model"
        )
    asked = needs_images(cfg.method, cfg.loss) and stored is None
    return Teacher(vectors, clip if asked else None)


def load_model(cfg: Vl2vConfig) -> ClipModel:
    """The CLIP that `teacher.model` names."""
    clip = load_clip(cfg.teacher.model, cfg.teacher.pretrained)
    if not cfg.legacy_norm:
        return clip
    return replace(clip, image_spec=replace(clip.image_spec, **IMAGENET))


def student_backbone(cfg: Vl2vConfig) -> Backbone:
    """The student's backbone with the protocol's evaluation resize (aspect ratio not kept) and its statistics."""
    backbone = load_backbone(
        cfg.student.backbone,
        cfg.student.pretrained,
        weights=cfg.student.weights,
        image_size=cfg.student.image_size or None,
        seed=cfg.seed,
    )
    changes = {"resize_mode": "squash"} | (IMAGENET if cfg.legacy_norm else {})
    if cfg.data.interpolation != "model":
        changes["interpolation"] = cfg.data.interpolation
    backbone = with_spec(backbone, **changes)
    norms = [part for part in backbone.module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    require(
        not norms or cfg.deepspeed.precision == "fp32",
        "deepspeed.precision",
        f"is {cfg.deepspeed.precision}, but {backbone.source} has BatchNorm, whose statistics are fp32; use fp32, or a "
        "student without BatchNorm, such as a ViT",
    )
    if cfg.student.freeze_bn:
        freeze_batch_norm(backbone.module)
    return backbone


def build_student(
    cfg: Vl2vConfig, backbone: Backbone, teacher: Teacher | None, dataset: LabelledSet
) -> tuple[Student, ClassifierConfig]:
    """The student of the method, what is trained of it, and what its export says."""
    projector: Projector | None = None
    head: nn.Module
    if teacher is None or cfg.method in LINEAR_HEAD:
        head, templates = LinearHead(backbone.dim, len(dataset.class_names)), []
    else:
        vectors = teacher.vectors
        head, templates = TextClassifier(vectors.vectors, vectors.logit_scale), vectors.templates
        width = vectors.vectors.shape[1]
        if cfg.method != "vl2v_sd":
            projector = Projector(backbone.dim, width)
        require(
            projector is not None or backbone.dim == width,
            "student.backbone",
            f"gives {backbone.dim} features, the teacher {width}: with method=vl2v_sd it is the teacher's own tower",
        )
    student = (
        MiroStudent(backbone, head) if cfg.method == "miro" else Student(backbone.module, head, projector)
    )
    student.requires_grad_(cfg.method != "distill")
    student.backbone.requires_grad_(cfg.method not in FROZEN_BACKBONE)
    student.train()
    exported = ClassifierConfig.of(
        backbone, head, projector, class_names=dataset.class_names, templates=templates
    )
    return student, exported


def fill(student: Student, weights: dict[str, Tensor], origin: str) -> None:
    """Load `weights`, of `origin` in errors, into the student; class vectors stay its own, and must agree up to rounding."""
    problems = differences(student.state_dict(), weights)
    if problems:
        raise UserError(f"{origin} is of another student: {problems}")
    own = {name: value for name, value in student.state_dict().items() if name == VECTORS}  # the loss's
    if own and F.cosine_similarity(weights[VECTORS], own[VECTORS]).min() < _SAME_VECTORS:
        raise UserError(
            f"{origin} has other class vectors than this run's teacher and prompts give; take the teacher, prompts "
            "and teacher.class_vectors that it was made with"
        )
    student.load_state_dict(weights | own)


def _loader(cfg: Vl2vConfig, fold: Fold, backbone: Backbone, teacher: Teacher | None) -> Loader:
    sources = fold.sources
    require(
        cfg.batch_size % len(sources) == 0,
        "batch_size",
        f"is {cfg.batch_size}; the {len(sources)} source domains share it equally (32 each in the paper)",
    )
    world_size = distributed.world_size()
    streams = {
        fold.name(domain): Stream(
            fold.splits[domain].inside, cfg.batch_size // len(sources), sampling="replacement"
        )
        for domain in sources
    }
    asked = needs_images(cfg.method, cfg.loss)
    return build_labelled_loader(
        cfg.data if asked else replace(cfg.data, teacher_outputs="", teacher_view="same"),
        streams,
        seed=cfg.seed,
        rank=distributed.rank(),
        world_size=world_size,
        accumulation=batch_triple(cfg, world_size)[1],
        image_spec=backbone.image_spec,
        teacher_specs=[teacher.clip.image_spec] if teacher and teacher.clip else [],
        teacher_digest=teacher.vectors.teacher_digest if asked and cfg.stored else None,  # type: ignore[union-attr]
    )


def validation_of(fold: Fold) -> list[Evaluator]:
    """The 20 % of every source domain."""
    return [DomainAccuracy(f"{fold.name(domain)}_out", fold.splits[domain].out) for domain in fold.sources]


def target_of(cfg: Vl2vConfig, fold: Fold) -> list[Evaluator]:
    """The held-out domain: its 80 %, which are reported, its 20 %, and seen against unseen classes."""
    name, split = fold.name(fold.test_domain), fold.splits[fold.test_domain]
    names, seen = fold.dataset.class_names, cfg.fold.seen_classes
    classes = range(len(names)) if seen else range(0)
    reported = Classification(
        split.inside, names, dataset=f"{name}_in", base=classes[:seen], novel=classes[seen:], rivals="all"
    )
    return [reported, DomainAccuracy(f"{name}_out", split.out)]
