"""Which expert gets which seed sample, from the samples' losses under every expert."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

NDArray = np.ndarray[Any, Any]


def lowest(losses: Tensor) -> Tensor:
    """The paper's rule (section 3.3): the expert with the lowest perplexity, ties to the first.

    Args:
        losses: (num_samples, num_experts).

    Returns:
        int64, (num_samples,).
    """
    return losses.argmin(dim=1)


def balanced(losses: Tensor) -> Tensor:
    """Buckets of at most ceil(num_samples / num_experts) samples with the least total loss.

    Exact, by successive shortest paths: starting from everybody's best expert, over-full buckets
    give samples away along the cheapest chain of moves (i gives one to j, j another one to k, …)
    that ends at a bucket with room. The chains run over the few experts, not the many samples, so
    that 20,000 samples take seconds where an assignment problem with a column per place takes the
    square of the memory and the cube of the time.

    Args:
        losses: (num_samples, num_experts), finite.

    Returns:
        int64, (num_samples,).
    """
    values = losses.double().numpy()
    samples, experts = values.shape
    places = math.ceil(samples / experts)
    assigned = values.argmin(axis=1)
    counts = np.bincount(assigned, minlength=experts)
    # What it costs to move the cheapest sample of one bucket to another, and which one that is.
    cost = np.full((experts, experts), np.inf)
    cheapest = np.zeros((experts, experts), dtype=np.int64)

    def update(bucket: int) -> None:
        members = np.flatnonzero(assigned == bucket)
        cost[bucket] = np.inf
        if len(members):
            change = values[members] - values[members, bucket, None]
            change[:, bucket] = np.inf
            cost[bucket] = change.min(axis=0)
            cheapest[bucket] = members[change.argmin(axis=0)]

    for bucket in range(experts):
        update(bucket)
    while counts.max() > places:
        chain = _cheapest_chain(cost, counts > places, counts < places)
        moved = [cheapest[giver, taker] for giver, taker in pairwise(chain)]
        assigned[moved] = chain[1:]
        counts[chain[0]] -= 1
        counts[chain[-1]] += 1
        for bucket in chain:
            update(bucket)
    return torch.from_numpy(assigned)


def _cheapest_chain(cost: NDArray, full: NDArray, free: NDArray) -> list[int]:
    """The cheapest path from a full bucket to one with room (Bellman and Ford; costs may be < 0)."""
    distance = np.where(full, 0.0, np.inf)
    previous = np.full(len(full), -1)
    for _ in range(len(full)):
        reached = distance[:, None] + cost
        better = reached.min(axis=0) < distance - 1e-12
        if not better.any():
            break
        previous[better] = reached.argmin(axis=0)[better]
        distance[better] = reached.min(axis=0)[better]
    chain = [int(np.where(free, distance, np.inf).argmin())]
    while previous[chain[0]] >= 0:
        chain.insert(0, int(previous[chain[0]]))
    return chain


ASSIGNMENTS = {"balanced": balanced, "lowest": lowest}
