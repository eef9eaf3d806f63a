"""The DARE kernel: its masks' statistics, and that nothing but their name decides them."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from tests.support import naive
from upit_merge.merge.counter_rng import MaskKey, index_hash, mask_key
from upit_merge.merge.dare import FallingWords, Scratch, Share, dare, dare_sum, keep_bits

COUNT = 1 << 20
KEY = mask_key("a test")


def masks(density: float, keys: int = 8) -> list[torch.Tensor]:
    hashed = index_hash(mask_key(0, "element", "t"), 0, COUNT, "cpu")
    return [keep_bits(hashed, mask_key(0, key, 1, "t"), density) == -1 for key in range(keys)]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.9, 0.99])
def test_share_kept_is_the_density(density: float) -> None:
    sigma = math.sqrt(density * (1 - density) / COUNT)
    for mask in masks(density):
        assert abs(mask.double().mean().item() - density) < 5 * sigma


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_masks_of_different_experts_are_independent(density: float) -> None:
    """780 pairs, each correlation a normal number of variance 1 / COUNT if they are."""
    rows = torch.stack(masks(density, keys=40)).float()
    both = (rows @ rows.T).double().numpy() / COUNT  # whole numbers below 2^24, so float32 is exact
    kept = both.diagonal()
    covariances = both - np.outer(kept, kept)
    deviations = np.sqrt(covariances.diagonal())
    correlations = covariances / np.outer(deviations, deviations)
    correlations = correlations[np.triu_indices(40, 1)] * math.sqrt(COUNT)
    assert np.abs(correlations).max() < 5
    assert np.square(correlations).mean() == pytest.approx(1, abs=5 * math.sqrt(2 / 780))


def test_three_masks_are_independent_too() -> None:
    """Products of three centred masks; they share one hash of the index."""
    centred = [mask.double() - 0.5 for mask in masks(0.5, keys=12)]
    found = [
        float((a * b * c).mean()) * 8 * math.sqrt(COUNT) for a, b, c in combinations(centred, 3)
    ]
    assert max(map(abs, found)) < 5


def test_neighbouring_elements_are_independent() -> None:
    mask = masks(0.5, keys=1)[0].double() - 0.5
    for lag in (1, 2, 7, 64, 4096):
        correlation = (mask[lag:] * mask[:-lag]).mean().item() / 0.25
        assert abs(correlation) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_rescaling_keeps_the_mean(density: float) -> None:
    """E[DARE(δ)] = δ and E[DARE(δ)²] = δ² / density (arXiv 2311.03099)."""
    delta = torch.full((COUNT,), 0.25)
    hashed = index_hash(mask_key(3, "element", "t"), 0, COUNT, "cpu")
    result = dare(delta, hashed, mask_key(3, 0, 0, "t"), density, weight=1.0).double()
    sigma = 0.25 * math.sqrt((1 / density - 1) / COUNT)
    assert abs(result.mean().item() - 0.25) < 5 * sigma
    assert result.square().mean().item() == pytest.approx(0.0625 / density, rel=0.02)


def test_density_one_keeps_everything() -> None:
    delta = torch.randn(1000)
    hashed = index_hash(KEY, 0, 1000, "cpu")
    assert torch.equal(dare(delta, hashed, KEY, 1.0, weight=0.5), delta * 0.5)


def test_what_is_dropped_is_a_plain_zero() -> None:
    delta = torch.tensor([-1.0, torch.inf, torch.nan, -0.0] * 250)
    hashed = index_hash(KEY, 0, 1000, "cpu")
    result = dare(delta, hashed, KEY, 0.5, weight=1.0)
    kept = keep_bits(hashed, KEY, 0.5) == -1
    assert set(keep_bits(hashed, KEY, 0.5).tolist()) == {0, -1}
    assert torch.equal(result[~kept].view(torch.int32), torch.zeros(int((~kept).sum())).int())
    assert torch.equal(result[kept].nan_to_num(7), (delta * 2)[kept].nan_to_num(7))


def test_given_memory_is_used() -> None:
    delta, hashed = torch.randn(1000), index_hash(KEY, 0, 1000, "cpu")
    out, work = torch.full((1000,), torch.nan), torch.empty(1000, dtype=torch.int32)
    result = dare(delta, hashed, KEY, 0.3, 0.2, out=out, work=work)
    assert result is out
    assert torch.equal(out, dare(delta, hashed, KEY, 0.3, 0.2))


def test_mask_is_the_published_hash() -> None:
    """Against an implementation in numpy's unsigned integers, beyond int32's positive range too."""
    name, seed, expert, slot = "model.layers.0.mlp.up_proj.weight", 7, 5, 2
    hashed = index_hash(mask_key(seed, "element", name), 0, 5000, "cpu")
    ours = keep_bits(hashed, mask_key(seed, expert, slot, name), 0.7).numpy()
    assert np.array_equal(ours == -1, naive.mask(seed, expert, slot, name, 5000, 0.7))
    start = 2**31 - 100
    mixed = naive.lowbias32(np.arange(start, start + 200, dtype=np.uint32) ^ np.uint32(9))
    ours32 = index_hash(MaskKey(1, 9), start, 200, "cpu").numpy().view(np.uint32)
    assert np.array_equal(ours32, mixed)


def test_a_block_is_a_part_of_the_whole() -> None:
    whole = index_hash(KEY, 0, 1000, "cpu")
    assert torch.equal(whole[300:700], index_hash(KEY, 300, 400, "cpu"))


def test_key_depends_on_every_part() -> None:
    keys = {mask_key(*parts) for parts in [(1, 2), (2, 1), (12,), ("1", "2", ""), (1, 2, "t")]}
    assert len(keys) == 5


@pytest.mark.parametrize("density", [1e-10, 1e-4, 0.3, 0.9, 0.999999, 1 - 1e-12])
def test_factors_are_the_bits(density: float) -> None:
    """Every number next to the limit and at the ends of the range is on the same side in both."""
    key = MaskKey(1, 0)  # leaves the numbers as they are
    limit = min(round(density * 2**31), 2**31 - 1)
    edges = [0, 1, limit - 1, limit, limit + 1, 2**31 - 2, 2**31 - 1]
    numbers = torch.tensor([n % 2**31 + top for n in edges for top in (0, -(2**31))])
    hashed = torch.cat([numbers.int(), index_hash(KEY, 0, COUNT, "cpu")])
    for name in (key, mask_key(5, 1, 2, "t")):
        bits = keep_bits(hashed, name, density)
        factors = torch.empty_like(hashed)
        FallingWords.of(name, density).keep_factors(hashed, factors)
        assert torch.equal(factors.view(torch.float32), -bits.float())
    assert keep_bits(hashed[:14], key, density).eq(-1).sum() == sum(
        2 * (n % 2**31 < limit) for n in edges
    )


@pytest.mark.parametrize("count", [1, 15, 1000, 65_537])
def test_sum_is_that_of_its_shares_to_the_bit(count: int) -> None:
    """On a CPU it is computed in another way than anywhere else."""
    torch.manual_seed(count)
    hashed = index_hash(KEY, 77, count, "cpu")
    deltas = [torch.randn(count) * 0.01 for _ in range(4)]
    shares = [
        Share(index, mask_key("share", index), density, weight)
        for index, (density, weight) in enumerate([(0.9, 0.3), (0.55, 0.2), (1.0, 0.4), (0.1, 0.1)])
    ]
    for order in (shares, shares[::-1], shares[1:2], shares[2:3]):
        expected = torch.zeros(count)
        for share in order:
            delta = deltas[share.parent]
            expected += dare(delta, hashed, share.key, share.density, share.weight)
        scratch = Scratch(hashed)
        scratch.total.fill_(torch.nan)
        assert torch.equal(dare_sum(deltas, order, hashed, scratch), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    delta = torch.randn(COUNT)
    results = []
    for device in ("cpu", "cuda"):
        hashed = index_hash(mask_key(0, "t"), 12345, COUNT, device)
        part = dare(delta.to(device), hashed, KEY, 0.9, 0.3).cpu()
        shares = [Share(0, mask_key(i), 0.9, 0.3 * i) for i in (1, 2, 3)]
        total = dare_sum([delta.to(device)], shares, hashed, Scratch(hashed)).cpu()
        results.append((part, total))
    assert all(map(torch.equal, *results))
