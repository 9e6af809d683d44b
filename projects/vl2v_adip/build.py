"""From a VL2V-ADiP config to a job: fold, teacher, student, loader, evaluators."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.vl2v_adip.config import CONTINUES, FROZEN_BACKBONE, LINEAR_HEAD, WITHOUT_TEACHER, Vl2vConfig
from projects.vl2v_adip.evaluation import DomainAccuracy
from projects.vl2v_adip.folds import Fold, choose, earlier_stage, facts_of
from projects.vl2v_adip.miro import MiroStudent, Pretrained
from projects.vl2v_adip.objective import needs_images
from projects.vl2v_adip.student import Student, freeze_batch_norm
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
from vlmkd.models.backbones import Backbone, load_backbone
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
"""Cosine above which class vectors are of one encoder and prompt."""
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def job(cfg: Vl2vConfig) -> Job:
    """The run of any stage or baseline; a second stage starts from the first one's export."""
    made = assemble(cfg)
    if cfg.method in CONTINUES:
        task: Any = made.task
        folder = earlier_stage(cfg, task.facts)
        fill(task.core, read_safetensors(folder / WEIGHTS), f"config field init_from: {folder}")
        log.info("started from %s", folder)
    return made


def assemble(cfg: Vl2vConfig) -> Job:
    """The run, its student as it is before any stage."""
    dataset = configured_set(cfg.data)
    fold = choose(dataset, cfg.fold)
    pool = sum(len(fold.splits[domain].inside) for domain in fold.sources)
    cfg = in_steps(cfg, math.ceil(pool / cfg.batch_size))
    backbone = student_backbone(cfg)
    taught = cfg.method not in WITHOUT_TEACHER
    vectors, clip = load_teacher(cfg, dataset) if taught else (None, None)
    facts = facts_of(cfg, vectors.teacher_digest, vectors.templates) if vectors else facts_of(cfg)
    with torch.random.fork_rng(devices=[]):  # new layers depend on the run's seed alone
        torch.manual_seed(cfg.seed)
        student, exported = build_student(cfg, backbone, vectors, dataset)
    frozen: nn.Module | None = Pretrained(backbone.module) if cfg.method == "miro" else None
    if clip is not None:
        frozen = ClipTeacher(clip, backbone.image_spec)
    validation, target = [_left_out(fold, domain) for domain in fold.sources], _target(cfg, fold)
    judged = clip is not None or (taught and cfg.teacher.model and cfg.evaluation.teacher)
    task = Vl2vTask(
        cfg, student, exported, facts, validation=[one.dataset for one in validation], teacher=frozen,
        vectors=vectors, judged=(lambda: clip or load_model(cfg)) if judged else None,
    )  # fmt: skip
    watched = target[:1] if cfg.watch_target else []
    loader = _loader(cfg, fold, backbone, vectors, clip)
    return Job(cfg, task, loader, [*validation, *watched], target[len(watched) :])


def load_teacher(cfg: Vl2vConfig, dataset: LabelledSet) -> tuple[ClassVectors, ClipModel | None]:
    """Class vectors, and the loaded model where the run asks it for embeddings."""
    clip = load_model(cfg) if cfg.teacher.model else None
    if cfg.teacher.class_vectors:
        vectors = ClassVectors.load(Path(cfg.teacher.class_vectors), expect_class_names=dataset.class_names)
    else:
        assert clip is not None
        prompts, predictor = cfg.teacher.templates or dataset.templates, ClipPredictor.of(clip)
        vectors = encode_classes(predictor, dataset.class_names, prompts, teacher_digest=clip.digest)
    stored = TeacherOutputs(cfg.data.teacher_outputs, cfg.data.teacher_view).info if cfg.stored else None
    of_images = stored or clip
    if of_images is not None and vectors.teacher_digest != of_images.digest:
        raise UserError(
            f"class vectors are of {vectors.teacher}, image embeddings of other weights, {of_images.source}; make both "
            "with one model"
        )
    asked = needs_images(cfg.method, cfg.loss) and stored is None
    return vectors, clip if asked else None


def load_model(cfg: Vl2vConfig) -> ClipModel:
    """The CLIP that `teacher.model` names."""
    clip = load_clip(cfg.teacher.model, cfg.teacher.pretrained)
    return replace(clip, image_spec=replace(clip.image_spec, **IMAGENET if cfg.legacy_norm else {}))


