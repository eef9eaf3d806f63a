"""Jobs of benchmarks.paper and benchmarks.real, shared between worker processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from upit_merge.runtime.parallel import progress_bar


class Job(Protocol):
    """A unit of work, which knows where its result is."""

    @property
    def label(self) -> str: ...

    def needs(self) -> Sequence[Any]: ...

    def result(self, folder: Path) -> Any: ...


_Job = TypeVar("_Job", bound=Job)


def prepare_worker() -> None:
    """One thread: models this small gain nothing from more."""
    import logging

    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU; the CPU is not changed
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("upit_merge").setLevel(logging.ERROR)  # random gates are meant


def run_jobs(
    folder: Path,
    jobs: Sequence[_Job],
    work: Callable[[_Job], Any],
    workers: int,
    *,
    quiet: bool = False,
) -> list[str]:
    """Do what is not done yet, in order, as soon as what a job needs is there.

    Args:
        jobs: With everything they need among them, or done already.
        work: Does one of them and writes its result; it is sent to the workers.
        workers: Processes; 0 to work in this one.

    Returns:
        The jobs that were done now, by their labels.
    """
    waiting = [job for job in jobs if job.result(folder) is None]
    done: list[str] = []
    with progress_bar(len(waiting), "jobs", quiet=quiet, unit="job") as bar:

        def finished(job: Job, seconds: float) -> None:
            done.append(job.label)
            bar.set_description(f"{done[-1]} ({seconds:.0f} s)")
            bar.update()

        if not workers:
            for job in waiting:
                started = time.perf_counter()
                work(job)
                finished(job, time.perf_counter() - started)
            return done
        # Started before torch is loaded in the children, whose arithmetic libraries ask for it.
        os.environ["OMP_NUM_THREADS"] = "1"
        # Freed memory is kept: fresh pages for every large tensor cost a fifth of a step (glibc).
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=prepare_worker
        )
        running: dict[Future, tuple[Job, float]] = {}
        try:
            while waiting or running:
                ready = [job for job in waiting if is_ready(job, folder)]
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    future = pool.submit(work, job)
                    running[future] = (job, time.perf_counter())
                if not running:
                    raise ValueError(f"{waiting[0].label} needs what is not among the jobs")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, started = running.pop(future)
                    future.result()
                    finished(job, time.perf_counter() - started)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return done


def is_ready(job: Job, folder: Path) -> bool:
    return all(needed.result(folder) is not None for needed in job.needs())
