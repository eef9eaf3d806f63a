"""The right expert for every sample: chosen without what it is judged on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from upit_merge.router.choice import best_choice
from upit_merge.router.router_gain import SampleLosses

TOKENS = 64


def drawn(samples: int, *, kinds: int, apart: float, noise: float, seed: int = 0) -> SampleLosses:
    """As many experts as kinds, each better on its own by so many nats per token; noisy halves."""
    generator = torch.Generator().manual_seed(seed)
    hard = 2 + torch.rand(samples, 1, 1, generator=generator, dtype=torch.float64)
    own = torch.arange(samples).view(-1, 1) % kinds == torch.arange(kinds)
    errors = torch.randn(samples, kinds, 2, generator=generator, dtype=torch.float64)
    means = hard + apart * (1 - own.double()).unsqueeze(2) + noise * errors
    return SampleLosses(means * TOKENS, torch.full((samples, 2), float(TOKENS)))


def groups(samples: int, kinds: int) -> list[list[int]]:
    return [list(range(kind, samples, kinds)) for kind in range(kinds)]


def by_own_half(losses: SampleLosses) -> Tensor:
    chosen = losses.sums.argmin(1)
    return losses.sums.gather(1, chosen.flip(1).unsqueeze(1)).squeeze(1).sum(1)


def per_token(sums: Tensor) -> float:
    return float(sums.mean()) / (2 * TOKENS)


def test_it_is_what_loops_find() -> None:
    losses = drawn(12, kinds=3, apart=0.2, noise=0.3)
    losses.counts[4, 0] = 0
    losses.sums[7] = math.inf
    kinds = groups(12, 3)
    means = (losses.sums / TOKENS).tolist()
    apart = [
        [[m[e][h] - sum(m[x][h] for x in range(3)) / 3 for h in (0, 1)] for e in range(3)]
        for m in means
    ]
    members = [[i for i in kind if i not in (4, 7)] for kind in kinds]
    own = {i: [sum(apart[i][e]) / 2 for e in range(3)] for kind in members for i in kind}
    products, squares, number = 0.0, 0.0, 0
    for kind in members:
        for e in range(3):
            middle = sum(own[i][e] for i in kind) / len(kind)
            for i in kind:
                first, second = (value - middle for value in apart[i][e])
                products += first * second
                squares += (first**2 + second**2) / 2
                number += 1
    agreement = min(1.0, max(0.0, products / squares))
    expected_sums = {}
    for kind in members:
        for i in kind:
            total = 0.0
            for half in (0, 1):
                best = []
                for e in range(3):
                    prior = sum(own[j][e] for j in kind if j != i) / (len(kind) - 1)
                    best.append(prior + agreement * (apart[i][e][half] - prior))
                total += float(losses.sums[i, best.index(min(best)), 1 - half])
            expected_sums[i] = total
    found = best_choice(losses, kinds).tolist()
    assert math.isnan(found[4])
    assert math.isnan(found[7])
    assert {i: found[i] for i in expected_sums} == pytest.approx(expected_sums)


def test_kinds_make_up_for_what_half_a_sample_does_not_tell() -> None:
    """Noise of the halves twice what the experts differ by: the kinds still tell."""
    losses = drawn(96, kinds=3, apart=0.1, noise=0.2)
    right = per_token(losses.sums[torch.arange(96), torch.arange(96) % 3].sum(1))
    told = per_token(best_choice(losses, groups(96, 3)))
    assert told == pytest.approx(right, abs=0.005)
    assert per_token(by_own_half(losses)) > right + 0.012


def test_clear_halves_need_no_kinds() -> None:
    losses = drawn(96, kinds=3, apart=0.5, noise=0.05)
    assert torch.equal(best_choice(losses), by_own_half(losses))


@pytest.mark.parametrize("kinds", [[], groups(96, 3)])
def test_nothing_is_gained_from_noise(kinds: list[list[int]]) -> None:
    """Of experts that are alike no choice is better than any one of them, on average."""
    gains = []
    for seed in range(200):
        losses = drawn(96, kinds=3, apart=0.0, noise=0.3, seed=seed)
        gains.append(per_token(losses.sums.sum(2)[:, 0]) - per_token(best_choice(losses, kinds)))
    mean = sum(gains) / len(gains)
    error = (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5
    assert abs(mean) < 3 * error
    assert error < 0.005
