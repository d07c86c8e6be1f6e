"""Work on many items by all cores, results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(work: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> Iterator[R]:
    """work(item) of each, in order, by `threads` threads (default: all cores).

    At most `threads` are worked on at a time, and at most four times as many are begun and not taken yet. Threads, not
    processes: reading files and Pillow's decoding and resizing release the GIL.
    """
    threads = cores() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    return _ahead(work, iter(items), threads)


def _ahead(work: Callable[[T], R], items: Iterator[T], threads: int) -> Iterator[R]:
    pool = ThreadPoolExecutor(threads)
    try:
        begun = deque(pool.submit(work, item) for item in islice(items, 4 * threads))
        while begun:
            result = begun.popleft().result()
            begun.extend(pool.submit(work, item) for item in islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
