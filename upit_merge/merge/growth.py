"""The genetic algorithm: who becomes whose child. No tensor is touched.

Everything it asks of a new expert, its likeness to all others, follows from the Gram matrix of the
checkpoints' deltas: with independent DARE masks, expectations of inner products of children are
sums over those of their parents (DESIGN, "one pass, then algebra").
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from upit_merge.config.recipe import Parameters
from upit_merge.errors import UpitError
from upit_merge.merge.farthest import FarthestChild
from upit_merge.merge.lineage import Expert, Lineage, Unit
from upit_merge.merge.selection import founders
from upit_merge.merge.similarity import dissimilarity
from upit_merge.merge.upcycle import perturbs
from upit_merge.models.formats import PROJECTIONS, ffn_tensor


class _Population:
    """The experts of a unit so far, with their expected Gram matrix."""

    def __init__(
        self,
        gram: torch.Tensor,
        densities: torch.Tensor,
        first: Sequence[Expert],
        parameters: Parameters,
        size: int,
    ) -> None:
        self.experts = list(first)
        self._parameters = parameters
        self._densities = densities
        self._pairs = torch.zeros(size, size, dtype=torch.bool)
        # Fresh masks make a child's norm a sum over checkpoints, whatever the tensors; compounded
        # ones need every tensor's own matrix, because densities may differ between tensors.
        self._checkpoints = gram.sum(0)
        dropped = gram.diagonal(dim1=1, dim2=2) * (1 / densities - 1)
        self._noise = dropped.sum(0)
        genomes = torch.tensor([expert.weights for expert in first], dtype=torch.float64)
        founding = genomes @ gram @ genomes.T
        if parameters.mutation == "once":
            founding = founding.sum(0, keepdim=True)
        self._grams = torch.zeros(founding.shape[0], size, size, dtype=torch.float64)
        self._grams[:, : len(first), : len(first)] = founding
        self._farthest: FarthestChild | None = None
        if parameters.parents == "farthest_child" and len(first) < size:
            self._farthest = FarthestChild(founding.sum(0), size, parameters.similarity)

    @property
    def gram(self) -> torch.Tensor:
        """Expected inner products, (num_experts, num_experts), summed over the tensors."""
        size = len(self.experts)
        return self._grams[:, :size, :size].sum(0)

    def choose(self, generator: random.Random) -> tuple[int, int, float]:
        """Return the next pair and the first one's share, by the recipe's rule."""
        if self._farthest is not None:
            return self._farthest.choose()
        pair = self._choose_parents(generator)
        return *pair, generator.random()

    def _choose_parents(self, generator: random.Random) -> tuple[int, int]:
        """Of equal pairs the one with the lower indices."""
        rows, columns = torch.triu_indices(len(self.experts), len(self.experts), offset=1)
        used = self._pairs[rows, columns]
        if self._parameters.repeat_pairs or bool(used.all()):
            used = torch.zeros_like(used)
        if self._parameters.parents == "random":
            chosen = generator.choice((~used).nonzero().flatten().tolist())
        else:
            distances = dissimilarity(self.gram, self._parameters.similarity)[rows, columns]
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
            systematic = norm  # what a child of this child is made of, noise and all
        else:
            # Masks are fresh, so a child shares its parents' genomes but not their noise.
            w = torch.tensor(weights, dtype=torch.float64)
            others = torch.tensor([e.weights for e in self.experts], dtype=torch.float64)
            products = self._checkpoints @ w
            cross = (others @ products).unsqueeze(0)
            norm = (w @ products + w**2 @ self._noise).unsqueeze(0)
            systematic = (w @ products).unsqueeze(0)
        grams[:, size, :size] = grams[:, :size, size] = cross
        grams[:, size, size] = norm
        self._pairs[first, second] = True
        self.experts.append(Expert(None, (first, second), alpha, weights))
        if self._farthest is not None:
            self._farthest.add(cross.sum(0), float(systematic.sum()))


def needs_gram(num_checkpoints: int, num_experts: int, parameters: Parameters) -> bool:
    """Return whether the lineage depends on how alike the checkpoints are.

    If not, one pass over them suffices: experts are written while their likeness is measured.
    """
    if parameters.expansion == "copy" or num_experts in (1, num_checkpoints):
        return False
    if num_checkpoints > num_experts:
        return parameters.select != "last"
    return parameters.parents != "random"


def plan_lineage(
    gram: torch.Tensor, densities: torch.Tensor, num_experts: int, parameters: Parameters
) -> Lineage:
    """Grow m checkpoints into n experts (UpIT's genetic expansion, paper section 3.2).

    Each round crosses two parents into a child,
    base + alpha · DARE(delta_j) + (1 - alpha) · DARE(delta_k). `parents: most_dissimilar` takes
    the least alike pair of all experts so far, children included, each pair once while unused
    pairs remain (as often as it wins with `repeat_pairs`); `random` takes any pair; both draw
    alpha uniformly. `farthest_child` takes the pair and the alpha whose child is farthest from
    every expert so far, see `FarthestChild`. All of this happens once for the whole model, or with
    `granularity: layer` or `tensor` in every layer or tensor by itself.

    `mutation: once` drops from the checkpoints' deltas only: a child is
    base + Σ_i w_i · DARE(delta_i), w its genome, with fresh masks. `compound` drops from the
    parents' deltas even if they are children, whose noise is then rescaled again.

    With `expansion: copy` nothing is grown: expert i is checkpoint i mod m.

    Args:
        gram: From `delta_gram`, float64, (num_tensors, m, m).
        densities: Share of entries DARE keeps, float64, (num_tensors, m).
        num_experts: n. If m > n checkpoints are left out or averaged, see `founders`; if m = n
            all are kept as they are.

    Raises:
        UpitError: there is one checkpoint, hence no pair of parents, but n > 1.
    """
    m = gram.shape[1]
    if parameters.expansion == "copy":
        return _copies(gram, num_experts, parameters)
    if m == 1 and num_experts > 1:
        raise UpitError(
            f"One checkpoint cannot be the parents of {num_experts} experts; list at least two "
            "checkpoints under models:, or set num_experts: 1."
        )
    first = founders(gram.sum(0), num_experts, parameters.select, parameters.similarity)
    units = []
    # Experts that are not children are the same in every unit, so one is enough for them.
    granularity = parameters.granularity if num_experts > m else "model"
    for name, tensors in _units(granularity, len(gram), parameters.dense_layers):
        rows = list(tensors)
        population = _Population(gram[rows], densities[rows], first, parameters, num_experts)
        # Python's own generator: the same numbers in every version and on every machine.
        whose = "" if granularity == "model" else f" {name}"
        generator = random.Random(f"upit lineage {parameters.seed}{whose}")
        while len(population.experts) < num_experts:
            population.add_child(*population.choose(generator))
        units.append(Unit(name, tensors, tuple(population.experts), population.gram))
    return Lineage(tuple(units), parameters.mutation, _summary(m, num_experts, parameters))


def _copies(gram: torch.Tensor, num_experts: int, parameters: Parameters) -> Lineage:
    m = gram.shape[1]
    sources = [index % m for index in range(num_experts)]
    experts = tuple(
        Expert(source, None, None, tuple(float(i == source) for i in range(m)))
        for source in sources
    )
    tensors = tuple(range(len(gram)))
    unit = Unit("model", tensors, experts, gram.sum(0)[sources][:, sources])
    summary = f"{num_experts} experts are copies of {m} checkpoint{'s' * (m > 1)}"
    if parameters.noise:
        summary += f", with noise of {parameters.noise:g} standard deviations"
    if parameters.reinitialise:
        summary += f", with {parameters.reinitialise:.0%} of the FFN's dimensions drawn anew"
    perturbed = perturbs(parameters)
    return Lineage((unit,), parameters.mutation, summary, copies=True, perturbed=perturbed)


def _units(
    granularity: str, num_tensors: int, first_layer: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and tensors of every unit; FFN tensors come layer by layer, as in `ffn_names`."""
    if granularity == "model":
        yield "model", tuple(range(num_tensors))
        return
    per_layer = len(PROJECTIONS)
    for layer in range(num_tensors // per_layer):
        names = [ffn_tensor(first_layer + layer, p).removesuffix(".weight") for p in PROJECTIONS]
        tensors = range(layer * per_layer, (layer + 1) * per_layer)
        if granularity == "layer":
            yield names[0].rpartition(".")[0], tuple(tensors)
        else:
            yield from ((name, (t,)) for name, t in zip(names, tensors, strict=True))


def _summary(m: int, n: int, parameters: Parameters) -> str:
    if m < n:
        children = f"{n - m} {'child' if n - m == 1 else 'children'}"
        summary = f"{m} checkpoints and {children} make {n} experts"
        if parameters.granularity != "model":
            summary += f", parents chosen for every {parameters.granularity} by itself"
        return summary
    if m == n:
        return f"every one of the {m} checkpoints is an expert; no expansion"
    if parameters.select == "merge_similar":
        if n == 1:
            return f"averaged all {m} checkpoints into the only expert"
        return f"averaged the most similar of {m} checkpoints, which makes {n} experts"
    if n == 1:
        return f"kept the last of {m} checkpoints as the only expert"
    which = f"last {n}" if parameters.select == "last" else f"{n} most diverse"
    return f"kept the {which} of {m} checkpoints as experts"
