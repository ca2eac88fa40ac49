"""One pass over a large buffer, shared among threads: NumPy's sums and hashlib work without the interpreter's lock."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MAX_THREADS = 4
LEAST_PIECES = 4  # of a thread: below that starting it costs more than it saves


def by_parts(work: Callable[[range], T], num_pieces: int) -> list[T]:
    """The results of ``work`` on successive ranges of pieces, in their order; one range where it is little work.

    Args:
        work: is given some of the pieces by their numbers; called in several threads at a time.
        num_pieces: how many there are.
    """
    num_threads = max(1, min(MAX_THREADS, num_pieces // LEAST_PIECES, os.cpu_count() or 1))
    bounds = [index * num_pieces // num_threads for index in range(num_threads + 1)]
    parts = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
    if num_threads == 1:
        return [work(parts[0])]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, parts))
