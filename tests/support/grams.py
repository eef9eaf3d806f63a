"""Random Gram matrices, and the lineages planned from them."""

from __future__ import annotations

from typing import Any

import torch

from upit_merge.config.recipe import Parameters
from upit_merge.merge.growth import plan_lineage


def random_gram(m: int, seed: int = 0, tensors: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(tensors, m, 50, generator=generator, dtype=torch.float64)
    return points @ points.transpose(1, 2)


def plan(gram: torch.Tensor, n: int, density: float = 0.9, **parameters: Any) -> Any:
    densities = torch.full(gram.shape[:2], density, dtype=torch.float64)
    return plan_lineage(gram, densities, n, Parameters(num_experts=n, **parameters))
