"""What is said of a router's counts, by the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from upit_merge.router.counts import RoutingCounts

CHOSEN = [[6, 6, 6, 6], [12, 11.5, 0.5, 0], [24, 0, 0, 0]]


def counts() -> RoutingCounts:
    entropy = [12 * math.log(4), 6 * math.log(4), 0.0]
    return RoutingCounts(
        *(torch.tensor(x, dtype=torch.float64) for x in (CHOSEN, entropy, [12] * 3))
    )


def test_shares_are_of_the_places_not_of_the_tokens() -> None:
    assert counts().shares.tolist() == [[place / 24 for place in row] for row in CHOSEN]


def test_dead_is_less_than_a_tenth_of_an_even_share() -> None:
    limit = 0.1 / 4
    wanted = [(i, j) for i, row in enumerate(CHOSEN) for j, n in enumerate(row) if n / 24 < limit]
    assert counts().dead() == wanted
    assert len(wanted) == 5


def test_entropies_are_even_at_one() -> None:
    load = 0.0
    for row in CHOSEN:
        load += -sum(n / 24 * math.log(n / 24) for n in row if n) / math.log(4) / 3
    assert counts().mean_entropy() == {
        "token": pytest.approx((1 + 0.5 + 0) / 3),
        "load": pytest.approx(load),
    }


def test_of_no_tokens_and_of_one_expert_there_is_nothing_to_say() -> None:
    nothing = RoutingCounts(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2))
    assert nothing.mean_entropy() == {"token": 0, "load": 0}
    alone = RoutingCounts(torch.full((2, 1), 9.0), torch.zeros(2), torch.full((2,), 9.0))
    assert alone.mean_entropy() == {"token": 0, "load": 0}
    assert alone.dead() == []
