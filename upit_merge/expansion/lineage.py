"""The lineage: which experts there will be and whose children they are. No tensor is touched.

Everything the genetic algorithm asks of a new expert, its likeness to all others, follows from
the Gram matrix of the checkpoints' deltas: with independent DARE masks, expectations of inner
products of children are sums over those of their parents (DESIGN, "one pass, then algebra").
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from upit_merge.errors import UpitError
from upit_merge.expansion.similarity import cosine, squared_distance
from upit_merge.recipe import Parameters

# Likenesses are compared to this many digits, so that rounding differences between machines
# cannot decide who becomes a parent; true ties go to the lower index.
_DECIDING_DIGITS = 10


@dataclass(frozen=True)
class Expert:
    """How one expert comes to be.

    Attributes:
        checkpoint: The checkpoint it is, for those that are not children.
        parents: The two experts it is a child of.
        alpha: Share of the first parent; the second has 1 - alpha.
        weights: Its genome, the share of every checkpoint in it; sums to 1.
    """

    checkpoint: int | None
    parents: tuple[int, int] | None
    alpha: float | None
    weights: tuple[float, ...]

    def to_report(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "parents": list(self.parents) if self.parents else None,
            "alpha": self.alpha,
            "weights": list(self.weights),
        }


@dataclass(frozen=True)
class Lineage:
    """All experts, in order: the kept checkpoints first, then the children.

    Attributes:
        experts: Their ancestry.
        gram: Expected inner products of their deltas, float64, (num_experts, num_experts).
        mutation: `once` or `compound`, see `plan_lineage`.
        summary: One sentence on what was done, for people.
    """

    experts: tuple[Expert, ...]
    gram: torch.Tensor
    mutation: str
    summary: str

    def __len__(self) -> int:
        return len(self.experts)

    def smallest_distance(self) -> float | None:
        """Smallest Euclidean distance between two experts' deltas; None for a single expert."""
        pairs = _pairwise(squared_distance(self.gram))
        return float(pairs.min().sqrt()) if pairs.numel() else None

    def largest_cosine(self) -> float | None:
        """Cosine of the most similar pair of experts; None for a single expert."""
        pairs = _pairwise(cosine(self.gram))
        return float(pairs.max()) if pairs.numel() else None


def _pairwise(matrix: torch.Tensor) -> torch.Tensor:
    row, column = torch.triu_indices(matrix.shape[0], matrix.shape[1], offset=1)
    return matrix[row, column]


def _dissimilarity(gram: torch.Tensor, similarity: str) -> torch.Tensor:
    """(k, k), larger is more different; rounded to the digits that may decide."""
    if similarity == "cosine":
        return torch.round(1 - cosine(gram), decimals=_DECIDING_DIGITS)
    distances = squared_distance(gram)
    scale = float(distances.max()) or 1.0
    return torch.round(distances / scale, decimals=_DECIDING_DIGITS)


def keep_diverse(gram: torch.Tensor, count: int, similarity: str) -> list[int]:
    """Greedy farthest-point selection of `count` of the m checkpoints, in their order.

    Starts from the most dissimilar pair; then always adds the checkpoint whose nearest chosen one
    is farthest. A single one is the last checkpoint, the fully trained one.
    """
    if count == 1:
        return [gram.shape[0] - 1]
    distances = _dissimilarity(gram, similarity)
    pairs: list[tuple[int, int]] = list(combinations(range(gram.shape[0]), 2))
    chosen: list[int] = [*max(pairs, key=lambda pair: float(distances[pair]))]
    while len(chosen) < count:
        rest = [i for i in range(gram.shape[0]) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(distances[i, chosen].min())))
    return sorted(chosen)


