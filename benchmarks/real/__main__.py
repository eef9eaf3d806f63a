"""When does a mixture earn its bytes? SmolLM2-135M on real text, four situations, three seeds.

python -m benchmarks.real --folder F                      # everything: six hours on two cores
python -m benchmarks.real --folder F --until looks        # checkpoints, and what is made of them
python -m benchmarks.real --folder F --seeds 0
python -m benchmarks.real --folder F --resume             # what benchmarks/real/results has not yet
python -m benchmarks.real --folder F --tables --write     # what is there, into benchmarks/README.md

What is done is in F/results as JSON; the same command goes on from there. Every worker has one
thread, and up to 10.5 GB of memory.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.merge_plot import Table
from benchmarks.paper.tables import replace_section
from benchmarks.paper.workers import run_jobs
from benchmarks.real.arms import SEEDS, SITUATIONS, Situation
from benchmarks.real.jobs import (
    Job,
    arm_jobs,
    best_rates,
    results_of,
    run_job,
    sweep_jobs,
    with_needs,
)
from benchmarks.real.stages import STAGES, Stage
from benchmarks.real.tables import Results, all_tables, seconds
from benchmarks.real.text import prepare
from benchmarks.real.verdicts import VERDICTS, Verdict
from upit_merge.errors import UpitError

README = Path(__file__).resolve().parents[1] / "README.md"
RECORD = Path(__file__).with_name("results")
KINDS: dict[str, Sequence[Stage | Verdict | Situation]] = {
    "stages": STAGES,
    "verdicts": VERDICTS,
    "looks": SITUATIONS,
}
PARTS = (*KINDS, "arms")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for models; up to 30 GB")
    parser.add_argument("--workers", type=int, default=2, help="processes, a CPU thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--until", choices=PARTS, default=PARTS[-1], help="stop after this part")
    parser.add_argument("--tables", action="store_true", help="only what is there already")
    parser.add_argument("--resume", action="store_true", help="begin with the recorded results")
    parser.add_argument("--write", action="store_true", help="record results, tables in README.md")
    return parser.parse_args()


def work(folder: Path, seeds: Sequence[int], until: str, workers: int) -> None:
    """Do what is not done yet: what chooses the rates, then the first seed first."""

    def do(jobs: Sequence[Job]) -> None:
        run_jobs(folder, with_needs(folder, jobs), partial(run_job, folder), workers)

    prepare(folder)
    parts = PARTS[: 1 + PARTS.index(until)]
    kinds = [kind for part in parts for kind in KINDS.get(part, ())]
    jobs = {seed: [Job(seed, kind) for kind in kinds] for seed in seeds}
    if until == PARTS[-1]:
        do(sweep_jobs())
        for seed in seeds:
            jobs[seed] += arm_jobs(seed, best_rates(folder))
    do([job for seed in seeds for job in jobs[seed]])  # without a pause between the seeds


def resume(folder: Path) -> None:
    """Begin with the results that are in the repository; models are trained where one is needed."""
    shutil.copytree(RECORD, results_of(folder), dirs_exist_ok=True)


def record(folder: Path, tables: Sequence[Table]) -> None:
    """Put the tables into README.md, and what they were made of beside this file."""
    shutil.copytree(results_of(folder), RECORD, dirs_exist_ok=True)
    replace_section(README, "benchmarks.real", tables)


def main() -> None:
    options = arguments()
    folder, seeds = options.folder, options.seeds
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if options.resume:
            resume(folder)
        if not options.tables:
            work(folder, seeds, options.until, options.workers)
        results = Results(folder, seeds, best_rates(folder))
        tables = [table for table in all_tables(results) if table.rows]
        for table in tables:
            table.print()
        print(f"{seconds(folder, seeds) / 3600:.1f} hours of a core")
        if options.write:
            record(folder, tables)
    except UpitError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
