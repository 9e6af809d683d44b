"""From a VL2V-ADiP config to a job: fold, teacher, student, loader, evaluators."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.vl2v_adip.config import CONTINUES, FROZEN_BACKBONE, LINEAR_HEAD, WITHOUT_TEACHER, Vl2vConfig
from projects.vl2v_adip.evaluation import DomainAccuracy
from projects.vl2v_adip.folds import Fold, choose, earlier_stage, facts_of
from projects.vl2v_adip.miro import MiroStudent, Pretrained
from projects.vl2v_adip.objective import needs_images
from projects.vl2v_adip.student import Student, train_parts
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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Teacher:
    """What a run needs of its teacher."""

    vectors: ClassVectors
    clip: ClipModel | None
    """The loaded model where the run asks it for image embeddings."""


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
        load_stage(student, folder)
        log.info("started from %s", folder)
    clip = None if teacher is None else teacher.clip
    judged = teacher is not None and clip is None and cfg.teacher.model and cfg.evaluation.teacher
    frozen: nn.Module | None = None if clip is None else ClipTeacher(clip, backbone.image_spec)
    if cfg.method == "miro":
        frozen = Pretrained(backbone.module)
    task = Vl2vTask(
        cfg,
        student,
        exported,
        facts,
        validation=[f"{fold.name(domain)}_out" for domain in fold.sources],
        teacher=frozen,
        vectors=vectors,
        load_judged=(lambda: load_model(cfg)) if judged else None,
    )
    target = target_of(cfg, fold)
    watched = target[:1] if cfg.watch_target else []
    return Job(
        cfg,
        task,
        _loader(cfg, fold, backbone, teacher),
        [*validation_of(fold), *watched],
        target[len(watched) :],
    )


def load_teacher(cfg: Vl2vConfig, dataset: LabelledSet) -> Teacher:
    """Class vectors, and the model itself where its image embeddings are not stored.

    Raises:
        UserError: class vectors of other classes, or of another model than the image embeddings.
    """
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
    asked = needs_images(cfg.method, cfg.loss.image_weight) and stored is None
    return Teacher(vectors, clip if asked else None)


def load_model(cfg: Vl2vConfig) -> ClipModel:
    """The CLIP that `teacher.model` names."""
    clip = load_clip(cfg.teacher.model, cfg.teacher.pretrained)
    if not cfg.legacy_norm:
        return clip
    return replace(clip, image_spec=replace(clip.image_spec, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def student_backbone(cfg: Vl2vConfig) -> Backbone:
    """The student's backbone with the protocol's evaluation resize (aspect ratio not kept) and its statistics."""
    backbone = load_backbone(
        cfg.student.backbone,
        cfg.student.pretrained,
        weights=cfg.student.weights,
        image_size=cfg.student.image_size or None,
        seed=cfg.seed,
    )
    backbone = with_spec(backbone, resize_mode="squash")
    if cfg.data.interpolation != "model":
        backbone = with_spec(backbone, interpolation=cfg.data.interpolation)
    if cfg.legacy_norm:
        backbone = with_spec(backbone, mean=IMAGENET_MEAN, std=IMAGENET_STD)
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
    if cfg.method in LINEAR_HEAD:
        head = LinearHead(backbone.dim, len(dataset.class_names))
    else:
        assert teacher is not None
        vectors = teacher.vectors
        head = TextClassifier(vectors.vectors, vectors.logit_scale)
        width = vectors.vectors.shape[1]
        if cfg.method != "vl2v_sd":
            projector = Projector(backbone.dim, width)
        require(
            projector is not None or backbone.dim == width,
            "student.backbone",
            f"gives {backbone.dim} features, the teacher {width}: with method=vl2v_sd it is the teacher's own tower",
        )
    student: Student
    if cfg.method == "miro":
        student = MiroStudent(backbone, head)
    else:
        student = Student(backbone.module, head, projector)
    learned_head = head if cfg.method in LINEAR_HEAD else None
    if cfg.method in FROZEN_BACKBONE:
        train_parts(student, (projector, learned_head))
    elif cfg.method == "distill":
        train_parts(student, (student.backbone,))
    else:
        variances = student.variances if isinstance(student, MiroStudent) else None
        train_parts(student, (student.backbone, projector, learned_head, variances))
    student.train()
    templates = teacher.vectors.templates if teacher is not None and learned_head is None else []
    exported = ClassifierConfig.of(
        backbone, head, projector, class_names=dataset.class_names, templates=templates
    )
    return student, exported


def load_stage(student: Student, folder: Path) -> None:
    """Fill the student with the earlier stage's export; class vectors stay those of this run's loss.

    Raises:
        UserError: an export of another student, or with class vectors that are not the same up to rounding.
    """
    fill(student, read_safetensors(folder / WEIGHTS), f"config field init_from: {folder}")


def fill(student: Student, weights: dict[str, Tensor], origin: str) -> None:
    """Load `weights`, of `origin` in errors, into the student; class vectors stay the student's own.

    Raises:
        UserError: weights of another student, or class vectors that are not the same up to rounding.
    """
    problems = differences(student.state_dict(), weights)
    if problems:
        raise UserError(f"{origin} is of another student: {problems}")
    vectors = student.state_dict().get(VECTORS)
    if vectors is not None:
        if F.cosine_similarity(weights[VECTORS], vectors).min() < _SAME_VECTORS:
            raise UserError(
                f"{origin} has other class vectors than this run's teacher and prompts give; take the teacher, prompts "
                "and teacher.class_vectors that it was made with"
            )
        weights = weights | {VECTORS: vectors}  # the loss has these
    student.load_state_dict(weights)


def _loader(cfg: Vl2vConfig, fold: Fold, backbone: Backbone, teacher: Teacher | None) -> Loader:
    sources = fold.sources
    require(
        cfg.batch_size % len(sources) == 0,
        "batch_size",
        f"is {cfg.batch_size}; the {len(sources)} source domains share it equally (32 each in the paper)",
    )
    world_size = distributed.world_size()
    _, accumulation = batch_triple(cfg, world_size)
    streams = {
        fold.name(domain): Stream(
            fold.splits[domain].inside, cfg.batch_size // len(sources), sampling="replacement"
        )
        for domain in sources
    }
    clip = None if teacher is None else teacher.clip
    asked = teacher is not None and needs_images(cfg.method, cfg.loss.image_weight)
    data = cfg.data if asked else replace(cfg.data, teacher_outputs="", teacher_view="same")
    return build_labelled_loader(
        data,
        streams,
        seed=cfg.seed,
        rank=distributed.rank(),
        world_size=world_size,
        accumulation=accumulation,
        image_spec=backbone.image_spec,
        teacher_specs=[] if clip is None else [clip.image_spec],
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
