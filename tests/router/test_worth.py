"""Whether a mixture is worth its bytes: statistics beside naive ones, and what is said of them."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Literal

import pytest
import torch

from upit_merge.router.paired import Gain, paired_gain
from upit_merge.router.worth import Kind, Rival, Worth

KINDS = ("code", "bible", "german")


def made_up(
    samples: int,
    *,
    average: float,
    single: tuple[float, ...] = (0.2, 0.2, 0.2),
    spread: float = 0.05,
    kind: Literal["mixture", "choice"] = "mixture",
    seed: int = 0,
) -> Worth:
    """Rivals that are worse by so many nats per token, a checkpoint by kind of text; with noise."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return spread * torch.randn(samples, generator=generator, dtype=torch.float64)

    targets = torch.randint(40, 120, (samples,), generator=generator).double()
    ours = 2.5 + torch.rand(samples, generator=generator, dtype=torch.float64)
    of_kind = torch.arange(samples) % 3
    worse = torch.tensor(single, dtype=torch.float64)[of_kind]
    rivals = [
        Rival("single", "checkpoint 1", (ours + worse + noise()) * targets, {"checkpoint": 1}),
        Rival("average", "the average", (ours + average + noise()) * targets),
        Rival("random", "random gates", (ours + 0.1 + noise()) * targets),
    ]
    groups = {name: (of_kind == i).nonzero().flatten().tolist() for i, name in enumerate(KINDS)}
    return Worth.of(
        ours * targets,
        targets,
        rivals,
        groups,
        bytes_ours=200,
        bytes_dense=100,
        ours_kind=kind,
    )


def test_gain_and_error_are_what_loops_find() -> None:
    generator = torch.Generator().manual_seed(1)
    difference = torch.randn(30, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, 50, (30,), generator=generator).double()
    difference[4] = math.nan
    strata = [list(range(10)), list(range(10, 30))]
    found = paired_gain(difference, targets, strata)
    known = [i for i in range(30) if i != 4]
    gain = sum(float(difference[i]) for i in known) / sum(float(targets[i]) for i in known)
    variance = 0.0
    for stratum in strata:
        rest = [float(difference[i] - gain * targets[i]) for i in stratum if i != 4]
        variance += len(rest) * statistics.variance(rest)
    error = variance**0.5 / sum(float(targets[i]) for i in known)
    assert found.nats == pytest.approx(gain)
    assert found.standard_error == pytest.approx(error)
    assert found.samples == 29
    # The quantile of Student's t for 27 degrees of freedom, from a printed table.
    assert found.error == pytest.approx(2.052 * error, rel=1e-3)


