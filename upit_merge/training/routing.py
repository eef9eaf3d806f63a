"""What a mixture's routers do while it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upit_merge.router.evaluation import DEAD_SHARE


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
        def count(_router: nn.Module, _inputs: Any, outputs: Any) -> None:
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
        """The sums since the last call, (layers, num_experts + 2); None if there are none."""
        sums, self._sums = self._sums, None
        return sums


def routing_metrics(sums: Tensor) -> dict[str, float]:
    """What is logged of the routing.

    Args:
        sums: As `RoutingMonitor.take` gives them, of all processes together.

    Returns:
        `routing_entropy`: of a token's routing probabilities, mean over tokens and layers, and
        `load_entropy`: of the experts' shares of the tokens, mean over layers; both as a share of
        log(num_experts), so that 1 is even. `dead_experts`: how many of all layers' experts get
        less than a tenth of an even share.
    """
    counts, entropy, tokens = sums[:, :-2], sums[:, -2], sums[:, -1]
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    experts = shares.shape[1]
    scale = math.log(experts) if experts > 1 else 1.0
    load = -torch.special.xlogy(shares, shares).sum(-1)
    return {
        "routing_entropy": float((entropy / tokens.clamp(min=1)).mean()) / scale,
        "load_entropy": float(load.mean()) / scale,
        "dead_experts": int((shares < DEAD_SHARE / experts).sum()),
    }
