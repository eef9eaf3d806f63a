"""Choose which experts become one: routing statistics in, groups out (MC-SMoE, arXiv 2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upit_merge.engine.hidden_states import Batch
from upit_merge.merge.similarity import cosine
from upit_merge.resizing.sources import Group
from upit_merge.router.counts import RoutingCounts
from upit_merge.router.evaluation import Routing, swept
from upit_merge.router.stage import RouterStage


@dataclass(frozen=True)
class RoutingStatistics:
    """What a router does, layer by layer.

    Attributes:
        counts: Where it sends tokens.
        products: Inner products over all tokens of the experts' router logits, float64,
            (num_layers, num_experts, num_experts).
    """

    counts: RoutingCounts
    products: Tensor


def routing_statistics(stage: RouterStage) -> RoutingStatistics:
    """Push the stage's samples through the mixture and look at its router."""
    model, samples = stage.model, stage.seeds.samples
    mixtures = len(model.mixture_layers)
    routing = Routing(len(samples), mixtures, model.num_experts)
    count = routing.counter(samples)
    shape = (mixtures, model.num_experts, model.num_experts)
    products = torch.zeros(shape, dtype=torch.float64)

    def look(layer: int, batch: Batch, logits: Tensor, chosen: Tensor) -> None:
        count(layer, batch, logits, chosen)
        wide = logits.double().cpu()
        products[layer] += wide.T @ wide

    with swept(stage, look, "routing"):
        return RoutingStatistics(routing.counts(stage.everything), products)


def group_experts(chosen: Tensor, products: Tensor, num_groups: int) -> list[Group]:
    """Group the experts of one layer around those that are used most (section 3.2 there).

    The `num_groups` experts with most tokens are dominant. Every other one joins the dominant
    expert whose router logits are most like its own, by their cosine over all tokens. A group
    becomes the mean of its members, weighted by how often each was chosen. Experts of one origin
    need no permutation of their neurons first, which the paper finds for others.

    Args:
        chosen: Tokens of each expert, (num_experts,).
        products: Inner products of the logits, (num_experts, num_experts).

    Returns:
        In the order of their dominant experts; ties go to the lower number.
    """
    order = sorted(range(len(chosen)), key=lambda expert: (-float(chosen[expert]), expert))
    dominant = sorted(order[:num_groups])
    likeness = cosine(products)
    members: dict[int, list[int]] = {expert: [expert] for expert in dominant}
    for expert in sorted(order[num_groups:]):
        members[max(dominant, key=lambda d: float(likeness[expert, d]))].append(expert)
    return [_weighted(group, chosen) for group in members.values()]


def _weighted(members: Sequence[int], chosen: Tensor) -> Group:
    counts = [float(chosen[member]) for member in members]
    total = sum(counts)
    # Nobody was ever chosen: there is nothing to tell them apart by.
    shares = [count / total if total else 1 / len(members) for count in counts]
    return Group(tuple(members), tuple(shares))