def test_error_is_that_of_a_bootstrap() -> None:
    """Whole samples drawn again: what an error over samples is to say."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(5, 300, (80,), generator=generator).double()
    noise = 0.2 * torch.randn(80, generator=generator, dtype=torch.float64)
    difference = (0.05 + noise) * targets
    again = torch.randint(0, 80, (4000, 80), generator=generator)
    means = difference[again].sum(1) / targets[again].sum(1)
    found = paired_gain(difference, targets)
    assert found.standard_error == pytest.approx(float(means.std()), rel=0.1)


def test_margins_hold_what_they_promise() -> None:
    generator = torch.Generator().manual_seed(3)
    held = 0
    for _ in range(400):
        noise = 0.1 * torch.randn(24, generator=generator, dtype=torch.float64)
        found = paired_gain(noise + 0.03, torch.ones(24, dtype=torch.float64))
        held += abs(found.nats - 0.03) < found.error
    assert 0.92 < held / 400 < 0.98


def test_kinds_with_one_sample_have_no_spread_of_their_own() -> None:
    difference = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=torch.float64)
    targets = torch.ones(4, dtype=torch.float64)
    alone = paired_gain(difference, targets, [[0, 1], [2], [3]])
    assert alone.standard_error == paired_gain(difference, targets, [[0, 1], [2, 3]]).standard_error
    merged = paired_gain(difference, targets, [[0, 1, 2], [3]])
    assert merged.standard_error == pytest.approx(paired_gain(difference, targets).standard_error)


@pytest.mark.parametrize("samples", [0, 1])
def test_no_spread_is_no_margin(samples: int) -> None:
    found = paired_gain(torch.rand(samples), torch.ones(samples))
    assert found.error == math.inf
    assert found.outcome == "too_few"


def test_finished_specialists_are_worth_it() -> None:
    worth = made_up(96, average=0.14, spread=0.1)
    assert worth.outcome == "worth"
    assert worth.best is not None
    assert worth.best.kind == "average"
    verdict = worth.verdict()
    assert verdict.startswith("Worth it: the mixture has a perplexity 1")
    assert "lower than the average" in verdict
    assert "for 2 times the bytes (96 samples)" in verdict
    assert "Its perplexity" not in verdict  # no kind of text says anything else
    assert worth.needed is None


def test_unfinished_ones_are_not() -> None:
    worth = made_up(96, average=-0.05, spread=0.1)
    assert worth.outcome == "not_worth"
    assert worth.verdict().startswith("Not worth it: the mixture has a perplexity 4")
    assert "higher than the average" in worth.verdict()
    assert "use the average" in worth.verdict()


@pytest.mark.parametrize("average", [0.14, -0.05, 0.0])
def test_twelve_samples_are_too_few_whatever_they_say(average: float) -> None:
    worth = made_up(12, average=average, spread=0.001)
    assert worth.outcome == "too_few"
    assert worth.needed == 20
    assert worth.verdict().startswith("Too few samples to tell")
    assert worth.verdict().count("about 20 would do") == 1


def test_it_says_how_many_samples_would_do() -> None:
    worth = made_up(24, average=0.03, single=(0.5,) * 3, spread=0.15)
    assert worth.outcome == "too_few"
    assert worth.needed is not None
    draws = [made_up(2 * worth.needed, average=0.03, spread=0.15, seed=s) for s in range(10)]
    assert sum(draw.outcome == "worth" for draw in draws) >= 5


def test_the_outlook_is_not_endless() -> None:
    """Half a per cent better, give or take as much as there is."""
    targets = torch.ones(30, dtype=torch.float64)
    swing = 0.005 + torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(15)
    rival = Rival("average", "the average", targets + swing)
    worth = Worth.of(targets, targets, [rival], bytes_ours=2, bytes_dense=1, ours_kind="mixture")
    assert worth.needed is not None
    assert worth.needed > 10_000
    assert "more than 10,000" in worth.verdict()


def test_the_simplest_of_equals_is_advised() -> None:
    worth = made_up(96, average=-0.054, single=(-0.05,) * 3, spread=0.01)
    assert worth.best is not None
    assert worth.best.kind == "average"
    assert worth.advised is not None
    assert worth.advised.kind == "single"
    assert "use that checkpoint as it is" in worth.verdict()


@pytest.mark.parametrize(
    ("percent", "margin", "outcome"),
    [
        (0.3, 0.2, "not_worth"),  # surely better, and surely by too little
        (0.3, 0.4, "not_worth"),
        (0.7, 0.5, "too_few"),
        (1.2, 1.0, "worth"),
        (1.2, 1.4, "too_few"),
        (-2.0, 1.0, "not_worth"),
        (-2.0, 4.0, "too_few"),
    ],
)
def test_it_is_worth_it_from_one_percent_on(percent: float, margin: float, outcome: str) -> None:
    gain = Gain(percent / 100, margin / 200, margin / 100, 96)
    assert gain.outcome == outcome
    assert math.isfinite(gain.needed)
    assert Gain(percent / 100, margin / 200, margin / 100, 19).outcome == "too_few"


def beside(**rivals: tuple[Kind, float, float, int]) -> Worth:
    """Rivals by name: kind, by how many nats they are worse, its deviation, on how many samples."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.full((96,), 50.0, dtype=torch.float64)
    ours = 3 * targets
    found = []
    for name, (kind, worse, deviation, samples) in rivals.items():
        noise = torch.randn(96, generator=generator, dtype=torch.float64)
        noise = (noise - noise[:samples].mean()) / noise[:samples].std()
        sums = ours + targets * (worse + deviation * noise)
        sums[samples:] = math.nan
        found.append(Rival(kind, name, sums))
    return Worth.of(ours, targets, found, bytes_ours=2, bytes_dense=1, ours_kind="mixture")


def test_what_is_printed_is_what_decides() -> None:
    """An average that the mixture beats is not advised, though the sum is hardly better."""
    found = beside(average=("average", 0.012, 0.02, 96), sum=("sum", 0.001, 0.02, 96))
    assert found.outcome == "not_worth"
    assert found.advised is not None
    assert found.advised.name == "sum"
    report = found.to_report()
    gain = Gain(report["gain"], report["error"] / 2, report["error"], report["samples"])
    assert gain.outcome == report["outcome"]


