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
    line = tqdm(
        total=done + len(numbers), initial=done, desc=title, mininterval=1 if sys.stderr.isatty() else 10
    )
    found = []
    if workers == 1:
        for number in numbers:
            found.append(job(number))
            line.update()
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for result in pool.map(job, numbers, chunksize=max(1, min(64, len(numbers) // (4 * workers)))):
                found.append(result)
                line.update()
    line.close()
    return found
