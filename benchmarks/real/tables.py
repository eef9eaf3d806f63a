"""Tables of benchmarks.real: what is worth what before post-training, after it, and the claims."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.merge_plot import Table
from benchmarks.paper.results import spread
from benchmarks.paper.verdicts import CONTRADICTED, HELD, NOT_SEEN
from benchmarks.real.arms import (
    DENSE,
    EXPERTS,
    FINISHED,
    HEAD_START,
    MERGE,
    MIXTURES,
    RANDOM,
    RUN_MIXED,
    SEEDS,
    SITUATIONS,
    SWEEP,
    SWEPT,
    VANILLA,
    Arm,
    Rates,
    Situation,
)
from benchmarks.real.jobs import Job, results_of
from benchmarks.real.measure import AVERAGE, CURVE, DEFAULTS, Losses, best_of, setting
from benchmarks.real.text import KINDS
from benchmarks.real.verdicts import EXPECTED, SAMPLES, VERDICTS
from upit_merge.router.paired import paired_gain

BY_DEFAULT, MIXTURE = "mixture, temperature 1, top-2", "mixture as `upit-merge` makes it"
BEST_DENSE = "the best of these dense models"
Values = list[list[float]]  # by seed, by kind, nats per token


def perplexity(losses: Sequence[float]) -> float:
    """Geometric mean of the kinds' perplexities."""
    return math.exp(mean(losses))


@dataclass(frozen=True)
class Results:
    """What is there of some seeds; a row has the seeds on which it is done."""

    folder: Path
    seeds: Sequence[int]
    rates: Rates

    def looks(self, situation: Situation) -> dict[int, dict[str, Any]]:
        """By seed."""
        return self._done(situation)

    def arm(self, arm: Arm) -> dict[int, dict[str, Any]]:
        """By seed, at the rate that was chosen."""
        return self._done(arm, self.rates[arm.rates_of])

    def _done(self, kind: Situation | Arm, rate: float | None = None) -> dict[int, dict[str, Any]]:
        found = {seed: Job(seed, kind, rate).result(self.folder) for seed in self.seeds}
        return {seed: result for seed, result in found.items() if result}


