"""Which experts tokens took, layer by layer, and how much each of them weighed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choices:
    """Which experts tokens took in some layers.

    Attributes:
        layers: The numbers of the layers.
        experts: int64, (layers, tokens, top_k), the expert of the largest weight first.
        weights: float32, of the same shape: by what the outputs of these experts were multiplied.
    """

    layers: tuple[int, ...]
    experts: Tensor
    weights: Tensor

    def counts(self, num_experts: int) -> Tensor:
        """Return how many tokens each expert was chosen for, int64, (layers, num_experts)."""
        layers = len(self.layers)
        ones = torch.ones_like(self.experts).view(layers, -1)
        counts = torch.zeros(layers, num_experts, dtype=torch.int64)
        return counts.scatter_add_(1, self.experts.view(layers, -1), ones)

    @property
    def shares(self) -> Tensor:
        """Share of a token's weight in a layer that each of the chosen has, shaped as `weights`."""
        return _shares(self.weights)

    def summed(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return who has the largest parts of the tokens' weights, and which: means over the layers.

        Every layer counts alike, whatever its weights sum up to.

        Returns:
            Experts, the first one most, int64, and their parts, float64, both (tokens, top_k).
        """
        layers, tokens, top_k = self.experts.shape
        sums = torch.zeros(tokens, num_experts, dtype=torch.float64)
        for taken, part in zip(self.experts, _shares(self.weights.double()), strict=True):
            sums.scatter_add_(1, taken, part)
        means = sums / layers
        order = means.argsort(dim=1, descending=True, stable=True)[:, :top_k]
        return order, means.gather(1, order)

    def owners(self, num_experts: int, layer: int | None = None) -> Tensor:
        """Return which expert weighs most for each token, int64, (tokens,).

        Args:
            layer: In this layer; without it, in all of them, see `summed`.
        """
        if layer is not None:
            return self.experts[self.layers.index(layer), :, 0]
        return self.summed(num_experts)[0][:, 0]


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-30)
