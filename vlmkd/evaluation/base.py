"""What evaluators ask of a model, and what they give back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from vlmkd import distributed
from vlmkd.data.labelled import Item
from vlmkd.errors import UserError
from vlmkd.results import Meaning

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    device: torch.device = torch.device("cpu")
    batch_size: int = 64
    """Images, or texts, per forward pass."""
    workers: int = 0
    """Loader processes per rank; 0 decodes in the calling process."""
    progress: bool = True
    """Show a progress line, on rank 0."""
    max_unreadable_share: float = 0.01
    """A larger share of unreadable images is an error."""
    embedded: dict[Any, Any] | None = None
    """Image embeddings, shared by evaluations of the same images; None: not kept."""


@dataclass(frozen=True)
class Result:
    name: str
    """Of the evaluator."""
    dataset: str
    metrics: dict[str, float]
    """Scores, which tables compare; shares are in [0, 1]."""
    count: int
    """Images that were evaluated."""
    details: dict[str, Any] = field(default_factory=dict)
    """What is too long for a table (per-class counts, unreadable files); plain data."""
    chosen: dict[str, float] = field(default_factory=dict)
    """What was fitted on these images, such as the weight of a mixture."""
    meanings: dict[str, Meaning] = field(default_factory=dict)
    """One without a meaning is shown as a bare number that nobody wins."""


class Evaluator(Protocol):
    """One evaluation of any predictor with the protocol it needs."""

    name: str

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """All ranks together, each with the same results; a predictor without the protocol is refused."""


@runtime_checkable
class OfItems(Protocol):
    """An evaluator of labelled images, whose mistakes can be shown."""

    dataset: str
    items: list[Item]


@runtime_checkable
class OfQuestions(Protocol):
    """An evaluator of questions about images, whose answers can be shown."""

    dataset: str
    attributions: list[str]

    def pictures(self) -> dict[str, list[bytes]]:
        """Key -> images of the questions that are shown."""


def require_protocol(evaluator: str, predictor: Any, protocol: type[Any]) -> None:
    """Refuse a predictor without the members of `protocol`."""
    if isinstance(predictor, protocol):
        return
    bases = (vars(base) for base in protocol.__mro__)
    members = {name for own in bases for name in (*own, *own.get("__annotations__", ()))}
    lacking = sorted(name for name in members if not name.startswith("_") and not hasattr(predictor, name))
    told = f"{type(predictor).__name__} has no {', '.join(lacking)}; leave it out for this model"
    raise UserError(f"evaluator {evaluator} needs a {protocol.__name__}, but {told}")


def spread(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many, always the same, in their order; 0: all.

    Drawn, because every n-th would leave out kinds that take turns.
    """
    if not 0 < most < len(items):
        return items
    return [items[index] for index in sorted(random.Random(0).sample(range(len(items)), most))]


def progress(items: Iterable[T], total: int, title: str, context: Context) -> Iterator[T]:
    """`items` with a progress line that shows the time left (rank 0 only)."""
    from tqdm import tqdm

    hidden = not (context.progress and distributed.is_main())
    every = 1.0 if sys.stderr.isatty() else 10.0  # seconds; log files get fewer lines
    return iter(tqdm(items, title, total, disable=hidden, mininterval=every, dynamic_ncols=True))
