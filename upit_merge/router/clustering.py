"""Gates of copies: a spherical k-means on what the gate sees, which asks no expert for a loss.

Where every expert is a copy of the same model no loss tells them apart. What can be told apart is
the tokens: each expert is given those of one direction.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from upit_merge.router.objectives import GateData

# Rounds of Lloyd's algorithm at most; on hidden states of text some twenty are enough.
MOST_ROUNDS = 50
# It has converged when no more than this share of the tokens goes to another centroid.
_TOLERANCE = 1e-4


def kmeans(data: GateData, *, seed: int) -> Tensor:
    """Return the centroids of a spherical k-means on the inputs, of unit length.

    Maximises the mean cosine of a token's input with the centroid it is nearest to: Lloyd's
    algorithm on inputs of unit length, begun as k-means++ does, with rows drawn in proportion to
    their distance (1 - cosine) from those that were drawn before. A centroid that no token is
    nearest to is put where the token lies that is farthest from its own. Who is assigned to whom
    in `data` does not matter, nor how the tokens are shared among processes.

    Args:
        seed: Of the first centroids; every layer draws others.

    Returns:
        float32, (num_experts, hidden_size).
    """
    points = _Points(data)
    generator = torch.Generator().manual_seed((seed + data.layer) % 2**63)
    centroids = points.row(_drawn(points.counts, generator), generator).unsqueeze(0)
    while len(centroids) < data.num_experts:
        distances = points.nearest(centroids)[1]
        sample = _drawn(points.by_sample(distances), generator)
        new = points.row(sample, generator, distances)
        centroids = torch.cat([centroids, new.unsqueeze(0)])
    before: Tensor | None = None
    for _ in range(MOST_ROUNDS):
        members, distances = points.nearest(centroids)
        if before is not None:
            moved = data.total((members != before).sum().double())
            if float(moved) <= _TOLERANCE * data.num_tokens:
                break
        sums, sizes = points.sums(members, data.num_experts)
        centroids = torch.where(
            (sums.norm(dim=1, keepdim=True) > 0), F.normalize(sums, dim=1).float(), centroids
        )
        for empty in (sizes == 0).nonzero().flatten().tolist():
            sample, row = points.farthest(distances)
            centroids[empty] = points.at(sample, row)
            distances = points.without(distances, sample, row)
        before = members
    return centroids.cpu()


def _drawn(weights: Tensor, generator: torch.Generator) -> int:
    """Return an index drawn in proportion to weights, or evenly where all are zero; (n,)."""
    weights = weights if float(weights.sum()) > 0 else torch.ones_like(weights)
    place = torch.rand((), generator=generator, dtype=torch.float64) * weights.sum()
    return min(int((weights.cumsum(0) <= place).sum()), len(weights) - 1)


class _Points:
    """The inputs of unit length, of which every process has some samples' rows.

    What goes by samples, or is one row, all processes have; what goes by rows each its own.
    """

    def __init__(self, data: GateData) -> None:
        self._data = data
        # Of every sample, as many as are here.
        self._rows = torch.tensor([span.stop - span.start for span in data.spans])
        self._sample_of_row = torch.arange(len(data.spans)).repeat_interleave(self._rows)

    @property
    def counts(self) -> Tensor:
        """Rows of every sample, float64, (num_samples,)."""
        return torch.tensor(self._data.lengths, dtype=torch.float64)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for h, _labels in self._data.chunks():
            yield slice(start, start + len(h)), F.normalize(h, dim=1)
            start += len(h)

    def nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Return every row's centroid, int64, and its distance from it, float32, (num_rows,)."""
        members = torch.zeros(len(self._data.inputs), dtype=torch.int64)
        distances = torch.zeros(len(self._data.inputs))
        for rows, h in self._chunks():
            best = (h @ centroids.to(h.device).T).max(dim=1)
            members[rows] = best.indices.cpu()
            distances[rows] = (1 - best.values).clamp(min=0).cpu()
        return members, distances

    def sums(self, members: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return the sums of every centroid's rows, and how many they are; both float64."""
        device = self._data.device
        summed = torch.zeros(num_experts, self._data.width, dtype=torch.float64, device=device)
        for rows, h in self._chunks():
            summed += F.one_hot(members[rows].to(device), num_experts).float().T @ h
        sizes = torch.bincount(members, minlength=num_experts).double()
        return self._data.total(summed).cpu(), self._data.total(sizes)

    def by_sample(self, values: Tensor) -> Tensor:
        """Return the sums of rows' values by sample, float64, (num_samples,)."""
        sums = torch.zeros(len(self._rows), dtype=torch.float64)
        return self._data.total(sums.index_add(0, self._sample_of_row, values.double()))

    def row(self, sample: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
        """Return one of a sample's rows, drawn in proportion to weights if there are any."""
        mine = torch.zeros(int(self._data.lengths[sample]), dtype=torch.float64)
        span = self._data.spans[sample]
        if span.stop > span.start and weights is not None:
            mine += weights[span].double()
        return self.at(sample, _drawn(self._data.total(mine), generator))

    def at(self, sample: int, row: int) -> Tensor:
        """Return a sample's row of this number, of unit length, float32, (hidden_size,)."""
        found = torch.zeros(self._data.width)
        span = self._data.spans[sample]
        if span.stop > span.start:
            found += F.normalize(self._data.inputs[span.start + row].float().cpu(), dim=0)
        return self._data.total(found)

    def farthest(self, distances: Tensor) -> tuple[int, int]:
        """Return the sample and the number therein of the row that is farthest from its own."""
        most = torch.full((len(self._rows),), 0.0, dtype=torch.float64)
        most = most.scatter_reduce(0, self._sample_of_row, distances.double(), "amax")
        sample = int(self._data.total(most).argmax())
        span, row = self._data.spans[sample], torch.zeros((), dtype=torch.float64)
        if span.stop > span.start:
            row += distances[span].argmax()
        return sample, int(self._data.total(row))

    def without(self, distances: Tensor, sample: int, row: int) -> Tensor:
        """Return the distances, with nothing left of one row's."""
        span, left = self._data.spans[sample], distances.clone()
        if span.stop > span.start:
            left[span.start + row] = 0.0
        return left
