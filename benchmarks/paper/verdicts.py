"""What the UpIT paper claims, and whether it is seen in benchmarks.paper.

The rule, for all claims alike. Two arms are compared seed by seed, so that what a seed does to both
cancels out. They *differ* if every seed agrees which is better and the mean difference is at least
twice its standard error. A claim that one is better: *held here* if they differ that way,
*contradicted* if they differ the other way, else *not seen here*. A claim that two are about equal:
*held here* unless they differ by more than `NEGLIGIBLE` on average, then *contradicted*. A
standard error from three seeds is itself rough: this is a reading aid, not a test of significance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from benchmarks.paper.arms import DENSE, UPIT, VANILLA
from benchmarks.paper.results import Results

HELD, NOT_SEEN, CONTRADICTED = "held here", "not seen here", "contradicted"
NEGLIGIBLE = 0.5  # percent of perplexity, percentage points of exact match


@dataclass(frozen=True)
class Claim:
    """`better` has lower perplexity than `worse`; or, if of the kind `equal`, about the same."""

    text: str
    better: str
    worse: str
    kind: Literal["better", "equal"] = "better"


PAPER = [
    Claim("UpIT beats dense fine-tuning (2 + 2 epochs)", UPIT, DENSE),
    Claim("UpIT beats dense fine-tuning (4 epochs, one schedule)", UPIT, "dense, 4 epochs"),
    Claim("UpIT beats vanilla upcycling", UPIT, VANILLA),
    Claim("vanilla upcycling beats dense fine-tuning", VANILLA, DENSE),
    Claim("router initialisation beats random gates", UPIT, "random gates"),
    Claim("random gates beat a router on random data", "random gates", "router on shuffled data"),
    Claim("random parents are about as good", "random parents", UPIT, "equal"),
    Claim("more checkpoints are at least as good as expansion", "no expansion", UPIT),
    Claim("late checkpoints beat the first half", UPIT, "first half of the checkpoints"),
    Claim("8 experts beat 4 (UpIT)", UPIT, "UpIT, 4 experts"),
    Claim("16 experts beat 8 (UpIT)", "UpIT, 16 experts", UPIT),
    Claim("16 experts are worse than 8 (vanilla)", VANILLA, "vanilla upcycling, 16 experts"),
    Claim(
        "with 10 % of the data, UpIT beats vanilla",
        f"{UPIT}, 10% of the data",
        f"{VANILLA}, 10% of the data",
    ),
    Claim(
        "with 50 % of the data, UpIT beats vanilla",
        f"{UPIT}, 50% of the data",
        f"{VANILLA}, 50% of the data",
    ),
    Claim(
        "with half of the data, UpIT beats vanilla with all of it",
        f"{UPIT}, 50% of the data",
        VANILLA,
    ),
]
# Not claims of the paper: our defaults against their alternatives, and controls it does not have.
OURS = [
    Claim("`objective: one_vs_rest` beats the paper's", UPIT, "the paper's objective"),
    Claim("… and the paper's with experts trained", UPIT, "the paper's objective, experts trained"),
    Claim("`assign: lowest` beats `balanced`", UPIT, "balanced buckets"),
    Claim("`parents: most_dissimilar` beats `random`", UPIT, "random parents"),
    Claim("`parents: most_dissimilar` beats `farthest_child`", UPIT, "farthest child"),
    Claim("UpIT beats Drop-Upcycling", UPIT, "Drop-Upcycling"),
    Claim(
        "UpIT beats the mean of its checkpoints, trained on", UPIT, "mean of checkpoints + 2 epochs"
    ),
    Claim("UpIT beats vanilla upcycling of that mean", UPIT, "vanilla upcycling of the mean"),
    Claim(
        "UpIT beats vanilla upcycling after a well-mixed stage 1",
        f"{UPIT}, well mixed",
        f"{VANILLA}, well mixed",
    ),
    Claim(
        "UpIT after an uneven stage 1 beats UpIT after a well-mixed one",
        UPIT,
        f"{UPIT}, well mixed",
    ),
]


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    word: str
    perplexity: list[float]  # by seed, percent, negative if `better` is better
    exact_match: list[float]  # by seed, percentage points, positive if `better` is better


def differ(differences: Sequence[float]) -> bool:
    """Whether every seed has the same sign and the mean is at least twice its standard error."""
    if len(differences) < 2:
        return False
    same_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    error = stdev(differences) / math.sqrt(len(differences))
    return same_sign and abs(mean(differences)) >= 2 * error


def judge(kind: str, gains: Sequence[float]) -> str:
    """The word for a claim.

    Args:
        kind: `better` or `equal`.
        gains: By seed, positive where the first arm is better.
    """
    if kind == "equal":
        return CONTRADICTED if differ(gains) and abs(mean(gains)) > NEGLIGIBLE else HELD
    if not differ(gains):
        return NOT_SEEN
    return HELD if mean(gains) > 0 else CONTRADICTED


def verdicts(claims: Sequence[Claim], results: Results) -> list[Verdict]:
    """Of all claims whose arms are there, by perplexity; exact match stands beside it."""
    found = []
    for claim in claims:
        if not {claim.better, claim.worse} <= results.arms.keys():
            continue
        perplexity = results.perplexity_change(claim.better, claim.worse)
        exact = results.exact_match_change(claim.better, claim.worse)
        word = judge(claim.kind, [-change for change in perplexity])
        found.append(Verdict(claim, word, perplexity, exact))
    return found
