"""Differences of low rank, as LoRA stores them: their inner products, and rows added to a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Elements that are worked on at a time: they stay in the processor's cache.
_TILE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class LowRank:
    """The matrix scale · up @ down.

    Args:
        up: float32, (rows, rank).
        down: float32, (rank, columns).
    """

    scale: float
    up: torch.Tensor
    down: torch.Tensor


def factor_gram(deltas: Sequence[LowRank | None]) -> torch.Tensor:
    """Return inner products of matrices of low rank; none of them is ever formed.

    ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ): with all factors side by side, two products give a
    matrix's inner products with all others.

    Args:
        deltas: All of one shape; None is zero.

    Returns:
        float64, (m, m).
    """
    gram = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    given = [(index, delta) for index, delta in enumerate(deltas) if delta is not None]
    if not given:
        return gram
    up = torch.cat([delta.up.T for _index, delta in given]).double()
    down = torch.cat([delta.down for _index, delta in given]).double()
    owners = torch.tensor([index for index, delta in given for _row in delta.down])
    first = 0
    for index, delta in given:  # the inner products with itself and with all that follow
        own = slice(first, first + delta.down.shape[0])
        products = (up[own] @ up[first:].T) * (down[own] @ down[first:].T)
        gram[index].index_add_(0, owners[first:], products.sum(0))
        first = own.stop
    scales = torch.tensor([delta.scale if delta else 0.0 for delta in deltas], dtype=torch.float64)
    return (gram + gram.triu(1).T) * scales * scales.unsqueeze(1)


def add_low_rank(rows: torch.Tensor, delta: LowRank, start: int) -> torch.Tensor:
    """`rows`, the base's from row `start` on, plus the same rows of a difference.

    Products and sums are taken one by one, not by a matrix product: so a row has the same bits
    whatever the block it is in, the processor and the number of threads.

    Returns:
        float32, of the shape of `rows`.
    """
    total = rows.to(torch.float32, copy=True)
    step = max(1, _TILE_ELEMENTS // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        tile = total[first : first + step]
        up = delta.up[start + first : start + first + tile.shape[0]]
        part, product = torch.zeros_like(tile), torch.empty_like(tile)
        for column, row in zip(up.T, delta.down, strict=True):
            part.add_(torch.mul(column.unsqueeze(1), row, out=product))
        tile.add_(part.mul_(delta.scale))
    return total


def with_magnitudes(rows: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Return rows in their directions, in lengths that are given (DoRA).

    Their own lengths are summed in float64: in what order does not show once they are rounded.

    Args:
        rows: float32.
        magnitudes: One per row.
    """
    lengths = rows.double().square().sum(1).sqrt()
    return rows * (magnitudes.double() / lengths).float().unsqueeze(1)
