"""When does a mixture earn its bytes? SmolLM2-135M on real text, four situations, three seeds.

python -m benchmarks.real --folder F                      # everything: some hours on two cores
python -m benchmarks.real --folder F --until looks        # checkpoints, and what is made of them
python -m benchmarks.real --folder F --seeds 0
python -m benchmarks.real --folder F --tables --write     # what is there, into benchmarks/README.md

What is done is in F as JSON; the same command goes on from there. Every worker has one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.paper.tables import replace_section
from benchmarks.paper.workers import run_jobs
from benchmarks.real.arms import SEEDS, SITUATIONS
from benchmarks.real.jobs import Job, arm_jobs, best_rates, run_job, stage_jobs, sweep_jobs
from benchmarks.real.tables import Results, all_tables, seconds
from benchmarks.real.text import prepare
from benchmarks.real.verdicts import VERDICTS
from upit_merge.errors import UpitError

README = Path(__file__).resolve().parents[1] / "README.md"
PARTS = ("stages", "verdicts", "looks", "arms")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for models; up to 30 GB")
    parser.add_argument("--workers", type=int, default=2, help="processes, a CPU thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--until", choices=PARTS, default=PARTS[-1], help="stop after this part")
    parser.add_argument("--tables", action="store_true", help="only what is there already")
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    return parser.parse_args()


def work(folder: Path, seeds: Sequence[int], until: str, workers: int) -> None:
    """Do what is not done yet, the first seed first."""
    do = partial(run_jobs, folder, work=partial(run_job, folder), workers=workers)
    prepare(folder)
    parts = PARTS[: 1 + PARTS.index(until)]
    if "arms" in parts:
        do(stage_jobs(seeds[:1]))
        do([Job(seeds[0], situation) for situation in SITUATIONS])
        do(sweep_jobs(seeds[0]))
    for seed in seeds:
        jobs = stage_jobs([seed])
        if "verdicts" in parts:
            jobs += [Job(seed, verdict) for verdict in VERDICTS]
        if "looks" in parts:
            jobs += [Job(seed, situation) for situation in SITUATIONS]
        if "arms" in parts:
            jobs += arm_jobs(seed, best_rates(folder, seeds[0]))
        do(jobs)


def main() -> None:
    options = arguments()
    folder, seeds = options.folder, options.seeds
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not options.tables:
            work(folder, seeds, options.until, options.workers)
        results = Results(folder, seeds, best_rates(folder, seeds[0]))
        tables = [table for table in all_tables(results) if table.rows]
        for table in tables:
            table.print()
        print(f"{seconds(folder, seeds) / 3600:.1f} hours of a core")
        if options.write:
            replace_section(README, "benchmarks.real", tables)
    except UpitError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
