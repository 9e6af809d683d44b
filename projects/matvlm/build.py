"""From a MaTVLM config to a job: teacher, hybrid, chats, questions."""

from __future__ import annotations

from projects.matvlm.config import MatvlmConfig
from projects.matvlm.student import build_student, build_teacher
from projects.matvlm.task import MatvlmTask
from vlmkd.chat_runs import chat_loader, chat_tokens, check_pair, questions, use_features
from vlmkd.train.durations import in_steps
from vlmkd.train.trainer import Job


def job(cfg: MatvlmConfig) -> Job:
    """The one stage, at any share of replaced layers."""
    teacher = None if cfg.data.teacher_outputs else build_teacher(cfg)
    student = build_student(cfg, teacher)
    if teacher is not None:
        check_pair(student, teacher)
    use_features(cfg, student, teacher)
    tokens = chat_tokens(cfg, student)
    before = cfg.teacher.init_from or cfg.student.init_from
    loader = chat_loader(cfg, student, tokens, temperature=cfg.loss.temperature, teacher=before)
    cfg = in_steps(cfg, loader.samples_per_epoch // cfg.batch_size)
    asked = [questions(one) for one in cfg.evaluation.questions]
    return Job(cfg, MatvlmTask(cfg, student, tokens, teacher), loader, asked)
