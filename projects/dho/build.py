"""From a DHO config to a job: images and their labels, teacher, student with its heads, loader, evaluators."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from projects.dho.config import DhoConfig
from projects.dho.labels import Images, choose
from projects.dho.mixing import Mixture
from projects.dho.objective import TERMS
from projects.dho.selection import HeadSearch, Shifted
from projects.dho.student import Student
from projects.dho.task import DhoTask
from projects.dho.teacher import Teacher, load_teacher, prompts_of
from vlmkd import distributed
from vlmkd.data.labelled import LabelledSet
from vlmkd.data.loader import Loader, build_labelled_loader
from vlmkd.data.sources import Stream
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Evaluator
from vlmkd.evaluation.classify import Classification
from vlmkd.models.backbones import Backbone, load_backbone
from vlmkd.models.class_vectors import encode_classes
from vlmkd.models.clip import load_clip
from vlmkd.models.heads import DualHead, LinearHead, Projector, TextClassifier
from vlmkd.models.towers import ClipPredictor
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple
from vlmkd.train.trainer import Job


def student_job(cfg: DhoConfig) -> Job:
    """The run of a student."""
    images = choose(cfg.data, cfg.split)
    cfg = in_steps(cfg, _epoch(cfg, images))
    dataset = images.dataset
    names, templates = dataset.class_names, dataset.templates
    teacher = None
    if cfg.loss.method != "ce":
        teacher = load_teacher(cfg.teacher, names, templates, outputs=cfg.data.teacher_outputs)
    backbone = load_backbone(
        cfg.student.backbone,
        cfg.student.pretrained,
        weights=cfg.student.weights,
        image_size=cfg.student.image_size or None,
        seed=cfg.seed,
    )
    with torch.random.fork_rng(devices=[]):  # new heads depend on the run's seed alone
        torch.manual_seed(cfg.seed)
        student = build_student(cfg, backbone, teacher, dataset)
    task = DhoTask(cfg, student, backbone, teacher, names)
    loader = _loader(cfg, images, backbone, teacher)
    validation: list[Evaluator] = []
    if images.validation:
        fixed = Mixture(cfg.mixing.alpha, cfg.mixing.beta) if cfg.mixing.mode == "fixed" else None
        title = f"{dataset.name} validation"
        validation.append(HeadSearch(title, images.validation, two_heads=cfg.two_heads, fixed=fixed))
    more = [(load_set(extra.set, extra.root), extra.split) for extra in cfg.test_sets]
    tests = [Shifted(Classification.of(one, split)) for one, split in [(dataset, "test"), *more]]
    return Job(cfg, task, loader, validation, tests)


def _epoch(cfg: DhoConfig, images: Images) -> int:
    """Steps of an epoch; 0 without such images."""
    unlabelled = cfg.batch_size - cfg.labelled_images
    passed, batch = images.unlabelled, unlabelled
    if cfg.epoch == "labelled" or not unlabelled:
        passed, batch = images.labelled, cfg.labelled_images
    return math.ceil(len(passed) / batch) if batch else 0


def build_student(
    cfg: DhoConfig, backbone: Backbone, teacher: Teacher | None, dataset: LabelledSet
) -> Student:
    """The student around a loaded backbone; heads and projector are drawn from torch's random state."""
    classes = len(dataset.class_names)
    projector = None
    if "feature" in TERMS[cfg.loss.method]:
        assert teacher is not None
        projector = Projector(backbone.dim, teacher.dim)
    head: nn.Module
    if cfg.loss.method == "kd_feature":
        assert teacher is not None and teacher.vectors is not None
        head = TextClassifier(teacher.vectors.vectors, teacher.vectors.logit_scale)
    elif cfg.two_heads:
        head = DualHead(backbone.dim, classes, kd=cfg.student.kd_head)
    else:
        head = LinearHead(backbone.dim, classes)
    if cfg.student.head_init == "text":
        _start_from_text(head, cfg, dataset)
    separate = cfg.student.batch_norm_statistics == "separate"
    return Student(backbone.module, head, projector, separate_statistics=separate)


def _start_from_text(head: nn.Module, cfg: DhoConfig, dataset: LabelledSet) -> None:
    """Start from class vectors of the text tower that belongs to the backbone."""
    name = cfg.student.backbone.removeprefix("clip:")
    whole = name.startswith(("zoo:", "local-dir:", "hf:"))
    model, _, pretrained = (name, "", "") if whole else name.partition("@")
    clip = load_clip(model, pretrained)
    prompts, encoder = prompts_of(cfg.teacher, dataset.templates), ClipPredictor.of(clip)
    how = cfg.student.text_init
    made = encode_classes(encoder, dataset.class_names, prompts, how, teacher_digest=clip.digest)
    start_from_vectors(head, made.vectors)


@torch.no_grad()
def start_from_vectors(head: nn.Module, vectors: Tensor) -> None:
    """The head's weight, or both of a dual one, becomes the class vectors [C, d], un-normalised as they are; biases 0."""
    for one in head.children() if isinstance(head, DualHead) else [head]:
        assert isinstance(one, LinearHead)
        if vectors.shape != (wanted := one.weight.shape):
            raise UserError(
                f"text initialisation: class vectors are {[*vectors.shape]}, but the heads need {[*wanted]}; take this "
                "backbone's own text tower, or head_init=default"
            )
        one.weight.copy_(vectors)
        if one.bias is not None:
            one.bias.zero_()


def _loader(cfg: DhoConfig, images: Images, backbone: Backbone, teacher: Teacher | None) -> Loader:
    ranks = distributed.world_size()
    streams: dict[str, Stream] = {}
    if cfg.uses_labels:
        streams["labelled"] = Stream(images.labelled, cfg.labelled_images)
    if cfg.loss.method != "ce":
        streams["unlabelled"] = Stream(images.unlabelled, cfg.batch_size - cfg.labelled_images)
    clip = None if teacher is None else teacher.clip
    return build_labelled_loader(
        cfg.data,
        streams,
        seed=cfg.seed,
        rank=distributed.rank(),
        world_size=ranks,
        accumulation=batch_triple(cfg, ranks)[1],
        image_spec=backbone.image_spec,
        teacher_specs=[] if clip is None else [clip.image_spec],
        teacher_digest=None if teacher is None else teacher.digest,
    )