def student_backbone(cfg: Vl2vConfig) -> Backbone:
    """The student's backbone, its evaluation images resized without their aspect ratio, as the protocol has it."""
    given = cfg.student
    backbone = load_backbone(
        given.backbone, given.pretrained, weights=given.weights, image_size=given.image_size or None, seed=cfg.seed
    )  # fmt: skip
    changes = {"resize_mode": "squash"} | (IMAGENET if cfg.legacy_norm else {})
    if cfg.data.interpolation != "model":
        changes["interpolation"] = cfg.data.interpolation
    backbone.image_spec = replace(backbone.image_spec, **changes)
    norms = [part for part in backbone.module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    told = f"is {cfg.deepspeed.precision}, but {backbone.source} has BatchNorm, whose statistics are fp32; use fp32, or a ViT"
    require(not norms or cfg.deepspeed.precision == "fp32", "deepspeed.precision", told)
    if given.freeze_bn:
        freeze_batch_norm(backbone.module)
    return backbone


def build_student(
    cfg: Vl2vConfig, backbone: Backbone, vectors: ClassVectors | None, dataset: LabelledSet
) -> tuple[Student, ClassifierConfig]:
    """The student of the method, what is trained of it, and what its export says."""
    names, templates = dataset.class_names, []
    projector: Projector | None = None
    head: nn.Module
    if vectors is None or cfg.method in LINEAR_HEAD:
        head = LinearHead(backbone.dim, len(names))
    else:
        head, templates = TextClassifier(vectors.vectors, vectors.logit_scale), vectors.templates
        width = vectors.vectors.shape[1]
        if cfg.method != "vl2v_sd":
            projector = Projector(backbone.dim, width)
        elif backbone.dim != width:
            told = f"gives {backbone.dim} features, the teacher {width}; name the teacher's own tower"
            raise UserError(f"config field student.backbone {told}")
    miro = cfg.method == "miro"
    student = MiroStudent(backbone, head) if miro else Student(backbone.module, head, projector)
    student.requires_grad_(cfg.method != "distill")
    student.backbone.requires_grad_(cfg.method not in FROZEN_BACKBONE)
    student.train()
    return student, ClassifierConfig.of(backbone, head, projector, class_names=names, templates=templates)


def fill(student: Student, weights: dict[str, Tensor], origin: str) -> None:
    """Load `weights` into the student; class vectors stay its own, and must agree up to rounding."""
    state = student.state_dict()
    if problems := differences(state, weights):
        raise UserError(f"{origin} is of another student: {problems}")
    own = {VECTORS: state[VECTORS]} if VECTORS in state else {}  # the loss's
    if own and F.cosine_similarity(weights[VECTORS], own[VECTORS]).min() < _SAME_VECTORS:
        raise UserError(
            f"{origin} has other class vectors than this run's; take the teacher and prompts that it is of"
        )
    student.load_state_dict(weights | own)


def _loader(
    cfg: Vl2vConfig, fold: Fold, backbone: Backbone, vectors: ClassVectors | None, clip: ClipModel | None
) -> Loader:
    share, rest = divmod(cfg.batch_size, len(fold.sources))
    told = (
        f"is {cfg.batch_size}; the {len(fold.sources)} source domains share it equally (32 each in the paper)"
    )
    require(not rest, "batch_size", told)
    pools = {fold.name(domain): fold.splits[domain].inside for domain in fold.sources}
    asked, ranks = needs_images(cfg.method, cfg.loss), distributed.world_size()
    return build_labelled_loader(
        cfg.data if asked else replace(cfg.data, teacher_outputs="", teacher_view="same"),
        {name: Stream(items, share, replacement=True) for name, items in pools.items()},
        seed=cfg.seed,
        rank=distributed.rank(),
        world_size=ranks,
        accumulation=batch_triple(cfg, ranks)[1],
        image_spec=backbone.image_spec,
        teacher_specs=[clip.image_spec] if clip else [],
        teacher_digest=vectors.teacher_digest if vectors and asked and cfg.stored else None,
    )


def _left_out(fold: Fold, domain: int) -> DomainAccuracy:
    names = fold.dataset.class_names
    return DomainAccuracy(fold.splits[domain].out, names, dataset=f"{fold.name(domain)}_out")


def _target(cfg: Vl2vConfig, fold: Fold) -> list[Evaluator]:
    """On the held-out domain: its 80 %, which are reported, seen against unseen classes; and its 20 %."""
    names, seen = fold.dataset.class_names, cfg.fold.seen_classes
    classes = range(len(names)) if seen else range(0)
    reported = Classification(
        fold.splits[fold.test_domain].inside, names, dataset=f"{cfg.fold.test_domain}_in", base=classes[:seen],
        novel=classes[seen:], rivals="all",
    )  # fmt: skip
    return [reported, _left_out(fold, fold.test_domain)]
