"""Where a mixture's routers send tokens, counted layer by layer, and what that says."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Of an even share of the tokens: an expert that gets less in a layer is called dead there.
DEAD_SHARE = 0.1


@dataclass(frozen=True)
class RoutingCounts:
    """What the routers of all layers did with some tokens.

    Attributes:
        chosen: How many tokens an expert was among the chosen for, (num_layers, num_experts).
        entropy: Sum over the tokens of their routing probabilities' entropy, nats, (num_layers,).
        tokens: How many there were, (num_layers,).
    """

    chosen: Tensor
    entropy: Tensor
    tokens: Tensor

    @property
    def shares(self) -> Tensor:
        """Share of the routed places each expert has, (num_layers, num_experts); rows sum to 1."""
        return self.chosen / self.chosen.sum(1, keepdim=True).clamp(min=1)

    def dead(self) -> list[tuple[int, int]]:
        """Return (layer, expert) where an expert gets less than a tenth of an even share."""
        shares = self.shares
        places = (shares < DEAD_SHARE / shares.shape[1]).nonzero().tolist()
        return [(layer, expert) for layer, expert in places]

    def mean_entropy(self) -> dict[str, float]:
        """Return entropies as shares of log(num_experts), so that 1 is even; mean over the layers.

        `token`: of a token's routing probabilities; `load`: of the experts' shares.
        """
        shares = self.shares
        most = math.log(max(2, shares.shape[1]))
        of_tokens = self.entropy / self.tokens.clamp(min=1)
        of_shares = -(shares * shares.clamp(min=1e-30).log()).sum(1)
        return {"token": float(of_tokens.mean()) / most, "load": float(of_shares.mean()) / most}