def rivals(looked: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """Yield what can be made of a situation's checkpoints, and its losses by kind."""
    look: dict[str, Losses] = looked["losses"]
    chosen = setting(looked["chosen"]["temperature"], looked["chosen"]["experts_per_token"])

    def test(name: str) -> list[float]:
        return look[name]["test"]

    checkpoints = [name for name in look if name.startswith("checkpoint ")]
    yield "base", test("base")
    yield "best checkpoint", test(best_of(look, "checkpoint "))
    yield "average of the checkpoints", test(AVERAGE)
    yield "base + scaled sum of the deltas", test(best_of(look, "sum "))
    yield BEST_DENSE, test(best_of(look, "base", "checkpoint ", "sum "))
    yield "mixture, random gates", test("random gates")
    yield BY_DEFAULT, test(setting(*DEFAULTS))
    yield MIXTURE, test(chosen)
    best = []
    for kind in range(len(KINDS)):
        name = min(checkpoints, key=lambda c: look[c]["validation"][kind])
        best.append(test(name)[kind])
    yield "every kind by its best checkpoint", best


def look_table(results: Results, situation: Situation) -> Table:
    looks = [dict(rivals(look)) for look in results.looks(situation).values()]
    rows = []
    for name in looks[0] if looks else ():
        values = [look[name] for look in looks]
        rows.append([name, *_cells(values)])
    title = f"{situation.name[0].upper()}{situation.name[1:]}, before post-training ({len(looks)} seeds)"
    return Table(title, ["perplexity", *KINDS, "mean"], rows)


def _cells(values: Values) -> list[str]:
    by_kind = [f"{mean(math.exp(v[kind]) for v in values):.2f}" for kind in range(len(KINDS))]
    return [*by_kind, spread([perplexity(v) for v in values])]


def verdict_table(results: Results) -> Table:
    """What `plan --data` said, and what would have been right."""
    rows = []
    for verdict in VERDICTS:
        for seed in results.seeds:
            result = Job(seed, verdict).result(results.folder)
            for count, found in (result or {"verdicts": {}})["verdicts"].items():
                is_many = int(count) == max(SAMPLES)
                right = EXPECTED[verdict.situation.name] if is_many else "too_few"
                gain, error = (
                    math.nan if found[key] is None else 100 * found[key]
                    for key in ("gain", "error")
                )
                cost = found.get("cpu_seconds_of_losses")
                rows.append(
                    [
                        verdict.situation.name,
                        str(seed),
                        count,
                        found["outcome"].replace("_", " "),
                        "yes" if found["outcome"] == right else "NO",
                        f"{gain:.1f} ± {error:.1f} % against {_short(found['against'])}",
                        f"{found['cpu_seconds'] / cost:.2f}" if cost else "",
                    ]
                )
    columns = ["", "seed", "samples", "verdict", "right", "best choice per sample", "cost"]
    return Table("What `plan --data` says (cost: times the losses alone)", columns, rows)


def _short(name: str) -> str:
    """Return a checkpoint's name without where it lies."""
    return name.partition(" (")[0]


def trained_table(results: Results) -> Table:
    reference = {s: _test(r) for s, r in results.arm(DENSE).items()}
    rows = []
    for arm in (DENSE, VANILLA, *MIXTURES, RANDOM, MERGE):
        found = results.arm(arm)
        if not found:
            continue
        first = next(iter(found.values()))
        size = first["parameters"]
        paired = [_change(_test(r), reference[s]) for s, r in found.items() if s in reference]
        rows.append(
            [
                arm.name,
                *_cells([_test(r) for r in found.values()]),
                spread(paired, sign="+") if paired and arm != DENSE else "",
                f"{results.rates[arm.rates_of]:g}",
                f"{size['total'] / 1e6:.0f}",
                f"{size['active'] / 1e6:.0f}",
                str(len(found)),
            ]
        )
    columns = ["after 100 k tokens more", *KINDS, "mean", "against dense, %", "rate"]
    swept = " and ".join(f"`{arm.name}`" for arm in SWEPT)
    rates = " or ".join(f"{rate:g}" for rate in SWEEP)
    title = f"After post-training (rates of {rates}: the better for {swept} on the first seed)"
    return Table(title, [*columns, "parameters, M", "active, M", "seeds"], rows)


def head_start_table(results: Results) -> Table:
    rows = []
    for arm in (MIXTURES[0], *HEAD_START, RANDOM, DENSE):
        if found := results.arm(arm).get(SEEDS[0]):
            curve = dict(found["curve"])
            cells = [f"{perplexity(curve[s]):.2f}" if s in curve else "" for s in CURVE]
            end = perplexity(found["losses"]["validation"])
            rows.append([arm.name, *cells, f"{end:.2f}", f"{perplexity(_test(found)):.2f}"])
    columns = ["perplexity of validation rows, first seed", *(f"{share:.0%}" for share in CURVE)]
    return Table("Over post-training", [*columns, "end", "end, test rows"], rows)


# ---- claims


@dataclass(frozen=True)
class Claim:
    text: str
    gains: Callable[[Results], list[float]]  # percent of perplexity by seed, > 0 where it holds


def _of_look(situation: Situation, better: str, worse: str) -> Callable[[Results], list[float]]:
    def gains(results: Results) -> list[float]:
        looks = [dict(rivals(look)) for look in results.looks(situation).values()]
        return [-_change(look[better], look[worse]) for look in looks]

    return gains


def _of_retraining(results: Results) -> list[float]:
    """Whoever has the data can train one model on it instead: a well-mixed run's last checkpoint."""
    ours, theirs = results.looks(FINISHED), results.looks(RUN_MIXED)
    last = f"checkpoint {EXPERTS}"
    return [
        -_change(dict(rivals(ours[s]))[MIXTURE], theirs[s]["losses"][last]["test"])
        for s in ours
        if s in theirs
    ]


def _of_arms(better: Arm, worse: Arm) -> Callable[[Results], list[float]]:
    def gains(results: Results) -> list[float]:
        ours, theirs = results.arm(better), results.arm(worse)
        return [-_change(_test(ours[s]), _test(theirs[s])) for s in ours if s in theirs]

    return gains


CLAIMS = [
    *(
        Claim(
            f"{situation.name}: the mixture beats the best dense model of the same checkpoints",
            _of_look(situation, MIXTURE, BEST_DENSE),
        )
        for situation in SITUATIONS
    ),
    *(
        Claim(
            f"{situation.name}: fitted gates beat random ones",
            _of_look(situation, BY_DEFAULT, "mixture, random gates"),
        )
        for situation in SITUATIONS
    ),
    Claim(
        "a mixture of finished specialists beats one dense model of the same tokens, well mixed",
        _of_retraining,
    ),
    Claim(
        "temperature and k chosen on seed data beat the defaults (finished specialists)",
        _of_look(FINISHED, MIXTURE, BY_DEFAULT),
    ),
    Claim(
        "trained: UpIT beats dense fine-tuning (the paper's regime)", _of_arms(MIXTURES[1], DENSE)
    ),
    Claim(
        "trained: a mixture of finished specialists beats dense fine-tuning",
        _of_arms(MIXTURES[0], DENSE),
    ),
    Claim(
        "trained: a mixture of a run in order beats dense fine-tuning", _of_arms(MIXTURES[2], DENSE)
    ),
    Claim("trained: vanilla upcycling beats dense fine-tuning", _of_arms(VANILLA, DENSE)),
    Claim(
        "trained: UpIT beats vanilla upcycling (the paper's regime)", _of_arms(MIXTURES[1], VANILLA)
    ),
    Claim("trained: router initialisation beats random gates", _of_arms(MIXTURES[0], RANDOM)),
    Claim("trained: the mixture beats the dense merge", _of_arms(MIXTURES[0], MERGE)),
]


def judged(gains: Sequence[float]) -> str:
    """Return what the seeds say: by Student's t at 95 %, as two standard errors of three are few."""
    if len(gains) < 2:
        return "one seed"
    found = paired_gain(torch.tensor(gains).double(), torch.ones(len(gains)))
    if abs(found.nats) <= found.error:
        return NOT_SEEN
    return HELD if found.nats > 0 else CONTRADICTED


def claim_table(results: Results) -> Table:
    rows = []
    for claim in CLAIMS:
        if gains := claim.gains(results):
            word = judged(gains)
            told = " / ".join(f"{gain:+.2f}" for gain in gains)
            rows.append([claim.text, word, spread(gains, sign="+"), told])
    return Table(
        "Claims, before training unless they say so",
        ["", "verdict", "gain of perplexity, %", "by seed"],
        rows,
    )


def all_tables(results: Results) -> list[Table]:
    tables = [claim_table(results), verdict_table(results)]
    tables += [look_table(results, situation) for situation in SITUATIONS]
    return [*tables, trained_table(results), head_start_table(results)]


def _test(result: dict[str, Any]) -> list[float]:
    return list(result["losses"]["test"])


def _change(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """By how much a perplexity is above another, percent, of the logarithms."""
    return 100 * (mean(ours) - mean(theirs))


def seconds(folder: Path, seeds: Sequence[int]) -> float:
    """What all jobs that are done took of a core."""
    files = [
        path for seed in seeds for path in (results_of(folder) / f"seed-{seed}").glob("*.json")
    ]
    return sum(json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"] for path in files)
