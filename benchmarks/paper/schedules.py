"""How a mixture is trained further: what is held back at first, and what is balanced; plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from transformers import PreTrainedModel

from upit_merge.demo.training import learning_rate_cycle
from upit_merge.training.trainable import routers

PARTS = ("gates", "experts", "backbone")  # the order of `adamw_by_part`'s groups
SMALLEST_SHARE = 0.1  # of an even one: nobody's natural share is less, however dead at the start


@dataclass(frozen=True)
class Schedule:
    """One way of post-training. The default is what all arms had before there were others.

    Attributes:
        warmup: Share of the steps until the learning rate is at its peak, from where a cosine takes
            it to zero. None: a twelfth, under a cosine over all steps.
        gates_frozen: Share of the steps, from the first, in which the gates are left as they are.
        others_frozen: … in which all but the gates is: the router first.
        gates, experts, backbone: Learning rates of each, relative to the arm's.
        balance: Weight of the load-balancing loss, relative to the scale's.
        balance_ramp: Share of the steps over which that weight grows from nothing.
        balance_target: The shares of the tokens at which the load counts as balanced: the same for
            all experts, or those they had when training began.
    """

    warmup: float | None = None
    gates_frozen: float = 0.0
    others_frozen: float = 0.0
    gates: float = 1.0
    experts: float = 1.0
    backbone: float = 1.0
    balance: float = 1.0
    balance_ramp: float = 0.0
    balance_target: Literal["uniform", "natural"] = "uniform"

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step (the first is 0) as a share of its peak."""
        if self.warmup is None:
            return learning_rate_cycle(step, steps)
        rising = max(1, round(self.warmup * steps))
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2

    def peaks(self, rate: float) -> list[float]:
        """Return the highest learning rate of every part."""
        return [rate * relative for relative in (self.gates, self.experts, self.backbone)]

    def frozen(self, step: int, steps: int) -> list[bool]:
        """Return which parts a step leaves as they are."""
        others = step < round(self.others_frozen * steps)
        return [step < round(self.gates_frozen * steps), others, others]

    def balance_weight(self, step: int, steps: int) -> float:
        """Return the weight of the load-balancing loss in a step, relative to the scale's."""
        ramp = round(self.balance_ramp * steps)
        return self.balance * (min(1.0, step / ramp) if ramp else 1.0)


def adamw_by_part(model: Module) -> Optimizer:
    """Make the demo's AdamW with a group for each of `PARTS`; a dense model's FFNs are experts."""
    gates, experts, backbone = [], [], []
    for name, weight in model.named_parameters():
        part = gates if ".mlp.gate." in name else experts if ".mlp." in name else backbone
        part.append(weight)
    groups = [{"params": part} for part in (gates, experts, backbone)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)


def freeze(optimizer: Optimizer, frozen: Sequence[bool]) -> None:
    """Leave some groups of an optimiser without gradients, and so as they are."""
    for group, still in zip(optimizer.param_groups, frozen, strict=True):
        weights: list[Parameter] = group["params"]
        for weight in weights:
            weight.requires_grad_(not still)


@torch.no_grad()
def natural_shares(model: PreTrainedModel, rows: Tensor, batch_size: int) -> list[Tensor]:
    """Measure which share of the tokens every expert gets from the gates as they are.

    Args:
        model: A mixture.
        rows: [rows, context].
        batch_size: In rows.

    Returns:
        For every layer, [num_experts], summing to 1 and nowhere below a tenth of an even share.
    """
    model.eval()
    count = model.config.num_local_experts
    sums = [torch.zeros(count, device=model.device) for _ in routers(model)]
    for batch in rows.to(model.device).split(batch_size):
        output = model(input_ids=batch, use_cache=False, output_router_logits=True)
        for total, logits in zip(sums, output.router_logits, strict=True):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=1).indices
            total += torch.bincount(chosen.flatten(), minlength=count)
    shares = [(total / total.sum()).clamp_min(SMALLEST_SHARE / count) for total in sums]
    return [share / share.sum() for share in shares]


def balance_towards(
    shares: Sequence[Tensor], logits: Sequence[Tensor], experts_per_token: int
) -> Tensor:
    """Compute `Σ_i f_i · P_i / q_i`, mean over the layers: lowest, flat, where f is as q is.

    With all q_i = 1/n it is the load-balancing loss of `upit-merge finetune`, `n · Σ_i f_i · P_i`.

    Args:
        shares: q of every layer, [num_experts], summing to 1.
        logits: Of every layer's router, [tokens, num_experts].
        experts_per_token: How many experts a token is sent to.
    """
    losses = []
    for share, layer in zip(shares, logits, strict=True):
        probabilities = layer.float().softmax(1)
        chosen = probabilities.topk(experts_per_token, dim=1).indices
        load = torch.bincount(chosen.flatten(), minlength=len(share)) / len(layer)
        losses.append((load * probabilities.mean(0) / share).sum())
    return torch.stack(losses).mean()
