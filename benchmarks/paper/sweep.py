"""Learning rates of benchmarks.paper, chosen the same way for dense models and mixtures.

On a seed of its own, measured on text of its own: of a few rates, the one with the lowest held-out
perplexity, for mixtures over vanilla upcycling and UpIT (geometric mean).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

from benchmarks.merge_plot import Table
from benchmarks.paper.arms import ARMS, DENSE, UPIT, VANILLA, Arm
from benchmarks.paper.data import SWEEP_SEED
from benchmarks.paper.jobs import Job, jobs_for
from benchmarks.paper.results import mean_perplexity
from benchmarks.paper.scales import Scale

KINDS = {"dense": (DENSE,), "mixture": (VANILLA, UPIT)}


def sweep_arms() -> list[Arm]:
    names = [name for kind in KINDS.values() for name in kind]
    return [replace(arm, curve=False) for arm in ARMS if arm.name in names]


def sweep_jobs(scale: Scale) -> list[Job]:
    """Every arm of the sweep at every rate, after what they start from."""
    if not scale.sweep:
        return []
    jobs = jobs_for([SWEEP_SEED], sweep_arms())
    first = [job for job in jobs if not isinstance(job.kind, Arm)]
    return first + [Job(SWEEP_SEED, arm, rate) for arm in sweep_arms() for rate in scale.sweep]


def swept(folder: Path, scale: Scale) -> dict[str, list[float]] | None:
    """Perplexity of each kind by rate; None without a sweep and while a job is missing."""
    if not scale.sweep:
        return None
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    by_name = {arm.name: arm for arm in sweep_arms()}
    for kind, names in KINDS.items():
        for rate in scale.sweep:
            results = [Job(SWEEP_SEED, by_name[name], rate).result(folder) for name in names]
            done = [result for result in results if result is not None]
            if len(done) < len(names):
                return None
            found[kind].append(geometric_mean(map(mean_perplexity, done)))
    return found


def chosen(folder: Path, scale: Scale) -> Scale:
    """The scale with the rates that were best; as it is where nothing was swept."""
    found = swept(folder, scale)
    if found is None:
        return scale
    best = {kind: scale.sweep[values.index(min(values))] for kind, values in found.items()}
    return replace(scale, rates=replace(scale.rates, **best))


def sweep_table(folder: Path, scale: Scale) -> Table:
    """Held-out perplexity at every rate; the lowest of each kind is bold."""
    rows = [
        [
            kind,
            *(f"**{value:.2f}**" if value == min(values) else f"{value:.2f}" for value in values),
        ]
        for kind, values in (swept(folder, scale) or {}).items()
    ]
    columns = ["peak learning rate", *(f"{rate:g}" for rate in scale.sweep)]
    return Table("The sweep (a seed of its own): held-out perplexity", columns, rows)
