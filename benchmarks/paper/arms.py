"""The arms of benchmarks.paper: what each starts from and how it is trained; plain data.

All arms have the same base and, of one seed and but for those with a share, the same fine-tuning data.
Those that start from stage 1, which takes two epochs, are trained for two more, with the same
tokens in the same order; `dense, 4 epochs` and the two epochs of stage 1 are what they are named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.paper.schedules import Schedule

EXPERTS = 8
CHECKPOINTS = {  # of the eight of stage 1, by number
    "last half": (5, 6, 7, 8),
    "first half": (1, 2, 3, 4),
    "all": (1, 2, 3, 4, 5, 6, 7, 8),
    "last": (8,),
}
Start = Literal["base", "last", "mean", "moe"]


@dataclass(frozen=True)
class Stage1:
    """Fine-tuning that leaves checkpoints: on a share of the data, one domain at a time or mixed."""

    share: float = 1.0
    mixed: bool = False

    @property
    def name(self) -> str:
        return f"stage1-{'mixed' if self.mixed else 'uneven'}-{self.share * 100:.0f}"


@dataclass(frozen=True)
class Arm:
    """One row of the tables.

    Attributes:
        name: Also of its file.
        start: The base, the last checkpoint of stage 1, the mean of its last four, or a mixture
            that the recipe makes.
        epochs: Of training from there.
        parameters, router: The recipe's blocks; no router block means random gates.
        checkpoints: Which ones the recipe names; the mean takes the same.
        of_mean: The recipe's only model is the mean of those.
        curve: Measure perplexity on the way too.
        schedule: How it is trained on.
        kept: Folder of the seed in which the mixture is kept before it is trained, for arms that
            are trained from the same one.
    """

    name: str
    start: Start
    epochs: int = 2
    stage1: Stage1 = Stage1()
    parameters: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] | None = None
    checkpoints: str = "last half"
    of_mean: bool = False
    curve: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    kept: str = ""


def upit(name: str, experts: int = EXPERTS, **options: Any) -> Arm:
    """UpIT with our defaults, but for what is given."""
    parameters = {"num_experts": experts, **options.pop("parameters", {})}
    router = {**options.pop("router", {})}
    return Arm(name, "moe", parameters=parameters, router=router, **options)


def vanilla(name: str, experts: int = EXPERTS, **options: Any) -> Arm:
    """Copies of one dense model behind random gates (sparse upcycling)."""
    parameters = {"num_experts": experts, "expansion": "copy", **options.pop("parameters", {})}
    checkpoints = options.pop("checkpoints", "last")
    return Arm(name, "moe", parameters=parameters, checkpoints=checkpoints, **options)


DENSE, VANILLA, UPIT = "dense, 2 + 2 epochs", "vanilla upcycling", "UpIT"
WELL_MIXED = Stage1(mixed=True)
SHARES = (0.1, 0.5)

UPIT_ARM = upit(UPIT, curve=True, kept=UPIT)

MAIN = [
    Arm("base model", "base", epochs=0),
    Arm("dense, 2 epochs", "last", epochs=0),
    Arm(DENSE, "last", curve=True),
    Arm("dense, 4 epochs", "base", epochs=4),
    Arm("mean of checkpoints", "mean", epochs=0),
    Arm("mean of checkpoints + 2 epochs", "mean"),
    vanilla(VANILLA, curve=True),
    vanilla("vanilla upcycling of the mean", checkpoints="last half", of_mean=True),
    vanilla("Drop-Upcycling", parameters={"reinitialise": 0.5}),
    UPIT_ARM,
]
ABLATIONS = [
    Arm("random gates", "moe", parameters={"num_experts": EXPERTS}, curve=True),
    upit("router on shuffled data", router={"assign": "shuffled"}),
    upit("the paper's objective", router={"objective": "upit"}),
    upit(
        "the paper's objective, experts trained",
        router={"objective": "upit", "upit": {"train_experts": True}},
    ),
    upit("balanced buckets", router={"assign": "balanced"}),
    upit("random parents", parameters={"parents": "random"}),
    upit("farthest child", parameters={"parents": "farthest_child"}),
    upit("no expansion", checkpoints="all"),
    upit("first half of the checkpoints", checkpoints="first half"),
]
SIZES = [
    arm
    for experts in (4, 16)
    for arm in (
        upit(f"UpIT, {experts} experts", experts),
        vanilla(f"vanilla upcycling, {experts} experts", experts),
    )
]
DATA = [
    arm
    for share in SHARES
    for arm in (
        Arm(f"{DENSE}, {share:.0%} of the data", "last", stage1=Stage1(share)),
        vanilla(f"{VANILLA}, {share:.0%} of the data", stage1=Stage1(share)),
        upit(f"{UPIT}, {share:.0%} of the data", stage1=Stage1(share)),
    )
]
MIXED = [
    Arm(f"{DENSE}, well mixed", "last", stage1=WELL_MIXED),
    vanilla(f"{VANILLA}, well mixed", stage1=WELL_MIXED),
    upit(f"{UPIT}, well mixed", stage1=WELL_MIXED),
]
GROUPS = {
    "main": MAIN,
    "ablations": ABLATIONS,
    "experts": SIZES,
    "data": DATA,
    "mixed": MIXED,
}
ARMS = [arm for group in GROUPS.values() for arm in group]
