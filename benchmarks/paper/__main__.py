"""The comparisons of the UpIT paper (arXiv 2410.01610), in small: is the mixture worth it?

python -m benchmarks.paper --folder F                  # everything, three seeds
python -m benchmarks.paper --folder F --write          # … and tables and plots into benchmarks/
python -m benchmarks.paper --folder F --only UpIT "vanilla upcycling" --seeds 0
python -m benchmarks.paper --folder F --sweep          # only the learning rates, which come first
python -m benchmarks.paper --folder F --head-start     # ways of post-training, at the scale's rates
python -m benchmarks.paper --folder G --scale gpu --device cuda --workers 1

Four domains of text, a small Llama, checkpoints of fine-tuning, and from there dense models and
mixtures at equal data (benchmarks/paper/arms.py). What is done is in F as JSON; the same command
goes on from there. Every worker has one thread.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.paper.arms import ARMS, Arm
from benchmarks.paper.head_start import NAME, final_jobs, head_start_tables, tried_jobs
from benchmarks.paper.jobs import claim_folder, jobs_for, run_job
from benchmarks.paper.results import Results
from benchmarks.paper.scales import SCALES
from benchmarks.paper.sweep import chosen, sweep_jobs, sweep_table
from benchmarks.paper.tables import all_tables, print_tables, replace_section, write_section
from benchmarks.paper.workers import run_jobs
from upit_merge.errors import UpitError
from upit_merge.runtime.device import resolve_device

BENCHMARKS = Path(__file__).resolve().parents[1]


def chosen_arms(names: list[str] | None) -> list[Arm]:
    """Those asked for, in the order of the tables.

    Raises:
        UpitError: there is no arm of that name.
    """
    known = {arm.name: arm for arm in ARMS}
    for name in names or ():
        if name not in known:
            raise UpitError(f"There is no arm {name!r}; the arms are {'; '.join(known)}.")
    return [arm for arm in ARMS if names is None or arm.name in names]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for models and results")
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, default=2, help="processes, a CPU thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms, by name")
    parser.add_argument("--sweep", action="store_true", help="only choose the learning rates")
    parser.add_argument(
        "--head-start", action="store_true", help="only: can training keep the router's gain?"
    )
    parser.add_argument("--write", action="store_true", help="write tables and plots of all seeds")
    parser.add_argument("--tables", action="store_true", help="only what is there already")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    scale = SCALES[options.scale]
    try:
        arms = chosen_arms(options.only)
        resolve_device(options.device)
        claim_folder(options.folder, scale)
        folder, device, workers = options.folder, options.device, options.workers
        if options.head_start:
            work = partial(run_job, folder, scale, device=device)
            if not options.tables:
                run_jobs(folder, tried_jobs(scale), work, workers)
                run_jobs(folder, final_jobs(options.seeds), work, workers)
            tables = head_start_tables(folder, scale, options.seeds)
            for table in tables:
                table.print()
            if options.write:
                replace_section(BENCHMARKS / "README.md", NAME, tables)
            return
        if not options.tables:
            run_jobs(
                folder, sweep_jobs(scale), partial(run_job, folder, scale, device=device), workers
            )
            if not options.sweep:
                work = partial(run_job, folder, chosen(folder, scale), device=device)
                run_jobs(folder, jobs_for(options.seeds, arms), work, workers)
        results = Results.read(options.folder, options.seeds)
        tables = [*all_tables(results), sweep_table(options.folder, scale)]
        print_tables(results, tables)
        if options.write:
            write_section(results, tables, BENCHMARKS)
    except UpitError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
