"""From a LLaVA-MoD config to a job: student, teacher, chats, questions."""

from __future__ import annotations

from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.student import build_student, surgery
from projects.llava_mod.task import LlavaModTask
from vlmkd.chat_runs import chat_loader, chat_tokens, check_pair, questions, use_features
from vlmkd.export.mllm import build_mllm
from vlmkd.train.durations import in_steps
from vlmkd.train.task import frozen
from vlmkd.train.trainer import Job


def job(cfg: LlavaModConfig) -> Job:
    """The run of any stage."""
    student = build_student(cfg)
    teacher = None
    if cfg.teacher.named and not cfg.data.teacher_outputs:
        teacher = build_mllm(cfg.teacher, surgery=surgery)
        frozen(teacher.module)
        check_pair(student, teacher)
    use_features(cfg, student, teacher)
    tokens = chat_tokens(cfg, student)
    loader = chat_loader(
        cfg, student, tokens, pairs=cfg.stage == "prefer", temperature=cfg.loss.temperature,
        vocabulary=cfg.loss.vocabulary,
    )  # fmt: skip
    cfg = in_steps(cfg, loader.samples_per_epoch // cfg.batch_size)
    asked = [questions(one) for one in cfg.evaluation.questions]
    return Job(cfg, LlavaModTask(cfg, student, tokens, teacher), loader, asked)
