"""Balancing and counting what a mixture's routers do while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from upit_merge.router.counts import RoutingCounts


def load_balancing_loss(
    logits: Sequence[Tensor], experts_per_token: int, mask: Tensor | None = None
) -> Tensor:
    """Return `n · Σ_i f_i · P_i`, mean over the layers (arXiv 2410.01610, stage 4; 2101.03961).

    f_i is the share of a layer's tokens that are sent to expert i (the shares sum to
    `experts_per_token`, which is the smallest value of the loss), P_i the mean of its routing
    probabilities. transformers' own is asked layer by layer: it takes both over all layers together,
    so that an expert that gets everything in one and nothing in another counts as balanced.

    Args:
        logits: Of every layer's router, (tokens, num_experts).
        experts_per_token: How many experts a token is sent to.
        mask: Which tokens are real, any shape with `tokens` elements; None if all are.

    Returns:
        A scalar with a gradient; 0 if no token is real.
    """
    # As float32, and with a mask of two dimensions, as older releases want it.
    rows = None if mask is None else mask.reshape(1, -1)
    if rows is not None and not rows.any():  # transformers' own would divide by zero
        return torch.stack([0 * layer.float().sum().to(logits[0].device) for layer in logits]).sum()
    losses = [
        load_balancing_loss_func((layer.float(),), layer.shape[1], experts_per_token, rows)
        for layer in logits
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def balance_each_layer(
    mixture: nn.Module, routers: Sequence[nn.Module], experts_per_token: int
) -> None:
    """Let a mixture of transformers give our load balancing as its `aux_loss`.

    Args:
        mixture: The whole model.
        routers: Its routers, see `trainable.routers`.
    """
    logits: list[Tensor] = []

    def collect(_router: nn.Module, _inputs: Any, outputs: Any) -> None:
        logits.append(outputs[0] if isinstance(outputs, tuple) else outputs)

    def forget(_mixture: nn.Module, _inputs: Any) -> None:
        logits.clear()  # what activation checkpointing computed a second time

    def replace(_mixture: nn.Module, _inputs: Any, inputs: dict[str, Any], outputs: Any) -> Any:
        if getattr(outputs, "aux_loss", None) is not None:
            mask = inputs.get("attention_mask")
            outputs.aux_loss = load_balancing_loss(logits, experts_per_token, mask)
        logits.clear()
        return outputs

    for router in routers:
        router.register_forward_hook(collect)
    mixture.register_forward_pre_hook(forget)
    mixture.register_forward_hook(replace, with_kwargs=True)


class RoutingMonitor:
    """Counts where tokens go, from hooks on the routers.

    Args:
        routers: One per layer, see `trainable.routers`.

    Attributes:
        mask: (batch, length), which tokens of the batch are real; None if all are.
    """

    def __init__(self, routers: Sequence[nn.Module]) -> None:
        self.mask: Tensor | None = None
        self._layers = len(routers)
        self._sums: Tensor | None = None
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        @torch.no_grad()
        def count(router: Any, _inputs: Any, outputs: Any) -> None:
            if not isinstance(outputs, tuple):
                outputs = outputs, outputs.topk(router.top_k).indices
            logits, chosen = outputs[0], outputs[-1]
            log_p = logits.float().log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)  # nats, (tokens,)
            real = torch.ones_like(entropy) if self.mask is None else self._real(entropy)
            experts = logits.shape[-1]
            if self._sums is None:
                # Per layer: tokens sent to each expert, then entropy and number of the tokens.
                self._sums = torch.zeros(
                    self._layers, experts + 2, dtype=torch.float64, device=logits.device
                )
            row = self._sums[layer].to(logits.device)
            weights = real.unsqueeze(-1).expand(chosen.shape).reshape(-1).double()
            row[:experts].scatter_add_(0, chosen.reshape(-1), weights)
            row[experts] += (entropy * real).double().sum()
            row[experts + 1] += real.double().sum()
            self._sums[layer] = row

        return count

    def _real(self, like: Tensor) -> Tensor:
        assert self.mask is not None
        return self.mask.reshape(-1).to(like)

    def take(self) -> Tensor | None:
        """Return the sums since the last call, (layers, num_experts + 2); None if there are none."""
        sums, self._sums = self._sums, None
        return sums


def routing_metrics(sums: Tensor) -> dict[str, float]:
    """Return what is logged of the routing.

    Args:
        sums: As `RoutingMonitor.take` gives them, of all processes together.

    Returns:
        `routing_entropy`: of a token's routing probabilities, mean over tokens and layers, and
        `load_entropy`: of the experts' shares of the tokens, mean over layers; both as a share of
        log(num_experts), so that 1 is even. `dead_experts`: how many of all layers' experts get
        less than a tenth of an even share.
    """
    counts = RoutingCounts(sums[:, :-2], sums[:, -2], sums[:, -1])
    entropy = counts.mean_entropy()
    return {
        "routing_entropy": entropy["token"],
        "load_entropy": entropy["load"],
        "dead_experts": len(counts.dead()),
    }
