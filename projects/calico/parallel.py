"""One job after the other, or several at a time, with a line of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from tqdm import tqdm

Result = TypeVar("Result")


def each(
    job: Callable[[int], Result], numbers: Sequence[int], workers: int, title: str, done: int = 0
) -> list[Result]:
    """`job(number)` for each of the numbers, in order; `done` more were finished by an earlier call.

    With more than one worker the job is pickled: it is a `functools.partial` of a module's function.
    """
    shown = {"total": done + len(numbers), "initial": done, "mininterval": 1 if sys.stderr.isatty() else 10}
    if workers == 1:
        return list(tqdm(map(job, numbers), title, **shown))
    chunk = max(1, min(64, len(numbers) // (4 * workers)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(tqdm(pool.map(job, numbers, chunksize=chunk), title, **shown))
