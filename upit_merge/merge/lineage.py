"""The lineage: which experts there are and whose children they are. Plain data, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from upit_merge.merge.similarity import cosine, squared_distance


@dataclass(frozen=True)
class Expert:
    """How one expert comes to be.

    Attributes:
        checkpoint: The checkpoint it is, for those that are neither children nor averages.
        parents: The two experts it is a child of; None for an average of checkpoints.
        alpha: Share of the first parent; the second has 1 - alpha.
        weights: Its genome, the share of every checkpoint in it; sums to 1.
    """

    checkpoint: int | None
    parents: tuple[int, int] | None
    alpha: float | None
    weights: tuple[float, ...]

    @property
    def is_average(self) -> bool:
        """Whether it is a plain mixture, of which nothing is dropped."""
        return self.checkpoint is None and self.parents is None

    def to_report(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "parents": list(self.parents) if self.parents else None,
            "alpha": self.alpha,
            "weights": list(self.weights),
        }


@dataclass(frozen=True)
class Unit:
    """FFN tensors whose experts descend alike: all of them, a layer's three, or a single one.

    Attributes:
        name: What the tensors' dense names begin with, e.g. `model.layers.3.mlp`.
        tensors: Their indices.
        experts: Ancestry of the experts' parts of these tensors.
        gram: Expected inner products of their deltas, float64, (num_experts, num_experts).
    """

    name: str
    tensors: tuple[int, ...]
    experts: tuple[Expert, ...]
    gram: torch.Tensor

    @cached_property
    def checkpoints(self) -> list[int]:
        """Indices of the checkpoints that occur in some expert."""
        weights = torch.tensor([expert.weights for expert in self.experts])
        return [int(i) for i in weights.any(0).nonzero().flatten()]


@dataclass(frozen=True)
class Lineage:
    """All experts, in order: the kept checkpoints first, then the children.

    Attributes:
        units: At least one; together they have every FFN tensor once. An expert that is a
            checkpoint, or an average, is the same in all of them.
        mutation: `once` or `compound`, see `plan_lineage`.
        summary: One sentence on what was done, for people.
        copies: The experts are copies, of which several may be of one checkpoint.
        perturbed: They are changed after copying; Gram matrices are of what they were before.
    """

    units: tuple[Unit, ...]
    mutation: str
    summary: str
    copies: bool = False
    perturbed: bool = False

    def __len__(self) -> int:
        return len(self.units[0].experts)

    @cached_property
    def _by_tensor(self) -> Mapping[int, Unit]:
        return {tensor: unit for unit in self.units for tensor in unit.tensors}

    def unit_of(self, tensor: int) -> Unit:
        """Return the unit that an FFN tensor belongs to."""
        return self._by_tensor[tensor]

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """The experts as a whole.

        Of several units a child has no parents of its own; its weights are the mean over the
        tensors.
        """
        if len(self.units) == 1:
            return self.units[0].experts
        parts = [unit.experts for unit in self.units for _tensor in unit.tensors]
        whole = []
        for index, expert in enumerate(self.units[0].experts):
            if expert.parents is not None:
                shares = zip(*(experts[index].weights for experts in parts), strict=True)
                weights = tuple(sum(share) / len(parts) for share in shares)
                expert = Expert(None, None, None, weights)
            whole.append(expert)
        return tuple(whole)

    @property
    def gram(self) -> torch.Tensor:
        """Expected inner products of the whole deltas, float64, (num_experts, num_experts)."""
        return torch.stack([unit.gram for unit in self.units]).sum(0)

    def smallest_distance(self) -> float | None:
        """Smallest Euclidean distance between two experts' deltas.

        None for a single expert and for perturbed copies, as are the next two.
        """
        pairs = self._pairwise(squared_distance(self.gram))
        return float(pairs.min().sqrt()) if pairs.numel() else None

    def mean_distance(self) -> float | None:
        """Mean Euclidean distance of two experts' deltas over all pairs."""
        pairs = self._pairwise(squared_distance(self.gram))
        return float(pairs.sqrt().mean()) if pairs.numel() else None

    def largest_cosine(self) -> float | None:
        """Cosine of the most similar pair of experts."""
        pairs = self._pairwise(cosine(self.gram))
        return float(pairs.max()) if pairs.numel() else None

    def to_report(self) -> dict[str, Any]:
        """Return who the experts are; with `units` if that differs between tensors."""
        report: dict[str, Any] = {"experts": [expert.to_report() for expert in self.experts]}
        if len(self.units) > 1:
            report["units"] = [
                {"name": unit.name, "experts": [expert.to_report() for expert in unit.experts]}
                for unit in self.units
            ]
        return report

    def _pairwise(self, matrix: torch.Tensor) -> torch.Tensor:
        if self.perturbed:
            return matrix.new_empty(0)
        row, column = torch.triu_indices(matrix.shape[0], matrix.shape[1], offset=1)
        return matrix[row, column]
