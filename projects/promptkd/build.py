"""From PromptKD's configs to jobs: data, towers, class vectors, loader, evaluators."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from projects.promptkd.config import PromptKDConfig, StudentConfig, TeacherConfig
from projects.promptkd.prompts import PromptedCLIP, PromptShape, class_tokens, with_room
from projects.promptkd.protocols import Protocol, student_images, student_protocol, teacher_protocol
from projects.promptkd.student import PromptedStudent
from projects.promptkd.task import StudentTask, TeacherNet, TeacherTask
from projects.promptkd.teacher import TEACHER_JSON, ImageTeacher, Teacher, load_teacher
from vlmkd import distributed
from vlmkd.class_names import prompt_name, read_templates
from vlmkd.config import require
from vlmkd.data.labelled import UNLABELLED, LabelledSet
from vlmkd.data.loader import Loader, build_labelled_loader
from vlmkd.data.sources import Stream
from vlmkd.datasets.labelled_sets import configured_set, items_of
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.images import embeddings
from vlmkd.files import read_object
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.models.clip import ClipModel, load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple
from vlmkd.train.trainer import Job

log = logging.getLogger("vlmkd.promptkd")

FROZEN_TEMPLATES = 60
"""PromptSRC averages the frozen class vectors over the first 60 of OpenAI's 80 ImageNet templates."""


def _autocast_dtype(cfg: PromptKDConfig) -> torch.dtype | None:
    gpu = torch.cuda.is_available()
    require(cfg.autocast != "fp16" or gpu, "autocast", "is fp16, which needs a GPU; use bf16 or none")
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.autocast]


def _steps_per_epoch(cfg: PromptKDConfig, images: int) -> int:
    """Whole batches of an epoch; what is left over is carried into the next."""
    require(
        images >= cfg.batch_size,
        "batch_size",
        f"is {cfg.batch_size}, more than the {images} training images; make it smaller",
    )
    return images // cfg.batch_size


def teacher_job(cfg: TeacherConfig) -> Job:
    """Stage 1: prompts of both towers."""
    dtype = _autocast_dtype(cfg)
    dataset = configured_set(cfg.data)
    protocol = teacher_protocol(cfg, dataset)
    epoch = _steps_per_epoch(cfg, len(protocol.train))
    cfg = in_steps(cfg, epoch)
    require(
        not cfg.average.std or cfg.steps % epoch == 0,
        "steps",
        f"is {cfg.steps}; the average is over whole epochs, here of {epoch} steps: give e.g. steps=20ep",
    )
    clip = load_clip(cfg.clip.model, cfg.clip.pretrained, seed=cfg.seed)
    prompts = cfg.prompts
    shape = PromptShape(**{item.name: getattr(prompts, item.name) for item in fields(PromptShape)})
    names = [prompt_name(dataset.class_names[index]) for index in protocol.classes]
    clip.module.to(distributed.device())
    frozen_vectors = _frozen_vectors(cfg, clip, dataset, names)
    prompted = PromptedCLIP(clip, shape, init=prompts.init, seed=cfg.seed)
    prompted.text.classes_per_chunk = cfg.classes_per_chunk
    prompted.image.activation_checkpointing = cfg.deepspeed.activation_checkpointing
    template = with_room(clip.tokenizer, prompts.template, prompts.text_length)
    tokens = class_tokens(clip.tokenizer, names, template)
    net = TeacherNet(prompted, tokens, frozen_vectors, dtype).to(distributed.device())
    log.info("stage 1: %d classes, %d labelled images", len(names), len(protocol.train))
    task = TeacherTask(cfg, net, clip, dataset, protocol, template, epoch)
    return Job(cfg, task, _loader(cfg, protocol, clip.image_spec), protocol.evaluators)


def _frozen_vectors(cfg: TeacherConfig, clip: ClipModel, dataset: LabelledSet, names: list[str]) -> Tensor:
    """[C,D]: unit mean of the frozen text features over the templates (docs/papers/promptkd.md, eq. 3)."""
    if cfg.frozen_templates == "openai60":
        templates = read_templates("openai")[:FROZEN_TEMPLATES]
    else:
        own = cfg.frozen_templates == "set"
        templates = dataset.templates if own else read_templates(cfg.frozen_templates)
    encoder = ClipPredictor.of(clip)
    return encode_classes(encoder, names, templates, "mean", teacher_digest=clip.digest).vectors


