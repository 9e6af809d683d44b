"""A project as the next papers need it: chats of text beside chats with an image, a frozen bf16 tower, two rates, tokens.

Run by test_ready.py, and written as a project is: a config, a pipeline, a task, an evaluator and what builds them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd import distributed
from vlmkd.config import RunConfig
from vlmkd.data.loader import Loader
from vlmkd.data.samples import RawSample
from vlmkd.data.sources import ItemSource, Stream
from vlmkd.evaluation.base import Context, Result
from vlmkd.train.durations import in_steps
from vlmkd.train.engine import batch_triple
from vlmkd.train.run import main
from vlmkd.train.selection import MovingAverage
from vlmkd.train.task import Batch, StepOutput, Task, combine
from vlmkd.train.timing import Stopwatch
from vlmkd.train.trainer import Job

WORDS, WIDTH, CHATS = 11, 8, 24


@dataclass(frozen=True, kw_only=True)
class ReadyConfig(RunConfig):
    """A run on chats."""

    ema_decay: float = 0.0
    """Decay of a moving average; 0: off."""


@dataclass(frozen=True)
class Chat:
    """Item `number`: 2 to 9 words, and every other one with an image."""

    number: int

    @property
    def key(self) -> str:
        return f"chat {self.number}"

    def members(self) -> dict[str, bytes]:
        rng = random.Random(self.number)
        words = bytes(rng.randrange(WORDS) for _ in range(2 + 3 * self.number % 8))
        return {"words": words} | ({"pixels": rng.randbytes(12)} if self.number % 2 else {})


class ChatPipeline:
    """Chats stay a list: no two need be of one length, and a text has no image."""

    def process(self, raw: RawSample) -> dict[str, Any]:
        """The tokens of a chat, and its image where it has one."""
        image = {}
        if "pixels" in raw.members:
            pixels = torch.tensor(list(raw.members["pixels"])).view(3, 2, 2) / 128 - 1
            image = {"image": {"pixels": pixels}}
        return {"key": raw.name, "tokens": torch.tensor(list(raw.members["words"])), **image}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Nested, as the samples are."""
        return {"keys": [one["key"] for one in samples], "chats": samples}

    def check(self, batch: Batch, size: int) -> None:
        """As many as were asked for."""
        assert len(batch["chats"]) == size

    def describe(self) -> dict[str, Any]:
        """Nothing beside the items."""
        return {}


def chat(number: int) -> dict[str, Any]:
    """Chat `number`, ready to be collated."""
    one = Chat(number)
    return ChatPipeline().process(RawSample("", one.key, one.members()))


def build_chats(cfg: ReadyConfig) -> Loader:
    """Every chat once an epoch, whatever ranks and micro-batches share them."""
    _, accumulation = batch_triple(cfg, distributed.world_size())
    source = ItemSource(
        {"chats": Stream([Chat(number) for number in range(CHATS)], cfg.batch_size)}, seed=cfg.seed,
        rank=distributed.rank(), world_size=distributed.world_size(), accumulation=accumulation,
    )  # fmt: skip
    return Loader(source, ChatPipeline(), workers=0)


class Student(nn.Module):
    """A frozen bf16 tower, and a projector, words and a head in fp32 that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(12, WIDTH).bfloat16().requires_grad_(False)
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, chats: list[dict[str, Any]]) -> list[Tensor]:
        """Logits [T - 1, WORDS] of each chat's next tokens."""
        logits = []
        for one in chats:
            # A text has a blank image that counts nothing: see `Task.step`.
            pixels = one["image"]["pixels"] if "image" in one else torch.zeros(3, 2, 2)
            seen = self.projector(self.tower(pixels.flatten().to(self.tower.weight.dtype)).float())
            logits.append(self.head(self.words(one["tokens"][:-1]) + ("image" in one) * seen))
        return logits


def loss_of(student: Any, chats: list[dict[str, Any]]) -> Tensor:
    """Mean over all next tokens of the chats."""
    targets = torch.cat([one["tokens"][1:] for one in chats])
    return F.cross_entropy(torch.cat(student(chats)), targets)


class ReadyTask(Task):
    """Next-token prediction."""

    def __init__(self, cfg: ReadyConfig) -> None:
        torch.manual_seed(0)
        self.core = Student()
        self.student = self.core
        self.teachers = []
        self.watch = Stopwatch()
        self.average = MovingAverage(cfg.ema_decay) if cfg.ema_decay else None

    def step(self, batch: Batch, step: int) -> StepOutput:
        """One micro-batch."""
        return combine({"next_token": loss_of(self.student, batch["chats"])}, {"next_token": 1.0})

    def weight(self, batch: Batch) -> float:
        """Tokens that are predicted."""
        return sum(len(one["tokens"]) - 1 for one in batch["chats"])

    def items(self, batch: Batch) -> dict[str, float]:
        """Chats and tokens."""
        return {"samples": len(batch["keys"]), "tokens": self.weight(batch)}

    def predictor(self) -> Student:
        """The student itself."""
        return self.core

    def export(self, folder: Path, weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """A file of tensors."""
        folder.mkdir(exist_ok=True)
        torch.save(weights, folder / "weights.pt")
        return weights

    def check_exports(self, written: dict[Path, dict[str, Tensor]]) -> None:
        """Read it again."""
        for folder, weights in written.items():
            found = torch.load(folder / "weights.pt", weights_only=True)
            assert all(torch.equal(found[name], value) for name, value in weights.items())


class Perplexity:
    """An evaluator of its own, with a metric that is no share."""

    name = "perplexity"

    def run(self, predictor: Student, context: Context) -> list[Result]:
        """On two chats that are not trained on; every rank has all of them."""
        with torch.no_grad():
            loss = loss_of(predictor, [chat(100), chat(101)])
        return [Result(self.name, "held-out chats", {"perplexity": math.exp(float(loss))}, 2)]


def build(cfg: ReadyConfig) -> Job:
    """The job of a run."""
    loader = build_chats(cfg)
    cfg = in_steps(cfg, loader.samples_per_epoch // cfg.batch_size)
    return Job(cfg, ReadyTask(cfg), loader, [Perplexity()])


if __name__ == "__main__":
    main(ReadyConfig, build)
