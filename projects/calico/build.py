"""From a CALICO config to a job: frames, pipeline, student, teacher, evaluation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from projects.calico.balance import PasteDatabase, balanced
from projects.calico.config import UNTRAINED, CalicoConfig
from projects.calico.evaluation.frames import scene_evaluation
from projects.calico.frames import open_frames
from projects.calico.model import BevModel, load_pretrained
from projects.calico.networks.parts import share_norms
from projects.calico.pipeline import ContrastPipeline, LabelledPipeline, SceneItem
from projects.calico.pretraining import WEIGHTS, PretrainStudent, Teacher
from projects.calico.scenes import Frames
from projects.calico.splits import digest, fraction, read_scenes
from projects.calico.task import CalicoTask, FinetuneTask, PretrainTask
from vlmkd import distributed
from vlmkd.config import require
from vlmkd.data.loader import Loader
from vlmkd.data.sources import ItemSource, Stream
from vlmkd.errors import UserError
from vlmkd.evaluation.base import spread
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple
from vlmkd.train.trainer import Job

log = logging.getLogger("vlmkd.calico")
_LOOKED_AT = 200
"""Frames in which an object of the model's classes is looked for before a run starts."""


def job(cfg: CalicoConfig) -> Job:
    """The run of any stage."""
    data, rank, ranks = cfg.data, distributed.rank(), distributed.world_size()
    frames = open_frames(Path(data.info), Path(data.root) if data.root else None, sweeps=data.sweeps)
    indices, scenes = chosen(cfg, frames)
    log.info("%d frames of %d drives (%s)", len(indices), len(scenes), digest(scenes))
    if cfg.reads_labels and cfg.model.head.detection != "none":
        check_classes(cfg, frames, indices)
    items = items_of(cfg, frames, indices)
    source = ItemSource(
        {"scenes": Stream(items, cfg.batch_size)}, seed=cfg.seed, rank=rank, world_size=ranks,
        accumulation=batch_triple(cfg, ranks)[1],
    )  # fmt: skip
    cfg = in_steps(cfg, len(items) // cfg.batch_size)
    pipeline: ContrastPipeline | LabelledPipeline
    if cfg.stage == "finetune":
        pipeline = LabelledPipeline(cfg, frames, paste_database(cfg, frames, indices, scenes))
    else:
        pipeline = ContrastPipeline(cfg, frames)
    task = task_of(cfg)
    if ranks > 1 or cfg.deepspeed.precision != "fp32":  # one batch's norms; weights in half precision
        for part in (task.student, *task.teachers):
            share_norms(part)
    evaluators = [scene_evaluation(cfg)] if cfg.evaluation.info else []
    return Job(cfg, task, Loader(source, pipeline, workers=data.workers, max_bad_share=0.0), evaluators)


def task_of(cfg: CalicoConfig) -> CalicoTask:
    """Student, its branches from earlier stages where `init` names them, and the teacher of RAD."""
    teacher, width = None, 0
    with torch.random.fork_rng(devices=[]):  # new layers depend on the run's seed alone
        torch.manual_seed(cfg.seed)
        if cfg.stage == "rad":
            with torch.random.fork_rng(devices=[]):  # the student's weights are the same for each teacher
                teacher = Teacher(cfg)
            assert teacher.model.lidar is not None
            width = teacher.model.lidar.out_channels  # of the map that the student is held against
            if cfg.rad.teacher_ckpt == UNTRAINED:
                log.warning("the teacher is untrained; this is the control, not the method")
        student = BevModel(cfg.model) if cfg.stage == "finetune" else PretrainStudent(cfg, width)
    task = (FinetuneTask if cfg.stage == "finetune" else PretrainTask)(cfg, student, teacher)
    for branch in ("lidar", "camera"):
        if folder := getattr(cfg.init, branch):
            told = load_pretrained(task.model, Path(folder) / WEIGHTS, branch)
            log.info("%s branch from %s: %s", branch, folder, told)
    return task


def chosen(cfg: CalicoConfig, frames: Frames) -> tuple[list[int], tuple[str, ...]]:
    """Indices of the frames that are trained on, and their drives in order."""
    of_frame = frames.scenes
    there = tuple(dict.fromkeys(of_frame))
    scenes = fraction(there, cfg.data.fraction)
    if cfg.data.split_file:
        scenes = read_scenes(Path(cfg.data.split_file))
        if missing := set(scenes) - set(there):
            told = f"lacks {len(missing)} of its {len(scenes)} drives, first {min(missing)}"
            raise UserError(f"config field data.split_file: {cfg.data.info} {told}")
    # The toy world's frames are drives of their own; elsewhere frames of a drive would lie on both sides.
    told = f"is {cfg.data.fraction}, but {cfg.data.info} does not tell the drives of its frames"
    known = frames.kind == "synthdrive" or list(of_frame) != list(frames.tokens)
    whole = cfg.data.split_file or cfg.data.fraction == 100
    require(bool(known or whole), "data.fraction", f"{told}; use 100, or list frames in data.split_file")
    wanted = set(scenes)
    return [index for index, scene in enumerate(of_frame) if scene in wanted], scenes


def check_classes(cfg: CalicoConfig, frames: Frames, indices: Sequence[int]) -> None:
    """Refuse a data set that has no object of the model's classes, as far as some of its frames tell."""
    seen: dict[str, None] = {}
    some = spread(indices, _LOOKED_AT)
    for index in some:
        names = frames.classes(index)
        if set(names) & set(cfg.model.classes):
            return
        seen |= dict.fromkeys(names)
    told = f"are {', '.join(cfg.model.classes)}, of which {cfg.data.info} has none in {len(some)} frames"
    raise UserError(f"config field model.classes {told}; it has {', '.join(seen) or 'no labelled objects'}")


def items_of(cfg: CalicoConfig, frames: Frames, indices: Sequence[int]) -> list[SceneItem]:
    """What an epoch draws: each frame once, or with data.balance as often as its classes ask for."""
    tokens = frames.tokens  # which some readers make anew for each call
    if not cfg.data.balance:
        return [SceneItem(tokens[index], index) for index in indices]
    known = [[name for name in frames.classes(index) if name in cfg.model.classes] for index in indices]
    places = balanced(known, cfg.seed)
    log.info("an epoch has %d frames, drawn by class from %d", len(places), len(indices))
    times: Counter[int] = Counter()
    items = []
    for index in (indices[place] for place in places):
        times[index] += 1
        items.append(SceneItem(f"{tokens[index]}#{times[index]}", index))
    return items


def paste_database(
    cfg: CalicoConfig, frames: Frames, indices: Sequence[int], scenes: Sequence[str]
) -> PasteDatabase | None:
    """The objects that are pasted; made by rank 0 from the labelled frames where the file is missing."""
    if not cfg.data.paste:
        return None
    path = Path(cfg.data.paste)
    if distributed.is_main() and not path.exists():
        log.info("making %s from %d labelled frames", path, len(indices))
        labelled = (frames.read(index, labels=True, cameras=False) for index in indices)
        PasteDatabase.of(labelled, scenes).write(path)
    distributed.barrier()
    return PasteDatabase.read(path, scenes)
