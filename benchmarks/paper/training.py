"""Training of benchmarks.paper: one loop for dense models and mixtures of experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.paper.data import Corpus, TuningData, visits
from benchmarks.paper.scales import Scale
from benchmarks.paper.schedules import (
    Schedule,
    adamw_by_part,
    balance_towards,
    freeze,
    natural_shares,
)
from upit_merge.demo.training import (
    TOKENIZER_DOCUMENTS,
    adamw,
    model_config,
    pack,
    save,
    sequences,
    train_tokenizer,
)
from upit_merge.training.routing import balance_each_layer
from upit_merge.training.trainable import routers

# After each quarter of an epoch a checkpoint, as in the paper: with four domains, after each visit.
STAGE1_EPOCHS = 2
MEASURED_ROWS = 96  # of what a mixture is trained on, for its experts' natural shares
# What the base knows; fine-tuning brings the others. Arithmetic is among it, as a base model of the
# paper can count: learned from the fine-tuning data alone, exact match would stay at nothing.
BASE_DOMAINS = ("docs", "arithmetic")


def train(
    model: PreTrainedModel,
    rows: Tensor,
    batch_size: int,
    peaks: Sequence[float],
    *,
    balance: float = 0.0,
    schedule: Schedule | None = None,
    optimizer: Optimizer | None = None,
    after_step: Callable[[int, int], None] = lambda step, steps: None,
) -> float:
    """One learning-rate cycle over rows in their order; returns its seconds.

    Args:
        model: A dense model, or a mixture, whose gates and experts are all trained.
        rows: [rows, context]; the last batch may be smaller.
        peaks: Highest learning rates of the optimiser's groups: without a schedule, of the FFN and
            of all else.
        balance: Weight of a mixture's load-balancing loss, as in `upit-merge finetune`.
        schedule: What is held back at first and what is balanced; its groups are `PARTS`.
        optimizer: To go on with; a new AdamW unless given.
        after_step: Told how many of how many steps are done; its time is not counted.
    """
    optimizer = optimizer or (adamw(model) if schedule is None else adamw_by_part(model))
    plan = schedule or Schedule()
    mixture: dict[str, Any] = {}
    shares: list[Tensor] = []
    if found := routers(model):
        balance_each_layer(model, found, model.config.num_experts_per_tok)
        model.router_aux_loss_coef = 0.0  # that of transformers is not added
        mixture = {"output_router_logits": True}
        if plan.balance_target == "natural":
            shares = natural_shares(model, rows[:MEASURED_ROWS], batch_size)
    model.train()
    batches = rows.to(model.device).split(batch_size)
    seconds = 0.0
    for step, batch in enumerate(batches):
        started = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * plan.rate(step, len(batches))
        if schedule is not None:
            freeze(optimizer, schedule.frozen(step, len(batches)))
        outputs = model(input_ids=batch, labels=batch, use_cache=False, **mixture)
        loss = outputs.loss
        if mixture:
            even = outputs.aux_loss
            if shares:
                chosen = model.config.num_experts_per_tok
                even = balance_towards(shares, outputs.router_logits, chosen)
            loss = loss + balance * plan.balance_weight(step, len(batches)) * even
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        after_step(step + 1, len(batches))
        model.train()
    return seconds


def make_tokenizer(corpus: Corpus, scale: Scale) -> PreTrainedTokenizerBase:
    """Trained on the base model's text, all domains alike."""
    texts = [text for domain in corpus.base for text in domain[:TOKENIZER_DOCUMENTS]]
    return train_tokenizer(texts, scale.vocab_size)


def train_base(folder: Path, corpus: Corpus, scale: Scale, device: str) -> tuple[Path, float]:
    """Pre-train the base on `BASE_DOMAINS` in turn; returns its folder and the seconds."""
    tokenizer = make_tokenizer(corpus, scale)
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(scale.model_shape, tokenizer)).to(device)
    generator = torch.Generator().manual_seed(0)
    streams = [
        sequences(pack(tokenizer, corpus.base[corpus.names.index(name)], scale.context), generator)
        for name in BASE_DOMAINS
    ]
    needed = scale.base_steps * scale.base_batch
    rows = torch.stack([next(streams[row % len(streams)]) for row in range(needed)])
    seconds = train(model, rows, scale.base_batch, [scale.rates.base] * 2)
    return save(folder / "base", model, tokenizer), seconds


def train_stage1(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TuningData,
    scale: Scale,
    replay: float,
    seed: int,
) -> tuple[list[Path], float]:
    """Fine-tune for two epochs, saving a checkpoint after every visit; paths and seconds.

    `upit_merge/demo/training.py` says what makes checkpoints specialise: one domain at a time,
    twice round, a learning-rate cycle for each visit, and a lower rate outside the FFN.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = adamw(model)
    peaks = [scale.rates.stage1, scale.rates.stage1 * scale.backbone_rate]
    checkpoints: list[Path] = []
    seconds = 0.0
    for _ in range(STAGE1_EPOCHS):
        for rows in visits(data.rows, replay, generator):
            seconds += train(model, rows, scale.batch_size, peaks, optimizer=optimizer)
            path = folder / f"checkpoint-{len(checkpoints) + 1}"
            checkpoints.append(save(path, model, tokenizer))
    return checkpoints, seconds
