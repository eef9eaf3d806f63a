"""Batches of seed samples: little padding, large enough, always the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from upit_merge.engine.hidden_states import Batch, token_batches


def padding(batches: list[Batch], lengths: list[int]) -> float:
    """Share of the computed tokens that are none."""
    computed = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / computed


def log_normal(count: int, median: int, spread: float, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(np.log(median), spread, count)
    return np.clip(drawn, 20, 512).astype(int).tolist()


def test_they_cover_everything_within_the_limit() -> None:
    lengths = [5, 30, 7, 100, 1, 6, 8]
    batches = token_batches(range(7), lengths, 32)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 32
    assert token_batches([], lengths, 32) == []
    assert token_batches([3], lengths, 1) == [(3,)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("median", "spread"), [(60, 0.8), (150, 0.7), (400, 1.0)])
@pytest.mark.parametrize("count", [100, 300, 1000, 2000])
def test_padding_of_usual_lengths(count: int, median: int, spread: float, seed: int) -> None:
    lengths = log_normal(count, median, spread, seed)
    batches = token_batches(range(count), lengths, 8192)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert padding(batches, lengths) < 0.02
    # A layer's products are slow for less than some 250 tokens.
    assert sum(lengths) / len(batches) > 250
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 8192
    assert batches == token_batches(range(count), lengths, 8192)


def test_full_batches_where_they_cost_nothing() -> None:
    """Samples of one length, as those that are all cut off at max_length."""
    batches = token_batches(range(1000), [512] * 1000, 8192)
    assert len(batches) == 63
    assert {len(batch) for batch in batches[:-1]} <= {8, 16}
    assert padding(batches, [512] * 1000) == 0


def test_a_few_samples_are_padded_rather_than_computed_one_by_one() -> None:
    lengths = [12, 14, 17, 20, 22, 25, 27, 29]
    assert token_batches(range(8), lengths, 8192) == [tuple(range(8))]
    longer = [10 * length for length in lengths]
    many, few = (token_batches(range(8), longer, 8192, price=price) for price in (8, 99))
    assert len(many) > len(few)


def test_the_cut_is_the_best_of_all() -> None:
    """By brute force over all cuts of eight lengths."""
    from upit_merge.engine.hidden_states import LEAST_TOKENS, _cuts

    def cost(lengths: list[int], ends: tuple[int, ...], price: float) -> float:
        starts = (0, *ends[:-1])
        sizes = [lengths[e - 1] * (e - s) for s, e in zip(starts, ends, strict=True)]
        if any(size > 600 and e - s > 1 for size, s, e in zip(sizes, starts, ends, strict=True)):
            return float("inf")
        return sum(max(size, LEAST_TOKENS) + price for size in sizes)

    for seed, price in itertools.product(range(4), (1.0, 50.0, 500.0)):
        lengths = sorted(log_normal(8, 100, 1.0, seed))
        cuts = (
            (*inner, 8)
            for count in range(8)
            for inner in itertools.combinations(range(1, 8), count)
        )
        best = min(cost(lengths, ends, price) for ends in cuts)
        assert cost(lengths, tuple(_cuts(np.array(lengths), 600, price)), price) == best
