"""The pair of parents, and their shares, whose child is farthest from every expert there is."""

from __future__ import annotations

import torch

from upit_merge.merge.similarity import DECIDING_DIGITS, squared_distance

# Shares of the first parent that are tried. Dyadic numbers, so that sums and products of genomes
# are exact on every machine.
SHARES = torch.arange(1, 64, dtype=torch.float64) / 64

# Squared norms below this share of what they are a difference of are rounding errors of zero.
_NOTHING = 1e-13


class FarthestChild:
    """Finds the child alpha · a + (1 - alpha) · b that is farthest from its nearest expert.

    Likeness is measured without the noise that a child's own DARE masks add: it is orthogonal to
    everything, the more of it the fewer checkpoints a child mixes, and would drive alpha to 0 or
    1, to a copy of a parent plus noise.

    What is known of a candidate stays true when an expert is added, but for its distance to that
    one: a round costs candidates, not candidates times experts. Memory: 63 numbers per pair.

    Args:
        gram: Inner products of the first experts, float64, (k, k), k >= 2.
        size: How many experts there will be.
        similarity: `cosine` or `l2`.
    """

    def __init__(self, gram: torch.Tensor, size: int, similarity: str) -> None:
        self._cosine = similarity == "cosine"
        self._gram = torch.zeros(size, size, dtype=torch.float64)
        self._firsts = torch.zeros(0, dtype=torch.long)
        self._seconds = torch.zeros(0, dtype=torch.long)
        # Of every pair and share, the smallest dissimilarity to an expert so far.
        self._nearest = torch.zeros(0, len(SHARES), dtype=torch.float64)
        self._size = 0
        for index in range(gram.shape[0]):
            self.add(gram[index, :index], float(gram[index, index]))

    def add(self, cross: torch.Tensor, norm: float) -> None:
        """Tell of a new expert.

        Args:
            cross: Its inner products with those before it, float64, (k,).
            norm: Its own, without the noise of its own masks if these are not passed on.
        """
        new, gram = self._size, self._gram
        gram[new, :new] = gram[:new, new] = cross
        gram[new, new] = norm
        self._size += 1
        known = self._dissimilarity(self._firsts, self._seconds, [new])
        self._nearest = torch.minimum(self._nearest, known)
        firsts, seconds = torch.arange(new), torch.full((new,), new)
        fresh = self._dissimilarity(firsts, seconds, range(self._size))
        self._firsts = torch.cat([self._firsts, firsts])
        self._seconds = torch.cat([self._seconds, seconds])
        self._nearest = torch.cat([self._nearest, fresh])

    def choose(self) -> tuple[int, int, float]:
        """The pair and the first one's share; of equals the earliest pair's smallest share."""
        scale = 1.0
        if not self._cosine:
            scale = float(squared_distance(self._gram[: self._size, : self._size]).max()) or 1.0
        rounded = torch.round(self._nearest / scale, decimals=DECIDING_DIGITS)
        pair, share = divmod(int(rounded.argmax()), len(SHARES))
        return int(self._firsts[pair]), int(self._seconds[pair]), float(SHARES[share])

    def _dissimilarity(
        self, firsts: torch.Tensor, seconds: torch.Tensor, experts: range | list[int]
    ) -> torch.Tensor:
        """The smallest to any of some experts, (pairs, shares); one after the other, for memory."""
        gram = self._gram
        alpha, beta = SHARES, 1 - SHARES
        norms = gram.diagonal()
        own = torch.outer(norms[firsts], alpha**2) + torch.outer(norms[seconds], beta**2)
        squares = own + torch.outer(gram[firsts, seconds], 2 * alpha * beta)
        squares = torch.where(squares > _NOTHING * own, squares, torch.zeros_like(squares))
        nearest = torch.full_like(squares, torch.inf)
        for expert in experts:
            norm = float(norms[expert])
            cross = torch.outer(gram[firsts, expert], alpha) + torch.outer(
                gram[seconds, expert], beta
            )
            if not self._cosine:
                found = (squares + norm - 2 * cross).clamp(min=0)
            elif norm > 0:
                found = 1 - cross / (squares * norm).sqrt()
                # A zero delta has no direction, see `cosine`.
                found = torch.where(squares > 0, found, torch.ones_like(found))
            else:
                found = (squares > 0).double()
            nearest = torch.minimum(nearest, found)
        return nearest
