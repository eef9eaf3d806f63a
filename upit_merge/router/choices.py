"""Which experts every token went to: counted over all samples, and kept of those that are shown."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.assembled import Handed
from upit_merge.engine.choices import Choices
from upit_merge.errors import UpitError
from upit_merge.router.evaluation import Routing, swept
from upit_merge.router.stage import RouterStage

# Of an even share of the tokens: an expert that gets less in a layer is called rare there.
RARE_SHARE = 0.5


@dataclass(frozen=True)
class Excerpt:
    """The first tokens of some samples, one sample after the other.

    Attributes:
        lengths: How many, by index of the sample, in order.
    """

    lengths: Mapping[int, int]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths.values())

    @classmethod
    def of(
        cls,
        samples: Sequence[TokenizedSample],
        groups: Sequence[Sequence[int]],
        num_tokens: int,
    ) -> Excerpt:
        """Choose about as many tokens of every group, of samples from all over it.

        Args:
            groups: Indices of samples; each is in one of them.
            num_tokens: At most so many in all.
        """
        lengths: dict[int, int] = {}
        left = num_tokens
        small = sorted(groups, key=lambda members: sum(len(samples[i].input_ids) for i in members))
        for number, members in enumerate(small):
            room = left // (len(small) - number)  # what small groups leave is for the larger ones
            for index in _spread(members):
                taken = min(room, len(samples[index].input_ids))
                if taken <= 0:
                    break
                lengths[index] = taken
                room, left = room - taken, left - taken
        return cls(dict(sorted(lengths.items())))


def _spread(members: Sequence[int]) -> list[int]:
    """Return indices so that the first of them, however many, are from all over the list.

    Data is often in the order of its kinds. By multiples of the golden ratio, the most even way.
    """
    ratio = (5**0.5 - 1) / 2
    places = sorted(range(len(members)), key=lambda number: number * ratio % 1)
    taken = sorted(range(len(members)), key=places.__getitem__)
    return [members[number] for number in taken]


@dataclass(frozen=True)
class Observation:
    """What a mixture's routers did.

    Attributes:
        routing: With all samples.
        choices: With the tokens of the excerpt.
        certainty: In each layer, the first choice's share of all experts' scores,
            (num_layers, num_tokens), of the same tokens.
        weights: Share of the gate weight each expert has, (num_layers, num_experts).
        correlation: Of the experts' router logits over all tokens, float64,
            (num_layers, num_experts, num_experts).
    """

    routing: Routing
    choices: Choices
    certainty: Tensor
    weights: Tensor
    correlation: Tensor


def observe(stage: RouterStage, excerpt: Excerpt) -> Observation:
    """Push the stage's samples through the mixture and look at its routers.

    Raises:
        UpitError: a router's logits are NaN or infinite.
    """
    model, samples = stage.model, stage.seeds.samples
    layers, experts = len(model.mixture_layers), model.num_experts
    top_k = model.format.chosen(model.architecture.config)
    routing = Routing(len(samples), layers, experts)
    count = routing.counter(samples)
    taken = torch.zeros(layers, experts, dtype=torch.float64)
    sums = torch.zeros(layers, experts, dtype=torch.float64)
    products = torch.zeros(layers, experts, experts, dtype=torch.float64)
    shape = (layers, excerpt.num_tokens, top_k)
    choices = Choices(
        tuple(model.mixture_layers), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    )
    certainty = torch.zeros(shape[:2])
    ends = itertools.accumulate(excerpt.lengths.values())
    stops = dict(zip(excerpt.lengths, ends, strict=True))

    def look(handed: Handed) -> None:
        layer, batch = handed.layer, handed.batch
        logits, chosen, weights = handed.logits.cpu(), handed.chosen.cpu(), handed.weights.cpu()
        if not logits.isfinite().all():
            raise UpitError(
                f"{model.moe.label} gives NaN or infinite router logits in layer "
                f"{model.mixture_layers[layer]}; its weights are broken, or overflow: make it with "
                "dtype: bfloat16."
            )
        count(layer, batch, logits, chosen)
        wide = logits.double()
        sums[layer] += wide.sum(0)
        products[layer] += wide.T @ wide
        taken[layer].scatter_add_(0, chosen.flatten(), weights.double().flatten())
        scores = model.format.scores(logits)
        sure = scores.gather(1, chosen[:, :1]).squeeze(1) / scores.sum(1)
        first = 0
        for index in batch:
            if index in stops:
                rows = slice(first, first + excerpt.lengths[index])
                places = slice(stops[index] - excerpt.lengths[index], stops[index])
                choices.experts[layer, places] = chosen[rows]
                choices.weights[layer, places] = weights[rows]
                certainty[layer, places] = sure[rows]
            first += len(samples[index].input_ids)

    with swept(stage, lambda *_: None, "routing", on_handed=look):
        tokens = sum(stage.lengths)
    shares = taken / taken.sum(1, keepdim=True).clamp(min=1e-30)
    return Observation(routing, choices, certainty, shares, _correlation(sums, products, tokens))


def _correlation(sums: Tensor, products: Tensor, count: int) -> Tensor:
    """Pearson's, from sums over `count` tokens; of logits that never change it is 0."""
    means = sums / count
    covariance = products / count - means.unsqueeze(2) * means.unsqueeze(1)
    deviation = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    # Below, the difference of large numbers is their rounding.
    constant = deviation <= 1e-6 * means.abs().clamp(min=1e-6)
    safe = torch.where(constant, torch.ones_like(deviation), deviation)
    found = (covariance / (safe.unsqueeze(2) * safe.unsqueeze(1))).clamp(-1, 1)
    found[constant.unsqueeze(2) | constant.unsqueeze(1)] = 0
    found.diagonal(dim1=1, dim2=2).fill_(1)
    return found
