"""The situations and arms of benchmarks.real; plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.real.stages import IN_ORDER, MIXED, SPECIALISTS, UNFINISHED, Stage

EXPERTS = 3
SEEDS = (0, 1, 2)
Rates = Mapping[str, float]  # by `Arm.rates_of`


@dataclass(frozen=True)
class Situation:
    """What somebody has: checkpoints, of which the last three become experts."""

    name: str
    stages: tuple[Stage, ...]

    def needs(self) -> list[Stage]:
        return list(self.stages)

    def checkpoints(self, folder: Path, seed: int) -> list[Path]:
        """The checkpoints that become experts."""
        return [out for stage in self.stages for out in stage.checkpoints(folder, seed)][-EXPERTS:]


FINISHED = Situation("finished specialists", tuple(SPECIALISTS))
RUN_IN_ORDER = Situation("a run in order", (IN_ORDER,))
RUN_MIXED = Situation("a well-mixed run", (MIXED,))
NOT_FINISHED = Situation("unfinished specialists", (UNFINISHED,))
SITUATIONS = (FINISHED, NOT_FINISHED, RUN_MIXED, RUN_IN_ORDER)


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained further, on the same rows in the same order for all.

    Attributes:
        start: Our mixture; the mixture with random gates; the best dense merge; the last
            checkpoint; or copies of that as experts (vanilla upcycling).
        training: Settings of `Schedule`, besides the rate.
        rates_of: For what models the rate was chosen.
        seeds: On which it is run.
    """

    name: str
    situation: Situation
    start: Literal["mixture", "random gates", "merge", "last", "copies"]
    training: Mapping[str, Any]
    rates_of: Literal["dense", "mixture"]
    seeds: tuple[int, ...] = SEEDS

    def needs(self) -> list[Stage | Situation]:
        """The situation is last."""
        return [*self.situation.stages, self.situation]


WARMUP = {"warmup": 8}
DENSE = Arm("dense, all tokens mixed", RUN_MIXED, "last", WARMUP, "dense")
VANILLA = Arm("vanilla upcycling", RUN_MIXED, "copies", WARMUP, "mixture")
MIXTURES = [
    Arm(f"mixture of {situation.name}", situation, "mixture", WARMUP, "mixture")
    for situation in (FINISHED, RUN_MIXED, RUN_IN_ORDER)
]
MERGE = Arm(f"dense merge of {FINISHED.name}", FINISHED, "merge", WARMUP, "dense", seeds=SEEDS[:1])
RANDOM = Arm("random gates on finished specialists", FINISHED, "random gates", WARMUP, "mixture")


def variant(name: str, **training: Any) -> Arm:
    """The mixture of finished specialists, trained otherwise."""
    return Arm(name, FINISHED, "mixture", training, "mixture", seeds=SEEDS[:1])


HEAD_START = [
    variant("no warm-up", warmup=0),
    variant("router first", warmup=8, gates_alone=0.1),
    variant("experts at a third of the rate", warmup=8, expert_rate=1 / 3),
]
ARMS = [DENSE, MIXTURES[0], VANILLA, MERGE, *MIXTURES[1:], RANDOM, *HEAD_START]
# Peak rates; of each kind of arm the one with the lowest validation loss on the first seed is taken.
SWEEP = (1e-4, 3e-4)
SWEPT = (DENSE, MIXTURES[0])
