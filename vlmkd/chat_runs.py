"""What runs on chats have in common: the loader of a config's chats, its questions, and the task around two models."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmkd import distributed
from vlmkd.chat_config import ChatRunConfig, QuestionsConfig
from vlmkd.config import DataConfig, SourceConfig, require
from vlmkd.data.chat_outputs import ChatOutputs, Features, record_key
from vlmkd.data.chats import ATTRIBUTIONS, ChatPipeline, ChatTokens, read_chats
from vlmkd.data.loader import Loader
from vlmkd.data.shards import is_remote, known_samples
from vlmkd.data.sources import ItemSource, ShardSource, Source, Stream
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import Answers, ChatModel
from vlmkd.evaluation.base import spread
from vlmkd.export.folder import Probe
from vlmkd.export.mllm import (
    CONFIG,
    ChatParts,
    Surgery,
    check_mllms,
    export_digest,
    export_folder,
    export_mllm,
    load_mllm,
    tower_digest,
)
from vlmkd.files import read_json, read_object
from vlmkd.image_spec import ImageSpec
from vlmkd.losses.tokens import TopK
from vlmkd.models.mllm import Mllm, see_alike
from vlmkd.models.towers import compute_dtype
from vlmkd.train.engine import Engine, batch_triple
from vlmkd.train.task import Batch, Task
from vlmkd.train.timing import Stopwatch

log = logging.getLogger(__name__)


def check_pair(student: ChatParts, teacher: ChatParts) -> None:
    """Refuse a teacher that does not read what the student reads."""
    check_alike(
        (f"student {student.config.decoder}", student.tokenizer, student.module, student.image_spec),
        (f"teacher {teacher.config.decoder}", teacher.tokenizer, teacher.module, teacher.image_spec),
    )


def use_features(cfg: ChatRunConfig, student: ChatParts, teacher: ChatParts | None) -> None:
    """Let both take their pictures from `data.features`; refuses those of another tower than the student's, or two towers."""
    if not cfg.data.features:
        return
    stored = Features(cfg.data.features)
    if stored.info.digest != tower_digest(student.module.tower):
        told = f"is of the tower of {stored.info.source}, which is not the student's; run {stored.info.tools} with that one"
        raise UserError(f"config field data.features: {cfg.data.features} {told}")
    if teacher is not None and not see_alike(student.module.tower, teacher.module.tower):
        told = "serves one tower, and the teacher's is another than the student's; leave it out"
        raise UserError(f"config field data.features: {cfg.data.features} {told}")
    for parts in (student, teacher):
        if parts is not None:
            parts.features = stored


Reader = tuple[str, Any, Any, ImageSpec]
"""How a message calls a model, its tokenizer, its `Mllm`, and the images that it takes."""


def check_alike(student: Reader, teacher: Reader) -> None:
    """Refuse models of two vocabularies, or that do not read images alike."""
    (ours, own, first, spec), (theirs, other, second, wanted) = student, teacher
    if own.get_vocab() != other.get_vocab():
        raise UserError(
            f"the vocabularies of {ours} and {theirs} differ; distil between models of one tokenizer"
        )
    if (first.tower.tokens, spec) != (second.tower.tokens, wanted):
        raise UserError(
            f"the student has {first.tower.tokens} features an image of {spec.size}, the teacher {second.tower.tokens} of "
            f"{wanted.size}; give both the same tower, grid and image_size"
        )


def chat_tokens(cfg: ChatRunConfig, student: ChatParts) -> ChatTokens:
    """The config's template in the student's tokens."""
    places: Any = student.module.tower.tokens
    return ChatTokens(student.tokenizer, cfg.data.template, places)