class _Population:
    """The experts so far, with their expected Gram matrix."""

    def __init__(
        self,
        gram: torch.Tensor,
        densities: torch.Tensor,
        kept: list[int],
        parameters: Parameters,
        size: int,
    ) -> None:
        self.experts = [
            Expert(index, None, None, tuple(float(i == index) for i in range(gram.shape[1])))
            for index in kept
        ]
        self._parameters = parameters
        self._densities = densities
        self._pairs = torch.zeros(size, size, dtype=torch.bool)
        # Fresh masks make a child's norm a sum over checkpoints, whatever the tensors; compounded
        # ones need every tensor's own matrix, because densities may differ between tensors.
        self._checkpoints = gram.sum(0)
        dropped = gram.diagonal(dim1=1, dim2=2) * (1 / densities - 1)
        self._noise = dropped.sum(0)
        kept_gram = gram[:, kept][:, :, kept]
        if parameters.mutation == "once":
            kept_gram = kept_gram.sum(0, keepdim=True)
        self._grams = torch.zeros(kept_gram.shape[0], size, size, dtype=torch.float64)
        self._grams[:, : len(kept), : len(kept)] = kept_gram

    @property
    def gram(self) -> torch.Tensor:
        """Expected inner products, (num_experts, num_experts), summed over the tensors."""
        size = len(self.experts)
        return self._grams[:, :size, :size].sum(0)

    def choose_parents(self, generator: random.Random) -> tuple[int, int]:
        """The next pair, by the recipe's rule; of equals the one with the lower indices."""
        rows, columns = torch.triu_indices(len(self.experts), len(self.experts), offset=1)
        used = self._pairs[rows, columns]
        if self._parameters.repeat_pairs or bool(used.all()):
            used = torch.zeros_like(used)
        if self._parameters.parents == "random":
            chosen = generator.choice((~used).nonzero().flatten().tolist())
        else:
            distances = _dissimilarity(self.gram, self._parameters.similarity)[rows, columns]
            chosen = int(distances.masked_fill(used, -torch.inf).argmax())
        return int(rows[chosen]), int(columns[chosen])

    def add_child(self, first: int, second: int, alpha: float) -> None:
        beta = 1 - alpha
        mother, father = self.experts[first], self.experts[second]
        weights = tuple(
            alpha * a + beta * b for a, b in zip(mother.weights, father.weights, strict=True)
        )
        size, grams = len(self.experts), self._grams
        if self._parameters.mutation == "compound":
            # ⟨c, d⟩ = α⟨a, d⟩ + β⟨b, d⟩ for every expert d: masks are unbiased and independent.
            cross = alpha * grams[:, first, :size] + beta * grams[:, second, :size]
            density = self._densities[:, 0]
            norm = (
                alpha**2 * grams[:, first, first] / density
                + beta**2 * grams[:, second, second] / density
                + 2 * alpha * beta * grams[:, first, second]
            )
        else:
            # Masks are fresh, so a child shares its parents' genomes but not their noise.
            w = torch.tensor(weights, dtype=torch.float64)
            others = torch.tensor([e.weights for e in self.experts], dtype=torch.float64)
            products = self._checkpoints @ w
            cross = (others @ products).unsqueeze(0)
            norm = (w @ products + w**2 @ self._noise).unsqueeze(0)
        grams[:, size, :size] = grams[:, :size, size] = cross
        grams[:, size, size] = norm
        self._pairs[first, second] = True
        self.experts.append(Expert(None, (first, second), alpha, weights))


def needs_gram(num_checkpoints: int, num_experts: int, parameters: Parameters) -> bool:
    """Whether the lineage depends on how alike the checkpoints are.

    If not, one pass over them suffices: experts are written while their likeness is measured.
    """
    if num_experts in (1, num_checkpoints):
        return False
    return num_checkpoints > num_experts or parameters.parents != "random"


def plan_lineage(
    gram: torch.Tensor, densities: torch.Tensor, num_experts: int, parameters: Parameters
) -> Lineage:
    """Grow m checkpoints into n experts (UpIT's genetic expansion, paper section 3.2).

    Each round draws alpha uniformly and crosses two parents into a child,
    base + alpha · DARE(delta_j) + (1 - alpha) · DARE(delta_k). `parents: most_dissimilar` takes
    the least alike pair of all experts so far, children included, each pair once while unused
    pairs remain (as often as it wins with `repeat_pairs`); `random` takes any pair.

    `mutation: once` drops from the checkpoints' deltas only: a child is
    base + Σ_i w_i · DARE(delta_i), w its genome, with fresh masks. `compound` drops from the
    parents' deltas even if they are children, whose noise is then rescaled again.

    Args:
        gram: From `delta_gram`, float64, (num_tensors, m, m).
        densities: Share of entries DARE keeps, float64, (num_tensors, m).
        num_experts: n. If m > n the most diverse checkpoints are kept; if m = n all are, as
            they are.

    Raises:
        UpitError: there is one checkpoint, hence no pair of parents, but n > 1.
    """
    m = gram.shape[1]
    if m == 1 and num_experts > 1:
        raise UpitError(
            f"One checkpoint cannot be the parents of {num_experts} experts; list at least two "
            "checkpoints under models:, or set num_experts: 1."
        )
    kept = list(range(m))
    if m > num_experts:
        kept = keep_diverse(gram.sum(0), num_experts, parameters.similarity)
        summary = (
            f"kept the last of {m} checkpoints as the only expert"
            if num_experts == 1
            else f"kept the {num_experts} most diverse of {m} checkpoints as experts"
        )
    elif m == num_experts:
        summary = f"every one of the {m} checkpoints is an expert; no expansion"
    else:
        born = num_experts - m
        children = f"{born} {'child' if born == 1 else 'children'}"
        summary = f"{m} checkpoints and {children} make {num_experts} experts"
    population = _Population(gram, densities, kept, parameters, num_experts)
    # Python's own generator: the same numbers in every version and on every machine.
    generator = random.Random(f"upit lineage {parameters.seed}")
    while len(population.experts) < num_experts:
        pair = population.choose_parents(generator)
        population.add_child(*pair, alpha=generator.random())
    return Lineage(tuple(population.experts), population.gram, parameters.mutation, summary)
