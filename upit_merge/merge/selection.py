"""More checkpoints than experts: which are kept, or which are averaged."""

from __future__ import annotations

from itertools import combinations

import torch

from upit_merge.merge.lineage import Expert
from upit_merge.merge.similarity import dissimilarity


def founders(gram: torch.Tensor, count: int, select: str, similarity: str) -> list[Expert]:
    """The experts that are checkpoints, or averages of them; decided once for the whole model.

    Args:
        gram: Of the checkpoints' deltas, float64, (m, m), summed over the tensors.
        count: How many experts there will be; if at least m, every checkpoint is kept.
        select: `diverse`, `last` or `merge_similar`.
        similarity: `cosine` or `l2`.
    """
    m = gram.shape[0]
    if select == "merge_similar" and m > count:
        groups = merge_similar(gram, count, similarity)
    elif select == "last" or m <= count:
        groups = [[index] for index in range(m)[-count:]]
    else:
        groups = [[index] for index in keep_diverse(gram, count, similarity)]
    return [
        Expert(
            group[0] if len(group) == 1 else None,
            None,
            None,
            tuple(1 / len(group) if index in group else 0.0 for index in range(m)),
        )
        for group in groups
    ]


def keep_diverse(gram: torch.Tensor, count: int, similarity: str) -> list[int]:
    """Greedy farthest-point selection of `count` of the m checkpoints, in their order.

    Starts from the most dissimilar pair; then always adds the checkpoint whose nearest chosen one
    is farthest. A single one is the last checkpoint, the fully trained one.
    """
    if count == 1:
        return [gram.shape[0] - 1]
    distances = dissimilarity(gram, similarity)
    pairs: list[tuple[int, int]] = list(combinations(range(gram.shape[0]), 2))
    chosen: list[int] = [*max(pairs, key=lambda pair: float(distances[pair]))]
    while len(chosen) < count:
        rest = [i for i in range(gram.shape[0]) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(distances[i, chosen].min())))
    return sorted(chosen)


def merge_similar(gram: torch.Tensor, count: int, similarity: str) -> list[list[int]]:
    """Agglomerative grouping: the two groups whose means are most alike become one, again and again.

    The mean of a group is that of all its checkpoints, each counting the same (centroid linkage).

    Args:
        gram: Of the checkpoints' deltas, float64, (m, m).
        count: Groups to end with, at most m.
        similarity: `cosine` or `l2`, of the groups' means.

    Returns:
        The groups' checkpoints, in order; the groups by their first one.
    """
    groups = [[index] for index in range(gram.shape[0])]
    while len(groups) > count:
        genomes = torch.zeros(len(groups), gram.shape[0], dtype=gram.dtype)
        for row, group in zip(genomes, groups, strict=True):
            row[group] = 1 / len(group)
        distances = dissimilarity(genomes @ gram @ genomes.T, similarity)
        pairs: list[tuple[int, int]] = list(combinations(range(len(groups)), 2))
        first, second = min(pairs, key=lambda pair: float(distances[pair]))
        groups[first] = sorted(groups[first] + groups.pop(second))
    return groups
