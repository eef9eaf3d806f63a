"""Training of benchmarks.real: FFNs (and gates) alone, one loop for dense models and mixtures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from upit_merge.demo.training import save
from upit_merge.training.routing import balance_each_layer
from upit_merge.training.trainable import routers

ROWS = 8  # of a step: 1,024 tokens
BALANCE = 0.01  # weight of a mixture's load-balancing loss


def arithmetic() -> torch.autocast:
    """bfloat16 products of float32 weights: 1.5 times as fast here, losses within 0.0004 nats."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Schedule:
    """How a model is trained; shares are of all steps.

    Attributes:
        rate: The peak; it falls to zero as a cosine.
        warmup: Steps in which the rate rises.
        expert_rate: Of a mixture's experts, relative to the rate.
        gates_alone: Share of the steps, at the start, in which the gates alone are trained.
    """

    rate: float
    warmup: int = 0
    expert_rate: float = 1.0
    gates_alone: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Return what the peak is multiplied with in a step, from 0 on."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


def load(folder: Path) -> PreTrainedModel:
    """A model in float32, whose FFNs and gates alone have gradients."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if routers(model):  # a third faster here than grouped products
        model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return model


def adamw(model: PreTrainedModel) -> Optimizer:
    """One group for gates, one for FFNs; the first is empty for a dense model."""
    gates = [router.weight for router in routers(model)]
    known = {id(gate) for gate in gates}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    ffn = [weight for weight in trained if id(weight) not in known]
    groups = [{"params": gates}, {"params": ffn}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def train(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    schedule: Schedule,
    optimizer: Optimizer | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Train on batches of rows, one step each; returns the seconds.

    Args:
        optimizer: To go on with; a new one unless given.
        after_step: Told how many steps are done; its time is not counted.
    """
    optimizer = optimizer or adamw(model)
    gates, ffn = optimizer.param_groups
    mixture: dict[str, Any] = {}
    if found := routers(model):
        balance_each_layer(model, found, model.config.num_experts_per_tok)
        model.router_aux_loss_coef = 0.0  # that of transformers is not added
        mixture = {"output_router_logits": True}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    seconds, steps = 0.0, len(batches)
    for step, batch in enumerate(batches):
        started = time.perf_counter()
        model.train()
        rate = schedule.rate * schedule.factor(step, steps)
        alone = step < schedule.gates_alone * steps
        gates["lr"] = rate
        ffn["lr"] = 0.0 if alone else rate * (schedule.expert_rate if mixture else 1.0)
        with arithmetic():
            outputs = model(input_ids=batch, labels=batch, use_cache=False, **mixture)
        loss = outputs.loss + BALANCE * outputs.aux_loss if mixture else outputs.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        after_step(step + 1)
    return seconds


def in_batches(rows: Sequence[Tensor], seed: int | None = None) -> list[Tensor]:
    """Cut rows of some kinds into steps: one kind after the other, or shuffled by a seed."""
    every = torch.cat(list(rows))
    if seed is not None:
        every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))]
    return list(every.split(ROWS))


def write(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Save a dense model in bfloat16, whole or not at all."""
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        for mine, theirs in zip(rounded.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    part = out.with_name(out.name + ".part")
    save(part, rounded, AutoTokenizer.from_pretrained(base))
    part.rename(out)


@torch.inference_mode()
@arithmetic()
def losses(model: PreTrainedModel, rows: Iterable[Tensor]) -> list[float]:
    """Return the mean loss over the rows of every kind, nats per token."""
    model.eval()
    found = []
    for of_kind in rows:
        batches = of_kind.split(ROWS)
        sums = [model(input_ids=b, labels=b, use_cache=False).loss * len(b) for b in batches]
        found.append(float(sum(sums)) / len(of_kind))
    return found