def chat_loader(
    cfg: ChatRunConfig,
    student: ChatParts,
    tokens: ChatTokens,
    *,
    pairs: bool = False,
    temperature: float = 1.0,
    vocabulary: int = 0,
    teacher: str = "",
) -> Loader:
    """Every chat once an epoch, beside what a stored teacher said of it; that one has to be of this kind.

    Args:
        pairs: the run takes preference pairs; `temperature` and `vocabulary` are of the loss of others, 0: the student's.
        teacher: the export that it has to be of; empty: as the config names it, or any.
    """
    data, world_size = cfg.data, distributed.world_size()
    micro, accumulation = batch_triple(cfg, world_size)
    ranks: dict[str, Any] = {"seed": cfg.seed, "rank": distributed.rank(), "world_size": world_size}
    keys: list[str] = []
    urls: list[str] = []
    source: Source
    if is_shards(data.chats, "config field data.chats"):
        require(not data.images, "data.images", "goes with JSON files; shards hold their images")
        packed = DataConfig(sources=[SourceConfig(shards=data.chats)], workers=data.workers)
        source = ShardSource(packed, **ranks, micro_batch_size=micro, field="data.chats", whole=True)
        (urls,) = source.shards
        source.samples_per_epoch = known_samples(urls) or 0
    else:
        files = [read_chats(path, data.images or str(Path(path).parent)) for path in data.chats]
        items = [item for own in files for item in own]
        for path, own in zip(data.chats, files, strict=True):
            log.info("%s: %d chats", path, len(own))
        log.info("%d chats in all", len(items))
        source = ItemSource({"chats": Stream(items, cfg.batch_size)}, **ranks, accumulation=accumulation)
        keys = [record_key(item.content()) for item in items] if data.teacher_outputs else []
    pipeline = ChatPipeline(
        tokens, student.image_spec, max_length=data.max_length, pack=data.pack, max_pixels=data.max_pixels,
        stored=ChatOutputs(data.teacher_outputs) if data.teacher_outputs else None, features=student.features,
    )  # fmt: skip
    if pipeline.stored is not None:
        teacher = teacher or cfg.teacher.init_from
        loss = {"temperature": temperature, "vocabulary": vocabulary or student.module.head.out_features}
        wanted = pipeline.outputs_info(
            source=teacher, digest=export_digest(teacher) if teacher else "", pairs=pairs, **({} if pairs else loss)
        )  # fmt: skip
        pipeline.stored.check(wanted, shards=urls, keys=keys, max_missing_share=data.max_bad_share)
    return Loader(source, pipeline, workers=data.workers, max_bad_share=data.max_bad_share)


def is_shards(chats: Sequence[str], where: str) -> bool:
    """Whether these are shards, not JSON files; refuses some of each."""
    shards = [one for one in chats if ".tar" in one or is_remote(one)]
    if shards and len(shards) < len(chats):
        raise UserError(f"{where} names shards ({shards[0]}) and JSON files; give one kind")
    return bool(shards)


def stored_teacher(batch: Batch) -> TopK | None:
    """What a stored teacher said at the batch's targets, in their order."""
    if "teacher_ids" not in batch:
        return None
    return TopK(batch["teacher_log_probs"], batch["teacher_ids"], batch["teacher_log_tail"])


def questions(cfg: QuestionsConfig) -> Answers:
    """The evaluator of a file of questions."""
    folder = Path(cfg.data).parent
    items = read_chats(cfg.data, cfg.images or str(folder))
    vocabulary: Any = read_json(cfg.vocabulary, "vocabulary") if cfg.vocabulary else []
    credits_file = folder / ATTRIBUTIONS
    owners: Any = read_json(credits_file, "attributions") if credits_file.is_file() else []
    where = f"evaluation.questions: {cfg.data}"
    require(bool(items), where, "has no question; name another file")
    twice = [key for key, times in Counter(item.key for item in items).items() if times > 1]
    require(not twice, where, f"has two questions {', '.join(twice[:1])}; give each its own id")
    named = isinstance(vocabulary, list) and all(isinstance(name, str) for name in vocabulary)
    if any(item.record.get("kind") == "caption" for item in items):
        require(bool(named and vocabulary), where, "has captions; give their `vocabulary`, a list of names")
    asked, name = spread(items, cfg.most), cfg.name or Path(cfg.data).stem
    try:
        return Answers(asked, name, vocabulary=vocabulary if named else (), attributions=owners)
    except UserError as error:
        raise UserError(f"config field {where}: {error}") from None


