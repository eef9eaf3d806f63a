"""Experts that are nearly one: by their weights, read from the files, or by how they are routed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from upit_merge.errors import UpitError
from upit_merge.io.sources import TensorSource
from upit_merge.io.tensor_file import row_blocks
from upit_merge.merge.similarity import cosine, squared_distance
from upit_merge.models.formats import PROJECTIONS
from upit_merge.models.mixture import MixtureArchitecture

# Weights are alike if their distance is less than this share of that of most pairs (the median),
NEAR_SHARE = 0.25
# or of the weights' own norm, which is about what rounding to bfloat16 changes.
SAME_DISTANCE = 2e-3
# Routing is alike if the logits' correlation is at least this, mean over the layers.
SAME_ROUTING = 0.95

_BLOCK_ELEMENTS = 1 << 22  # of all experts together, 32 MiB in float64


@dataclass(frozen=True)
class ExpertWeights:
    """How far the experts' FFN weights are from each other.

    Attributes:
        squared: ‖a − b‖² by layer, float64, (num_layers, num_experts, num_experts).
        norms: ‖a‖² by layer, (num_layers, num_experts).
        gram: Inner products of what tells an expert from their mean, like `squared`.
    """

    squared: Tensor
    norms: Tensor
    gram: Tensor

    def distance(self) -> Tensor:
        """Return distances over all layers as a share of the two's norm, (experts, experts)."""
        return _relative(self.squared.sum(0), self.norms.sum(0))

    def distance_by_layer(self) -> Tensor:
        """Return the same for every layer."""
        return _relative(self.squared, self.norms)

    def cosine(self) -> Tensor:
        """Return cosines of what tells the experts from their mean, over all layers."""
        return cosine(self.gram.sum(0))


def _relative(squared: Tensor, norms: Tensor) -> Tensor:
    size = (norms.unsqueeze(-1) + norms.unsqueeze(-2)) / 2
    return (squared / size.clamp(min=1e-300)).sqrt()


def compare_weights(
    moe: TensorSource,
    architecture: MixtureArchitecture,
    *,
    on_progress: Callable[[int], object] = lambda _: None,
) -> ExpertWeights:
    """Compare the FFNs of all pairs of experts; a few rows of each are in memory at a time.

    Differences from the first expert are multiplied, not the weights: of neighbours' weights all
    digits are alike that a product would keep.

    Args:
        on_progress: Called with the number of elements read.

    Raises:
        UpitError: a weight is NaN or infinite.
    """
    layers, count = architecture.mixture_layers, architecture.num_experts
    grams = torch.zeros(len(layers), count, count, dtype=torch.float64)
    norms = torch.zeros(len(layers), count, dtype=torch.float64)
    for number, layer in enumerate(layers):
        for projection in PROJECTIONS:
            names = [architecture.format.expert_tensor(layer, e, projection) for e in range(count)]
            for start, stop in row_blocks(moe.specs[names[0]], _BLOCK_ELEMENTS // count):
                rows = torch.stack([moe.rows(n, start, stop).double().flatten() for n in names])
                norms[number] += rows.square().sum(1)
                rows -= rows[0].clone()
                grams[number] += rows @ rows.T
                on_progress(rows.numel())
        if not (grams[number].isfinite().all() and norms[number].isfinite().all()):
            raise UpitError(
                f"{moe.label} has experts with NaN or infinite weights in layer {layer}; make the "
                "model again."
            )
    squared = squared_distance(grams)
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    return ExpertWeights(squared, norms, centre @ grams @ centre)


@dataclass(frozen=True)
class Pair:
    """Two experts, and how alike they are.

    Attributes:
        experts: The lower number first.
        distance: Of their weights, over all layers, as a share of their norm.
        typical: The same as a share of the median of all pairs; None where there is one pair.
        cosine: Of what tells their weights from the experts' mean.
        correlation: Of their router logits, mean over the layers.
        layers_alike: In how many layers the correlation is at least `SAME_ROUTING`.
        by_weights, by_routing: Whether they are twins.
    """

    experts: tuple[int, int]
    distance: float
    typical: float | None
    cosine: float
    correlation: float
    layers_alike: int
    by_weights: bool
    by_routing: bool


def pairs_of(weights: ExpertWeights, correlation: Tensor) -> list[Pair]:
    """Return all pairs of experts, the most alike first: twins, then by distance.

    Args:
        correlation: Of the router's logits, (num_layers, num_experts, num_experts).
    """
    distance, cosines, routed = weights.distance(), weights.cosine(), correlation.mean(0)
    numbers = list(combinations(range(len(distance)), 2))
    if not numbers:
        return []
    first, second = (torch.tensor(side) for side in zip(*numbers, strict=True))
    median = float(distance[first, second].median()) if len(numbers) > 2 else 0.0
    found = []
    for a, b in numbers:
        far, alike = float(distance[a, b]), float(routed[a, b])
        found.append(
            Pair(
                (a, b),
                far,
                far / median if median else None,
                float(cosines[a, b]),
                alike,
                int((correlation[:, a, b] >= SAME_ROUTING).sum()),
                far <= max(SAME_DISTANCE, NEAR_SHARE * median),
                alike >= SAME_ROUTING,
            )
        )
    return sorted(found, key=lambda p: (-p.by_weights - p.by_routing, p.distance, -p.correlation))