def test_a_rival_of_a_few_samples_decides_nothing() -> None:
    found = beside(average=("average", -0.1, 0.05, 96), few=("sum", -0.5, 0.001, 3))
    assert found.outcome == "not_worth"
    assert found.best is not None
    assert found.best.name == "average"
    assert "few" not in found.verdict()


def test_the_base_is_advised_where_nothing_made_of_it_is_better() -> None:
    found = beside(
        base=("base", -0.05, 0.02, 96),
        average=("average", -0.048, 0.02, 96),
        sum=("sum", -0.051, 0.02, 96),
    )
    assert found.advised is not None
    assert found.advised.kind == "base"
    assert "use the base as it is" in found.verdict()


def test_estimates_are_no_samples_to_look_for() -> None:
    """Of losses to first order only some are exact: more data would not make more of them so."""
    few = beside(average=("average", 0.03, 0.1, 32))
    ours = few.ours.clone()
    ours[32:] = math.nan
    few = replace(few, ours=ours, given=96)
    assert few.outcome == "too_few"
    assert few.needed is not None
    assert few.needed <= 96
    assert "`losses: exact`" in few.verdict()
    assert "`losses: exact`" not in replace(few, given=None).verdict()


def test_a_kind_with_another_answer_is_named() -> None:
    worth = made_up(96, average=0.5, single=(0.5, 0.5, -0.1), spread=0.02)
    assert worth.outcome == "worth"
    assert worth.group_outcomes() == {"german": "not_worth"}
    verdict = worth.verdict(quoted=lambda text: f"<{text}>")
    assert "no lower than with <checkpoint 1> on <german> (1" in verdict
    assert "higher" in verdict


def test_a_rival_that_may_still_be_better_forbids_the_claim() -> None:
    """The sum is known on few samples only, and might be better than the mixture."""
    worth = made_up(96, average=0.1, spread=0.02)
    sums = worth.ours + 0.12 * worth.targets
    sums[30:] = math.nan
    sums[:30] += worth.targets[:30] * torch.tensor([1.0, -1.0]).repeat(15)
    rival = Rival("sum", "the sum", sums, {"scale": 0.7})
    wider = Worth.of(
        worth.ours,
        worth.targets,
        [*worth.rivals, rival],
        worth.groups,
        bytes_ours=2,
        bytes_dense=1,
        ours_kind="mixture",
    )
    assert worth.outcome == "worth"
    assert wider.outcome == "too_few"
    assert "than the sum" in wider.verdict()
    # 30 of 96 were measured: three times as many of all are needed for as many of them.
    assert wider.needed is not None
    assert wider.needed > 96


def test_random_gates_do_not_decide_but_are_told() -> None:
    worth = made_up(96, average=0.3, spread=0.02)
    same = Rival("random", "random gates", worth.ours.clone())
    told = Worth.of(
        worth.ours, worth.targets, [worth.rivals[1], same], bytes_ours=2, bytes_dense=1,
        ours_kind="mixture",
    )  # fmt: skip
    assert told.outcome == "worth"
    assert "Gates that know nothing do as well" in told.verdict()


def test_perplexities_are_of_the_same_text() -> None:
    """A rival that was measured on the easy half only is not shown as better than it is."""
    worth = made_up(60, average=0.2, spread=0.0)
    easy = worth.ours / worth.targets < 3.0
    sums = torch.where(easy, worth.rivals[1].sums, torch.nan)
    other = Worth.of(
        worth.ours, worth.targets, [Rival("average", "half", sums)], bytes_ours=2, bytes_dense=1,
        ours_kind="mixture",
    )  # fmt: skip
    assert other.perplexity(other.rivals[0]) == pytest.approx(worth.perplexity(worth.rivals[1]))


def test_nothing_to_compare_with_is_said() -> None:
    worth = made_up(30, average=0.1)
    alone = Worth.of(
        worth.ours, worth.targets, [], bytes_ours=2, bytes_dense=1, ours_kind="mixture"
    )
    assert alone.outcome == "too_few"
    assert "Nothing was measured beside" in alone.verdict()
    assert json.dumps(alone.to_report(), allow_nan=False)


@pytest.mark.parametrize("samples", [1, 2, 12, 96])
def test_the_report_is_plain(samples: int) -> None:
    worth = made_up(samples, average=0.1, kind="choice")
    report = json.loads(json.dumps(worth.to_report(), allow_nan=False))
    assert report["verdict"] == worth.verdict()
    assert report["outcome"] == worth.outcome
    assert {rival["kind"] for rival in report["rivals"]} == {"single", "average", "random"}
