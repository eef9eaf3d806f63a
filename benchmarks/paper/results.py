"""The results of benchmarks.paper, read back: one list entry per seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

from benchmarks.paper.arms import ARMS, Stage1
from benchmarks.paper.jobs import BASE, SHARED, Job, Result

Measure = Callable[[Result], float]


def mean_perplexity(result: Result) -> float:
    """Geometric, over the domains."""
    return geometric_mean(result["perplexity"])


def exact_match_percent(result: Result) -> float:
    return 100 * result["exact_match"]


@dataclass(frozen=True)
class Results:
    """What is there, by arm and seed.

    Attributes:
        arms: Results of the arms that are done for every seed.
        stages: Likewise of stage 1, by its name.
        bases: Of the base model, if it is there.
    """

    seeds: list[int]
    arms: dict[str, list[Result]]
    stages: dict[str, list[Result]]
    bases: list[Result]

    @classmethod
    def read(cls, folder: Path, seeds: Sequence[int]) -> Results:
        def done(kind: Any) -> list[Result]:
            found = [Job(seed, kind).result(folder) for seed in seeds]
            return [result for result in found if result is not None]

        arms = {arm.name: done(arm) for arm in ARMS}
        kinds: list[Stage1] = list(dict.fromkeys(arm.stage1 for arm in ARMS))
        stages = {stage.name: done(stage) for stage in kinds}
        complete = len(seeds)
        return cls(
            list(seeds),
            {name: found for name, found in arms.items() if len(found) == complete},
            {name: found for name, found in stages.items() if len(found) == complete},
            [base] if (base := Job(SHARED, BASE).result(folder)) else [],
        )

    def values(self, arm: str, measure: Measure = mean_perplexity) -> list[float]:
        """One number per seed."""
        return [measure(result) for result in self.arms[arm]]

    def perplexity_change(self, arm: str, reference: str) -> list[float]:
        """By seed: by how much the arm's perplexity is above the reference's, in percent.

        Of the logarithms, so that swapping the two changes nothing but the sign.
        """
        pairs = zip(self.values(arm), self.values(reference), strict=True)
        return [100 * math.log(ours / theirs) for ours, theirs in pairs]

    def exact_match_change(self, arm: str, reference: str) -> list[float]:
        """By seed: by how many percentage points the arm has more exact matches."""
        measure = exact_match_percent
        pairs = zip(self.values(arm, measure), self.values(reference, measure), strict=True)
        return [ours - theirs for ours, theirs in pairs]


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard deviation; of a single value, that."""
    text = f"{mean(values):{sign}.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text
