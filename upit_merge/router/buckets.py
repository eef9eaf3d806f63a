"""Which expert gets which seed sample, from the samples' losses under every expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lowest(losses: Tensor) -> Tensor:
    """The paper's rule (section 3.3): the expert with the lowest perplexity, ties to the first.

    Args:
        losses: (num_samples, num_experts).

    Returns:
        int64, (num_samples,).
    """
    return losses.argmin(dim=1)


def balanced(losses: Tensor) -> Tensor:
    """Buckets of equal size (up to one sample) with the least total loss.

    An assignment problem: every expert has ceil(num_samples / num_experts) places.

    Args:
        losses: (num_samples, num_experts).

    Returns:
        int64, (num_samples,).
    """
    from scipy.optimize import linear_sum_assignment

    samples, experts = losses.shape
    places = math.ceil(samples / experts)
    # Losses differ between samples far more than between experts; only the latter matters here,
    # and small numbers make the solver's dual steps short.
    regret = (losses - losses.min(dim=1, keepdim=True).values).double().numpy()
    _rows, columns = linear_sum_assignment(regret.repeat(places, axis=1))
    return torch.from_numpy(columns // places)


ASSIGNMENTS = {"balanced": balanced, "lowest": lowest}