def open_chat(
    model: str,
    surgery_of: Callable[[str], Surgery],
    *,
    project: str = "",
    template: str = "",
    precision: str = "fp32",
    device: str = "",
) -> ChatModel:
    """The model of a run, or of its `export`; what is not given is as the export says.

    `surgery_of`: of a project's name, `projects.surgery_of`.
    """
    folder = export_folder(model)
    content = read_object(folder / CONFIG, "--model", "name a run, or its `export` folder")
    owner = project or str(content.get("project", ""))
    surgery = surgery_of(owner) if owner or content.get("facts") else None
    where = distributed.device_named(device)
    parts = load_mllm(folder, surgery=surgery, precision=precision)
    module: Any = parts.module.eval().to(where)
    tokens = ChatTokens(parts.tokenizer, template or parts.template, module.tower.tokens)
    return ChatModel(model, module, tokens, parts.image_spec)


class ChatTask(Task):
    """A multimodal student, and the frozen teacher where there is one; a project adds `step` and `weight`."""

    checker: str
    """The module that reloads this project's exports: `vlmkd.export.mllm.check_mllms`."""

    def __init__(self, parts: ChatParts, tokens: ChatTokens, teacher: ChatParts | None) -> None:
        self.parts, self.tokens, self.teacher = parts, tokens, teacher
        self.core: Mllm = parts.module
        self.student: nn.Module = self.core
        self.teachers: list[nn.Module] = [] if teacher is None else [teacher.module]
        self.watch = Stopwatch()
        self.one_tower = teacher is not None and see_alike(parts.module.tower, teacher.module.tower)

    def teacher_head(self) -> AbstractContextManager[None]:
        """Inside, the teacher's head is whole, also where the ranks share the teacher; a collective."""
        return Engine.whole_weights([] if self.teacher is None else [self.teacher.module.head])

    @contextmanager
    def looks(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the teacher's pass leaves what its tower saw, for the student's batch where that one's tower is the same."""
        found: dict[str, Tensor] = {}
        tower: Any = self.teacher.module.tower if self.teacher else None
        if not (self.one_tower and compute_dtype(tower) == compute_dtype(self.core.tower)):
            yield found
            return
        handle = tower.register_forward_hook(lambda module, args, output: found.update(seen=output))
        try:
            yield found
        finally:
            handle.remove()

    def items(self, batch: Batch) -> dict[str, float]:
        """Chats, and tokens of all kinds."""
        return {"samples": len(batch["keys"]), "tokens": float((batch["segments"] > 0).sum())}

    def predictor(self) -> ChatModel:
        """The student as it answers."""
        return ChatModel("student", self.core, self.tokens, self.parts.image_spec, self.parts.features)

    def teacher_predictors(self) -> dict[str, ChatModel]:
        """The teacher as it answers."""
        if self.teacher is None:
            return {}
        spec, features = self.teacher.image_spec, self.teacher.features
        return {"teacher": ChatModel("teacher", self.teacher.module, self.tokens, spec, features)}

    def parameter_counts(self) -> dict[str, int]:
        """Of student and teacher."""
        found = {"student": self.core}
        if self.teacher is not None:
            found["teacher"] = self.teacher.module
        return {name: sum(p.numel() for p in module.parameters()) for name, module in found.items()}

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> Probe:
        """What was trained in this run or one before it."""
        project = self.checker.split(".")[1]
        parts = replace(self.parts, project=project, template=self.tokens.template_name)
        return export_mllm(folder, parts, weights)

    def check_exports(self, written: dict[Path, Probe]) -> None:
        """Reload and compare."""
        check_mllms(written, self.checker)
