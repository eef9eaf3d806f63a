"""Models for benchmarks/router.py: checkpoints that specialised, or did not, and their MoE.

As in the demo, but with a wider and deeper model that is trained longer; see
`upit_merge/demo/training.py` for what makes checkpoints specialise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaForCausalLM
from transformers.utils import logging

from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe
from upit_merge.demo.corpus import Domain, load_domains, write_texts
from upit_merge.demo.training import (
    TrainingBudget,
    adamw,
    learning_rate_cycle,
    pack,
    save,
    sequences,
    train_demo_models,
)
from upit_merge.models.tokenizer import load_tokenizer

SPECIALISED = TrainingBudget(hidden_size=192, layers=4, base_steps=900, sft_steps=200)
# Every visit draws from all three domains alike.
WELL_MIXED = TrainingBudget(replay=2 / 3)
# A base that knows next to nothing yet, and how long and fast each branch leaves it.
EARLY = TrainingBudget(base_steps=100, sft_rounds=0)
APART_STEPS, APART_RATE = 1000, 7e-3
NUM_EXPERTS = 8
SEED_SAMPLES = 200  # of every domain


def build(folder: Path, seed: int, *, mixed: bool) -> None:
    """Train a base and its checkpoints, and merge them; leaves a folder that is there alone.

    Args:
        folder: Receives `base/`, `sft/`, `moe/` (with random gates), `seed.jsonl` and
            `held-out.jsonl`, both with the column `domain`.
    """
    if (folder / "moe" / "config.json").is_file():
        return
    logging.disable_progress_bar()
    domains = load_domains()
    train_demo_models(folder, domains, seed=seed, budget=WELL_MIXED if mixed else SPECIALISED)
    _write_and_merge(folder, domains, seed)


def build_apart(folder: Path, seed: int) -> None:
    """The same of branches far apart: FFNs that left one early base and never met again."""
    if (folder / "moe" / "config.json").is_file():
        return
    logging.disable_progress_bar()
    domains = load_domains()
    # Zero rounds: the base alone, with its tokenizer.
    train_demo_models(folder, domains, seed=seed, budget=EARLY)
    tokenizer = load_tokenizer(folder / "base")
    for number, domain in enumerate(domains, 1):
        generator = torch.Generator().manual_seed(seed)
        rows = sequences(pack(tokenizer, domain.train, EARLY.context), generator)
        model = LlamaForCausalLM.from_pretrained(folder / "base").train()
        optimizer = adamw(model)
        for step in range(APART_STEPS):
            optimizer.param_groups[0]["lr"] = APART_RATE * learning_rate_cycle(step, APART_STEPS)
            optimizer.param_groups[1]["lr"] = 0.0  # the attention stays everybody's
            batch = torch.stack([next(rows) for _ in range(EARLY.batch_size)])
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        save(folder / "sft" / f"checkpoint-{number}", model, tokenizer)
    _write_and_merge(folder, domains, seed)


def _write_and_merge(folder: Path, domains: Sequence[Domain], seed: int) -> None:
    generator = random.Random(seed)
    samples = [generator.sample(domain.train, SEED_SAMPLES) for domain in domains]
    write_texts(folder / "seed.jsonl", domains, samples)
    write_texts(folder / "held-out.jsonl", domains, [domain.heldout for domain in domains])
    with_random_gates(folder, NUM_EXPERTS, seed, folder / "moe")


def with_random_gates(
    folder: Path, num_experts: int, seed: int, out: Path, dtype: str = "float32"
) -> Path:
    """Merge a folder's checkpoints without a router; returns the output."""
    document = {
        "merge_method": "upit",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "sft" / "checkpoint-*")}],
        "dtype": dtype,
        "parameters": {"num_experts": num_experts, "seed": seed},
    }
    return _run(document, out)


def merged(
    folder: Path,
    checkpoints: Sequence[Path],
    out: Path,
    parameters: dict,
    *,
    recipe: dict[str, Any] | None = None,
    **router,
) -> Path:
    """Merge some checkpoints of a folder from `build`, with a router; returns the output.

    Args:
        recipe: Further keys of the recipe.
    """
    document = {
        "merge_method": "upit",
        "base_model": str(folder / "base"),
        "models": [{"model": str(path)} for path in checkpoints],
        "dtype": "float32",
        "parameters": parameters,
        **(recipe or {}),
        "router": {"data": str(folder / "seed.jsonl"), **router},
    }
    return _run(document, out)


def _run(document: dict[str, Any], out: Path) -> Path:
    source = yaml.safe_dump(document, sort_keys=False)
    run_recipe(parse_recipe(document), source, out, RunOptions(quiet=True))
    return out
