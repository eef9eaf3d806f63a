"""Row blocks: the unit in which tensors are read, computed and written, several at a time."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """`map` over a few threads: results in order, at most `workers + 1` items under way.

    Every item is computed by one thread with single-threaded kernels, so that a result does not
    depend on the number of threads; reading, arithmetic and writing of different blocks overlap.
    The first exception stops the rest.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(max_workers=workers, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # Threads started later take the last value set anywhere as their default.
        torch.set_num_threads(threads)


def progress_bar(total: int, description: str, *, quiet: bool, unit: str = "B") -> tqdm:
    """Return a progress bar with the time left, on standard error; bytes unless told otherwise."""
    return tqdm(
        total=total,
        desc=description,
        disable=quiet,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        # A log file keeps every line that a terminal overwrites.
        mininterval=0.5 if sys.stderr.isatty() else 2,
    )