def student_job(cfg: StudentConfig) -> Job:
    """Stage 2: visual prompts and projector."""
    dtype = _autocast_dtype(cfg)
    dataset = configured_set(cfg.data)
    epoch = _steps_per_epoch(cfg, len(student_images(cfg, dataset)))
    cfg = in_steps(cfg, epoch)
    stored = bool(cfg.data.teacher_outputs)
    teacher = None
    if not (cfg.class_vectors and stored):
        teacher = load_teacher(cfg.teacher, cfg.data.set, cfg.protocol)
        teacher.module.to(distributed.device())
    vectors = class_vectors(cfg, dataset, teacher)
    if any(item.label == UNLABELLED for item in dataset.splits.get("test", [])):
        dataset = _as_the_teacher_answers(cfg, dataset, teacher, vectors)
    protocol = student_protocol(cfg, dataset)
    clip = load_clip(cfg.student.model, cfg.student.pretrained, seed=cfg.seed)
    student = PromptedStudent(
        clip,
        vectors.vectors.shape[1],
        depth=cfg.prompts.depth,
        length=cfg.prompts.length,
        projector_layers=cfg.projector_layers,
        seed=cfg.seed,
    )
    student.autocast_dtype = dtype
    student.image.activation_checkpointing = cfg.deepspeed.activation_checkpointing
    log.info(
        "stage 2: %d classes, %d images without labels, class vectors of %s",
        len(dataset.class_names), len(protocol.train), vectors.teacher,
    )  # fmt: skip
    image_teacher = None
    if teacher is not None and not stored:
        image_teacher = ImageTeacher(teacher, clip.image_spec, dtype)
    loader = _loader(cfg, protocol, clip.image_spec, image_teacher, vectors.teacher_digest)
    text = (lambda: teacher.class_vectors(dataset).vectors) if teacher and cfg.text_every_step else None
    task = StudentTask(cfg, student, clip, vectors, protocol, epoch, image_teacher, text)
    return Job(cfg, task, loader, protocol.evaluators)


def class_vectors(cfg: StudentConfig, dataset: LabelledSet, teacher: Teacher | None) -> ClassVectors:
    """The class vectors of a student run: a file's, checked against its teacher, or made now."""
    if not cfg.class_vectors:
        assert teacher is not None
        return teacher.class_vectors(dataset)
    vectors = ClassVectors.load(Path(cfg.class_vectors), expect_class_names=dataset.class_names)
    source, digest = cfg.teacher.prompts, vectors.teacher_digest
    if teacher is not None:
        source, digest = teacher.source, teacher.digest
    elif (facts := Path(source) / TEACHER_JSON).is_file():
        digest = read_object(facts, "teacher export")["digest"]
    if digest != vectors.teacher_digest:
        raise UserError(
            f"class vectors {cfg.class_vectors} are of {vectors.teacher}, whose weights or prompts are not those of "
            f"{source}; make them again with build_bank.py"
        )
    return vectors


def _as_the_teacher_answers(
    cfg: StudentConfig, dataset: LabelledSet, teacher: Teacher | None, vectors: ClassVectors
) -> LabelledSet:
    """A set without labels, with the teacher's answers on its test images; its name says so."""
    if teacher is None:
        raise UserError(
            f"data set {dataset.name} has no labels, so that the student is tested against its teacher: name it in teacher, "
            "and leave data.teacher_outputs empty"
        )
    items = items_of(dataset, "test")
    context = Context(distributed.device(), cfg.evaluation.batch_size, cfg.data.workers)
    title, images = f"{dataset.name}: the teacher's answers", [item.image for item in items]
    ids, embeds, _ = embeddings(teacher.encoder(), images, title, context)
    answers = vectors.logits(embeds).argmax(dim=1)
    log.info("no labels: answers on %d held-out images are compared with the teacher's", len(ids))
    pairs = zip(ids.tolist(), answers.tolist(), strict=True)
    test = [replace(items[index], label=answer) for index, answer in pairs]
    name = f"{dataset.name}, teacher's answers"
    return replace(dataset, name=name, splits={**dataset.splits, "test": test})


def _loader(
    cfg: PromptKDConfig,
    protocol: Protocol,
    spec: ImageSpec,
    teacher: ImageTeacher | None = None,
    digest: str | None = None,
) -> Loader:
    ranks = distributed.world_size()
    return build_labelled_loader(
        cfg.data,
        {"train": Stream(protocol.train, cfg.batch_size)},
        seed=cfg.seed,
        rank=distributed.rank(),
        world_size=ranks,
        accumulation=batch_triple(cfg, ranks)[1],
        image_spec=spec,
        teacher_specs=[] if teacher is None else [teacher.image_spec],
        teacher_digest=digest,
    )
