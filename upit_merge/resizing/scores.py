"""Choose which experts go: what each adds to the stream (REAP, arXiv 2510.13999)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upit_merge.engine.assembled import Handed
from upit_merge.errors import UpitError
from upit_merge.router.counts import RoutingCounts
from upit_merge.router.evaluation import Routing, swept
from upit_merge.router.stage import RouterStage


@dataclass(frozen=True)
class ExpertScores:
    """What experts add to the stream, layer by layer.

    Attributes:
        counts: Where the router sends tokens.
        means: Over the tokens an expert is among the chosen for, the mean of the router's weight
            times the L2 norm of what the expert gives; 0 for one that is never chosen; float64,
            (num_layers, num_experts).
    """

    counts: RoutingCounts
    means: Tensor


def expert_scores(stage: RouterStage) -> ExpertScores:
    """Push the stage's samples through the mixture and score its experts (equation 9 there).

    Raises:
        UpitError: a score is NaN or infinite.
    """
    model, samples = stage.model, stage.seeds.samples
    routing = Routing(len(samples), len(model.mixture_layers), model.num_experts)
    sums = torch.zeros(len(model.mixture_layers), model.num_experts, dtype=torch.float64)

    def add(handed: Handed) -> None:
        parts = (handed.weights * handed.output_norms()).double().cpu()
        sums[handed.layer].index_add_(0, handed.chosen.flatten().cpu(), parts.flatten())

    count = routing.counter(samples)
    with swept(stage, count, "scores", on_handed=add):
        counts = routing.counts(stage.everything)
    if not sums.isfinite().all():
        raise UpitError(
            f"{model.moe.label} gives NaN or infinite outputs; its weights are broken, or overflow: "
            "make it with dtype: bfloat16."
        )
    return ExpertScores(counts, sums / counts.chosen.clamp(min=1))


def kept_experts(chosen: Tensor, scores: Tensor, count: int) -> list[int]:
    """Return the numbers of the experts of one layer that stay: those with the highest scores.

    Of equal scores that with more tokens is the higher one, then that with the lower number.

    Args:
        chosen: Tokens of each expert, (num_experts,).
        scores: (num_experts,).
    """
    pairs: Sequence[tuple[float, float]] = [*zip(scores.tolist(), chosen.tolist(), strict=True)]
    order = sorted(range(len(pairs)), key=lambda e: (-pairs[e][0], -pairs[e][1], e))
    return sorted(order[:count])
