"""From a LLaVA-MoD config to a job: student, teacher, chats, questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.student import build_student, surgery
from projects.llava_mod.task import LlavaModTask
from vlmkd import distributed
from vlmkd.chat_config import QuestionsConfig
from vlmkd.data.chats import ChatPipeline, ChatTokens, read_chats
from vlmkd.data.loader import Loader
from vlmkd.data.sources import ItemSource, Stream
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import Answers
from vlmkd.export.mllm import ChatParts, build_mllm
from vlmkd.files import read_json
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple
from vlmkd.train.task import frozen
from vlmkd.train.trainer import Job


def job(cfg: LlavaModConfig) -> Job:
    """The run of any stage."""
    student = build_student(cfg)
    teacher = None
    if cfg.teacher.named:
        teacher = build_mllm(cfg.teacher, surgery=surgery)
        frozen(teacher.module)
        check_pair(student, teacher)
    tokens = ChatTokens(student.tokenizer, cfg.data.template, student.module.tower.tokens)  # type: ignore[arg-type]
    loader = chat_loader(cfg, student, tokens)
    cfg = in_steps(cfg, loader.samples_per_epoch // cfg.batch_size)
    asked = [questions(one) for one in cfg.evaluation.questions]
    return Job(cfg, LlavaModTask(cfg, student, tokens, teacher), loader, asked)


def check_pair(student: ChatParts, teacher: ChatParts) -> None:
    """Refuse a teacher that does not read what the student reads.

    Raises:
        UserError: another vocabulary, other features an image, or other pixels.
    """
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UserError(
            f"the vocabularies of student {student.config.decoder} and teacher {teacher.config.decoder} differ; distil "
            "between models of one tokenizer"
        )
    ours, theirs = ((one.module.tower.tokens, one.image_spec) for one in (student, teacher))
    if ours != theirs:
        raise UserError(
            f"the student has {ours[0]} features an image of {ours[1].size}, the teacher {theirs[0]} of {theirs[1].size}; "
            "give both the same tower, grid and image_size"
        )


def chat_loader(cfg: LlavaModConfig, student: ChatParts, tokens: ChatTokens) -> Loader:
    """Every chat once an epoch."""
    data = cfg.data
    items = [item for path in data.chats for item in read_chats(path, data.images or str(Path(path).parent))]
    _, accumulation = batch_triple(cfg, distributed.world_size())
    source = ItemSource(
        {"chats": Stream(items, cfg.batch_size)}, seed=cfg.seed, rank=distributed.rank(),
        world_size=distributed.world_size(), accumulation=accumulation,
    )  # fmt: skip
    pipeline = ChatPipeline(
        tokens, student.image_spec, max_length=data.max_length, pack=data.pack, max_pixels=data.max_pixels
    )
    return Loader(source, pipeline, workers=data.workers, max_bad_share=data.max_bad_share)


def questions(cfg: QuestionsConfig) -> Answers:
    """The evaluator of a file of questions."""
    items = read_chats(cfg.data, cfg.images or str(Path(cfg.data).parent))
    if cfg.most and cfg.most < len(items):
        items = [items[index * len(items) // cfg.most] for index in range(cfg.most)]
    vocabulary: Any = read_json(cfg.vocabulary, "vocabulary") if cfg.vocabulary else []
    return Answers(items, cfg.name or Path(cfg.data).stem, vocabulary=vocabulary)
