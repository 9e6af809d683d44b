"""One job after the other, or several at a time, with a line of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

Result = TypeVar("Result")


def each(
    job: Callable[[int], Result], numbers: Sequence[int], workers: int, title: str, done: int = 0
) -> list[Result]:
    """`job(number)` for each of the numbers, in order; `done` more were finished by an earlier call.

    With more than one worker the job is pickled once for each: it is a `functools.partial` of a module's function.
    """
    line = tqdm(
        total=done + len(numbers), initial=done, desc=title, mininterval=1 if sys.stderr.isatty() else 10
    )
    found = []
    if workers == 1:
        for number in numbers:
            found.append(job(number))
            line.update()
    else:
        chunk = max(1, min(64, len(numbers) // (4 * workers)))
        with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (job,)) as pool:
            for result in pool.map(_do, numbers, chunksize=chunk):
                found.append(result)
                line.update()
    line.close()
    return found


_job: Callable[[int], Any] | None = None
"""Of a worker."""


def _begin(job: Callable[[int], Any]) -> None:
    global _job
    _job = job


def _do(number: int) -> Any:
    assert _job is not None
    return _job(number)
