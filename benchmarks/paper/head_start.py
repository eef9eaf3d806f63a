"""Can post-training keep what the router gave? Schedules tried, and the best beside their rivals.

Tried on the seed of the sweep and measured on its own text; what comes out best there is trained on
the seeds of the tables, which chose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean, mean

from benchmarks.merge_plot import Table
from benchmarks.paper.arms import ARMS, DENSE, UPIT, UPIT_ARM, Arm, Stage1, upit
from benchmarks.paper.data import SWEEP_SEED
from benchmarks.paper.jobs import BASE, CURVE, SHARED, Job, Result
from benchmarks.paper.results import exact_match_percent, mean_perplexity, spread
from benchmarks.paper.scales import Scale
from benchmarks.paper.schedules import Schedule
from benchmarks.paper.verdicts import CONTRADICTED, HELD, NOT_SEEN, judge

NAME = "benchmarks.paper, head start"  # of the section of README.md
# All from the mixture of UPIT, with the same tokens in the same order.
SCHEDULES = {
    "no warm-up": Schedule(warmup=0.0),
    "warm-up 25 %": Schedule(warmup=0.25),
    "warm-up 50 %": Schedule(warmup=0.5),
    "gates frozen 25 %": Schedule(gates_frozen=0.25),
    "gates frozen": Schedule(gates_frozen=1.0),
    "router first 10 %": Schedule(others_frozen=0.1),
    "gates at a tenth of the rate": Schedule(gates=0.1),
    "experts at a quarter of the rate": Schedule(experts=0.25),
    "gates and backbone at 0.15 of the rate": Schedule(gates=0.15, backbone=0.15),
    "backbone at 0.15 of the rate": Schedule(backbone=0.15),
    "no balance": Schedule(balance=0.0),
    "balance tenfold": Schedule(balance=10.0),
    "balance ramped 50 %": Schedule(balance_ramp=0.5),
    "balance natural": Schedule(balance_target="natural"),
    "warm-up 25 %, experts at a quarter": Schedule(warmup=0.25, experts=0.25),
}
HEAD_START = [
    upit(name, curve=True, schedule=schedule, kept=UPIT) for name, schedule in SCHEDULES.items()
]
TRIED_AT = {UPIT: (0.5, 1.0, 2.0)}  # of the scale's rate for mixtures; the others at that alone
# The best at the end, which is how rates are chosen too, and what TRL does unless told otherwise.
CHOSEN = ("no warm-up", "warm-up 25 %")
FINALISTS = [
    *(arm for arm in ARMS if arm.name in (DENSE, UPIT)),
    *(arm for arm in HEAD_START if arm.name in CHOSEN),
]
POINTS = [f"{share * 100:.0f} %" for share in (0.0, *CURVE, 1.0)]


def tried_jobs(scale: Scale) -> list[Job]:
    """Every schedule at its rates, on the sweep's seed, after what all start from."""
    jobs = [Job(SHARED, BASE), Job(SWEEP_SEED, Stage1())]
    for arm in (UPIT_ARM, *HEAD_START):
        for factor in TRIED_AT.get(arm.name, (1.0,)):
            jobs.append(Job(SWEEP_SEED, arm, factor * scale.rates.mixture))
    return jobs


def final_jobs(seeds: Sequence[int]) -> list[Job]:
    """The finalists and their rivals on the seeds of the tables, at the scale's rates."""
    jobs = [Job(SHARED, BASE), *(Job(seed, Stage1()) for seed in seeds)]
    return jobs + [Job(seed, arm) for arm in FINALISTS for seed in seeds]


def on_the_way(result: Result) -> float:
    """Return the mean perplexity over the training, geometric: the area under the curve."""
    points = [(share, math.log(geometric_mean(values))) for share, values in result["curve"]]
    return math.exp(
        sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(points))
    )


def curve_cells(found: Sequence[Result]) -> list[str]:
    """Return perplexity at every point of the curve, mean over the seeds."""
    points = zip(*(result["curve"] for result in found), strict=True)
    return [f"{mean(geometric_mean(values) for _, values in seeds):.2f}" for seeds in points]


def tried_table(folder: Path, scale: Scale) -> Table:
    rows = []
    for job in tried_jobs(scale):
        result = job.result(folder)
        if not isinstance(job.kind, Arm) or result is None:
            continue
        rows.append(
            [
                job.name,
                *curve_cells([result]),
                f"{on_the_way(result):.2f}",
                f"{mean_perplexity(result):.2f}",
                f"{exact_match_percent(result):.1f}",
            ]
        )
    columns = ["", *POINTS, "mean on the way", "end, all text", "exact match, %"]
    return Table("Schedules tried, on the sweep's seed: held-out perplexity", columns, rows)


def final_table(folder: Path, seeds: Sequence[int]) -> Table:
    """Finalists and rivals; each against UpIT as it was trained until there were schedules."""
    done: dict[str, list[Result]] = {}
    for arm in FINALISTS:
        found = [r for seed in seeds if (r := Job(seed, arm).result(folder)) is not None]
        if len(found) == len(seeds):
            done[arm.name] = found
    ends = {name: [mean_perplexity(result) for result in found] for name, found in done.items()}
    early = {name: [at_a_tenth(result) for result in found] for name, found in done.items()}
    rows = []
    for name, found in done.items():
        cells = [
            against(values[name], values[reference])
            if reference in done and reference != name
            else ""
            for values, reference in ((early, UPIT), (ends, UPIT), (ends, DENSE))
        ]
        row = [name, *curve_cells(found), f"{mean(map(on_the_way, found)):.2f}"]
        row += [spread(ends[name]), *cells]
        rows.append([*row, spread([exact_match_percent(result) for result in found], 1)])
    columns = ["", *POINTS, "mean on the way", "end, all text"]
    columns += [f"{when} against {UPIT}, %" for when in ("at 10 %", "end")]
    columns += ["end against dense 2 + 2, %", "exact match, %"]
    return Table("Schedules on the seeds of the tables: held-out perplexity", columns, rows)


def at_a_tenth(result: Result) -> float:
    """Return perplexity after a tenth of the training, where the head start is gone or not."""
    _share, values = min(result["curve"], key=lambda point: abs(point[0] - 0.1))
    return geometric_mean(values)


def against(found: Sequence[float], reference: Sequence[float]) -> str:
    """Return by how much perplexities are above a reference's, and the word of the rule."""
    changes = [100 * math.log(one / other) for one, other in zip(found, reference, strict=True)]
    words = {HELD: "better", CONTRADICTED: "worse", NOT_SEEN: "no difference seen"}
    word = words[judge("better", [-change for change in changes])]
    by_seed = " / ".join(f"{change:+.2f}" for change in changes)
    return f"{spread(changes, sign='+')}, {word} ({by_seed})"


def head_start_tables(folder: Path, scale: Scale, seeds: Sequence[int]) -> list[Table]:
    """Return what there is."""
    tables = [tried_table(folder, scale), final_table(folder, seeds)]
    return [table for table in tables if table.rows]
