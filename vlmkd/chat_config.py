"""Config of runs on chats: data, multimodal models, and what they are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from vlmkd.config import (
    Count,
    EvaluationConfig,
    LayerList,
    Positive,
    Processes,
    Range,
    RunConfig,
    Share,
    require,
)


@dataclass(frozen=True, kw_only=True)
class ChatDataConfig:
    """Conversations to train on."""

    chats: list[str] = field(default_factory=list)
    """LLaVA JSON files, or shards of them (`data/{00000..00099}.tar`); preference records where the stage takes pairs."""
    images: str = ""
    """Folder that the image paths of JSON files are below."""
    template: str = "llava"
    """How a conversation is written: `llava` (USER: ... ASSISTANT: ...), `chatml`, or `plain` (questions and answers alone)."""
    max_length: Positive = 2048
    """Tokens of a row, places of images included; a longer chat loses its end (`cut` in metrics.jsonl), an image in it: all."""
    pack: bool = False
    """Put several chats into a row."""
    workers: Processes = 2
    """Loader processes per rank."""
    max_pixels: Positive = 89_478_485
    """Images with more pixels than this are refused before they are decoded."""
    max_bad_share: Share = 0.0
    """The run stops when more than this share of the chats cannot be used; 0: at the first."""
    teacher_outputs: str = ""
    """Folder written by data_tools/embed_chats.py; the teacher is then not loaded, and where it is named, compared by digest."""
    features: str = ""
    """Folder written by data_tools/embed_pictures.py with the student's tower, which pictures that it has do not go through."""


@dataclass(frozen=True, kw_only=True)
class MllmConfig:
    """A multimodal model: what it is made of, or the export of an earlier run."""

    init_from: str = ""
    """A run, its `export` folder or `zoo:NAME`; the other fields are then its own and stay empty."""
    tower: str = ""
    """Vision tower, as load_backbone takes it: `clip:ViT-L-14-336@openai`, `timm:NAME`, `efficientnet-lite0`."""
    tower_layers: Annotated[list[int], Range(-1000, 1000)] = field(default_factory=lambda: [-2])
    """Blocks or stages whose outputs, side by side, are the features."""
    grid: Count = 0
    """Pool the features to so many places each way; 0: as the last of the layers has."""
    tower_norm: bool = False
    """Features of each place get mean 0 and variance 1; maps of convolutional networks want it, whose values are large."""
    drop_first: bool = False
    """Leave out the first place, as TinyLLaVA does for a class token that SigLIP does not have."""
    image_size: Count = 0
    """Side of the input in pixels; 0: the weights' own."""
    resize: Literal["shortest", "longest", "squash"] = "longest"
    """How an image becomes square: cropped, padded with the mean colour (LLaVA's `pad`), or not kept in ratio."""
    decoder: str = ""
    """Language model: `hf:FOLDER_OR_NAME`, or `smollm2`, which a package carries."""
    decoder_layers: LayerList = field(default_factory=list)
    """LayerList of it that are kept; empty: all."""
    lora_rank: Count = 0
    """Rank of updates that the decoder's linear layers get and that are trained in their place; 0: none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of a teacher's weights; a student's are those of deepspeed.precision."""

    def __post_init__(self) -> None:
        made = bool(self.tower and self.decoder)
        require(
            not (self.init_from and (self.tower or self.decoder)),
            "init_from",
            "leaves no choice of tower and decoder",
        )
        require(
            made or bool(self.init_from) or not (self.tower or self.decoder),
            "tower",
            "and decoder go together",
        )

    @property
    def named(self) -> bool:
        """Whether it says anything."""
        return bool(self.init_from or self.tower)


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """A file of questions with known answers."""

    name: str = ""
    """Name in tables and logs; empty: the file's."""
    data: str = ""
    """LLaVA JSON whose last turn is asked; `kind` of a record says how the answer is scored."""
    images: str = ""
    """Folder of the images."""
    vocabulary: str = ""
    """JSON list of all things that a caption may name; captions need it."""
    most: Count = 0
    """Ask so many of them, drawn from the file; 0: all."""


@dataclass(frozen=True, kw_only=True)
class ChatEvaluationConfig(EvaluationConfig):
    """What the model is asked."""

    questions: list[QuestionsConfig] = field(default_factory=list)
    """Files of questions."""


@dataclass(frozen=True, kw_only=True)
class ChatRunConfig(RunConfig):
    """A run on chats."""

    varied: ClassVar[bool] = True
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    """Conversations to train on."""
    student: MllmConfig = field(default_factory=MllmConfig)
    """The model that is trained."""
    teacher: MllmConfig = field(default_factory=MllmConfig)
    """The model that it learns from, where the stage has one."""
    evaluation: ChatEvaluationConfig = field(default_factory=ChatEvaluationConfig)
    """Evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unnamed = not (self.data.teacher_outputs and self.teacher.tower)
        require(
            unnamed,
            "teacher.tower",
            "goes with no data.teacher_outputs; name the export that they are of, or nothing",
        )
