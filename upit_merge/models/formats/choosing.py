"""What a router has to say of an expert for it to be chosen before others, which have biases.

Formats whose routers add a bias to every score before they choose differ in what a score is.
"""

from __future__ import annotations

import torch

# A score that no logit reaches, or that all exceed, is as near to the end of the range as this.
_MARGIN = 1e-4


def to_beat_by_softmax(logits: torch.Tensor, leads: torch.Tensor) -> torch.Tensor:
    """Return the logit with which one more expert is chosen before each, (tokens, num_experts).

    With Z the sum of the others' exponentials, that is the z with
    exp(z) / (Z + exp(z)) = exp(logit) / (Z + exp(z)) + lead.

    Args:
        logits: The others', (tokens, num_experts).
        leads: What each has added to its score, less what the new one has, (num_experts,).
    """
    total = logits.logsumexp(1, keepdim=True)
    above = (logits - total).exp() + leads
    return total + above.clamp(min=_MARGIN).log() - (1 - leads).clamp(min=_MARGIN).log()


def to_beat_by_sigmoid(logits: torch.Tensor, leads: torch.Tensor) -> torch.Tensor:
    """Return the same where a score is the sigmoid of a logit: the z with
    sigmoid(z) = sigmoid(logit) + lead.

    Args:
        logits: The others', (tokens, num_experts).
        leads: What each has added to its score, less what the new one has, (num_experts,).
    """
    return (logits.sigmoid() + leads).logit(eps=_MARGIN)
