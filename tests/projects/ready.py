"""A project as the next papers need it: chats of text beside chats with an image, a frozen bf16 tower, two rates, tokens.

Run by test_ready.py, and written as a project is: a config, a loader, a task, an evaluator and what builds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd import distributed
from vlmkd.config import RunConfig
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


def chat(number: int) -> dict[str, Any]:
    """Chat `number`: 2 to 9 tokens, and every other one with an image."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(WORDS, (2 + 3 * number % 8,), generator=generator)
    image = {"image": {"pixels": torch.randn(3, 2, 2, generator=generator)}} if number % 2 else {}
    return {"tokens": tokens, **image}


class Chats:
    """Endless micro-batches of chats: every chat once an epoch, whatever ranks and micro-batches share them."""

    samples_per_epoch = CHATS

    def __init__(self, cfg: ReadyConfig) -> None:
        self._micro, _ = batch_triple(cfg, distributed.world_size())
        self._delivered = 0
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first = (self._delivered * distributed.world_size() + distributed.rank()) * self._micro
            self._delivered += 1
            numbers = [number % CHATS for number in range(first, first + self._micro)]
            yield {
                "keys": [f"chat {number}" for number in numbers],
                "chats": [chat(number) for number in numbers],
            }

    def state_dict(self) -> dict[str, Any]:
        return {"delivered": self._delivered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._delivered = state["delivered"]

    def describe(self) -> dict[str, Any]:
        return {"kind": "chats"}

    def check_bad_share(self) -> None: ...


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
    loader = Chats(cfg)
    cfg = in_steps(cfg, loader.samples_per_epoch // cfg.batch_size)
    return Job(cfg, ReadyTask(cfg), loader, [Perplexity()])


if __name__ == "__main__":
    main(ReadyConfig, build)
