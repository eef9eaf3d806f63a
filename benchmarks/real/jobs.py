"""Units of work of benchmarks.real: each writes one file of results, and is not done twice."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.arms import ARMS, SEEDS, SWEEP, SWEPT, Arm, Rates, Situation
from benchmarks.real.stages import Stage, train_stage
from benchmarks.real.verdicts import Verdict, judge_ahead
from upit_merge.io.text_file import write_json

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One unit of work and its result file.

    Attributes:
        kind: Checkpoints to train; what is said of them before anything is merged; a situation,
            whose models are looked at before any post-training; or an arm, which is trained further.
        rate: Of an arm.
    """

    seed: int
    kind: Stage | Verdict | Situation | Arm
    rate: float | None = None

    @property
    def name(self) -> str:
        return self.kind.name if self.rate is None else f"{self.kind.name}, rate {self.rate:g}"

    @property
    def label(self) -> str:
        return f"seed {self.seed}: {self.name}"

    def needs(self) -> list[Job]:
        """The jobs that must be done before."""
        return [Job(self.seed, needed) for needed in self.kind.needs()]

    def result(self, folder: Path) -> Result | None:
        """What was found, if the job is done and its checkpoints are there."""
        path = self.result_file(folder)
        left = self.kind.checkpoints(folder, self.seed) if isinstance(self.kind, Stage) else []
        if not path.is_file() or not all(checkpoint.is_dir() for checkpoint in left):
            return None
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        return result

    def result_file(self, folder: Path) -> Path:
        return results_of(folder) / f"seed-{self.seed}" / f"{self.name}.json"


def results_of(folder: Path) -> Path:
    """Where the results are; what else is in the folder are models."""
    return folder / "results"


def with_needs(folder: Path, jobs: Sequence[Job]) -> list[Job]:
    """Return those that are not done, each after what it needs and is not done either."""
    found: list[Job] = []

    def add(job: Job) -> None:
        if job not in found and job.result(folder) is None:
            for needed in job.needs():
                add(needed)
            found.append(job)

    for job in jobs:
        add(job)
    return found


def run_job(folder: Path, job: Job) -> Result:
    """Do one job and write its result."""
    started, cpu_started = time.perf_counter(), time.process_time()
    if isinstance(job.kind, Stage):
        result = train_stage(folder, job.kind, job.seed)
    elif isinstance(job.kind, Verdict):
        result = judge_ahead(folder, job.kind.situation, job.seed)
    else:
        from benchmarks.real.measure import look_at, post_train

        if isinstance(job.kind, Situation):
            result = look_at(folder, job.kind, job.seed)
        else:
            assert job.rate is not None
            start = job.kind.needs()[-1]
            before = Job(job.seed, start).result(folder)
            assert before is not None
            result = post_train(folder, job.kind, job.rate, job.seed, before)
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time() - cpu_started  # what other work does not change
    path = job.result_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the paths of this machine: results are recorded in the repository.
    result = json.loads(json.dumps(result).replace(f"{folder}/", ""))
    write_json(path, result)
    return result


def sweep_jobs() -> list[Job]:
    """The arms whose rates are chosen, at all of them, on the first seed."""
    return [Job(SEEDS[0], arm, rate) for rate in SWEEP for arm in SWEPT]


def best_rates(folder: Path) -> Rates:
    """Return the rate of lowest validation loss of each kind of arm; the first if none is done."""
    found: dict[str, float] = {}
    for arm in SWEPT:
        done = {rate: Job(SEEDS[0], arm, rate).result(folder) for rate in SWEEP}
        losses = {rate: sum(r["losses"]["validation"]) for rate, r in done.items() if r}
        found[arm.rates_of] = min(losses, key=losses.__getitem__, default=SWEEP[0])
    return found


def arm_jobs(seed: int, rates: Rates) -> list[Job]:
    """Every arm of a seed, at the rate of its kind."""
    return [Job(seed, arm, rates[arm.rates_of]) for arm in ARMS if seed in arm.seeds]
